"""Where output goes: data on stdout, everything else on stderr."""

from __future__ import annotations

import json
import re
import shutil
import sys
import tempfile
import textwrap
from pathlib import Path
from typing import Any

from isoflop.errors import InputError, Problem, clean

SCHEMA = "isoflop/1"
LARGEST_OUTPUT = 2**26
#: Columns below which nothing is folded, and spaces from which on a last column is prose.
NARROW, PROSE = 40, 3


def emit(command: str, data: dict[str, Any]) -> None:
    """One JSON object on stdout. Infinities and NaN are never written."""
    whole = {"schema": SCHEMA, "command": command, **data}
    print(json.dumps(whole, indent=2, allow_nan=False))


def say(text: str = "") -> None:
    """Text for people, on stdout; a terminal gets its long lines folded, a pipe as they are."""
    if sys.stdout is not None and sys.stdout.isatty():
        width = shutil.get_terminal_size().columns
        text = "\n".join(fold(line, width) for line in text.splitlines())
    print(text)


def fold(line: str, width: int) -> str:
    """A line whose last column is prose, folded under that column or under its beginning.

    Rows of numbers and pictures stay whole: cut, they say nothing.

    >>> print(fold("  pue = 1.1  energy of the building over energy of its machines", 40))
      pue = 1.1  energy of the building over
                 energy of its machines
    """
    column = max((gap.end() for gap in re.finditer(r"^ *|  +", line)), default=0)
    prose = line[column:]
    if len(line) <= width or width < NARROW or prose.count(" ") < PROSE or "|" in line:
        return line
    if column <= width - 40:
        first, indent = line[:column], column or 2
    else:  # too little room beside the other columns: below them
        first, indent = "", len(line) - len(line.lstrip()) + 4
    folded = textwrap.fill(
        prose, width, initial_indent=first or " " * indent, subsequent_indent=" " * indent,
        break_long_words=False, break_on_hyphens=False,
    )  # fmt: skip
    return folded if first or not column else f"{line[:column].rstrip()}\n{folded}"


def note(text: str) -> None:
    """Progress and reasoning, on stderr, each a line of its own."""
    print("\n".join(map(clean, text.splitlines())), file=sys.stderr)


def write(text: str, path: Path | None) -> None:
    """Text for a file, or on stdout where none is named; nothing is written over.

    Raises:
        InputError: the file exists, or its folder does not.
    """
    if path is None:
        return say(text.rstrip("\n"))
    if path.exists() or not path.parent.is_dir():
        rule = "is a new file in a folder that exists"
        raise InputError("command line", [Problem("--output", str(path), rule)])
    path.write_text(text, encoding="utf-8")
    return note(f"wrote {path}")


def check_output(path: Path, kind: str = "") -> None:
    """Refuse, before any work is done, a file that cannot be written or is somebody else's.

    An existing file may be replaced only where it is JSON of isoflop that holds `kind`.

    Raises:
        InputError: no such folder, one not to be written in, a folder itself, a name that is
            none, or a file that is not ours.
    """
    rule, hint = _broken_rule(path, kind)
    if rule:
        problem = Problem("--output", str(path), rule, f"{hint}nothing was written")
        raise InputError("command line", [problem])


def _broken_rule(path: Path, kind: str) -> tuple[str, str]:
    """The rule that a place to write breaks, and what the system says; two empty texts if none."""
    try:
        if path.is_dir() or not path.parent.is_dir():
            return "is a file in a folder that exists", ""
        if path.exists() and not _is_ours(path, kind):
            return f"is a new file, or one that isoflop wrote{f' with {kind}' if kind else ''}", ""
        # Some folders let one ask whether they can be written and yet refuse: so one is tried.
        with tempfile.TemporaryFile(dir=path.parent):
            return "", ""
    except (OSError, ValueError) as error:  # a name too long, with a NUL, or in a closed folder
        return "can be written", f"{getattr(error, 'strerror', None) or error}; "


def _is_ours(path: Path, kind: str) -> bool:
    """Only of an ordinary file: others may block, or never end."""
    if not path.is_file():
        return False
    try:
        with path.open("rb") as file:
            data = json.loads(file.read(LARGEST_OUTPUT))
    except (OSError, ValueError, RecursionError):
        return False
    return isinstance(data, dict) and data.get("schema") == SCHEMA and kind in data
