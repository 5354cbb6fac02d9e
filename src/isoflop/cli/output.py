"""Where output goes: data on stdout, everything else on stderr."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from isoflop.errors import InputError, Problem, clean

SCHEMA = "isoflop/1"
LARGEST_OUTPUT = 2**26


def emit(command: str, data: dict[str, Any]) -> None:
    """One JSON object on stdout. Infinities and NaN are never written."""
    whole = {"schema": SCHEMA, "command": command, **data}
    print(json.dumps(whole, indent=2, allow_nan=False))


def say(text: str = "") -> None:
    """Text for people, on stdout."""
    print(text)


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
        InputError: no such folder, a folder itself, or a file that is not ours.
    """
    if path.is_dir() or not path.parent.is_dir():
        rule = "is a file in a folder that exists"
    elif path.exists() and not _is_ours(path, kind):
        rule = f"is a new file, or one that isoflop wrote{f' with {kind}' if kind else ''}"
    else:
        return
    problem = Problem("--output", str(path), rule, "nothing was written")
    raise InputError("command line", [problem])


def _is_ours(path: Path, kind: str) -> bool:
    try:
        data = json.loads(path.read_bytes()[:LARGEST_OUTPUT])
    except (OSError, ValueError, RecursionError):
        return False
    return isinstance(data, dict) and data.get("schema") == SCHEMA and kind in data
