"""metrics.jsonl: one JSON line per logged step, only ever appended to.

A process killed in mid-line leaves a torn last line: readers drop it, the next writer cuts
it off. A resumed run logs some steps again; the last line of a step is the one that counts.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

from isoflop.errors import InputError, Problem
from isoflop.runs.durable import WriteFailed
from isoflop.runs.text import Json, decode, encode

NAME = "metrics.jsonl"


class MetricsWriter:
    """The end of one metrics.jsonl, open for appending."""

    def __init__(self, folder: Path) -> None:
        self._path = folder / NAME
        try:
            flags = os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW
            self._handle = os.open(self._path, flags, 0o600)
            data = self._path.read_bytes()
            self._bytes = data.rfind(b"\n") + 1
            os.ftruncate(self._handle, self._bytes)
        except OSError as error:
            raise WriteFailed(self._path, 0, error) from error

    def append(self, row: Mapping[str, object]) -> None:
        """Add one row, handed to the system before this returns.

        Raises:
            WriteFailed: no room; the rows before are intact.
        """
        line = encode(row)
        try:
            written = os.write(self._handle, line)
            if written < len(line):  # a disk that fills up in mid-line; the rest says why
                os.write(self._handle, line[written:])
        except OSError as error:
            os.ftruncate(self._handle, self._bytes)
            raise WriteFailed(self._path, len(line), error) from error
        self._bytes += len(line)

    def sync(self) -> None:
        """Force all rows to the disk."""
        os.fsync(self._handle)

    def close(self) -> None:
        os.close(self._handle)


def read_metrics(folder: Path | str) -> list[Json]:
    """The rows of a run, one per step, by rising step; empty before the first.

    Raises:
        InputError: a line before the last is not a row.
    """
    path = Path(folder) / NAME
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        return []
    except OSError as error:
        problem = Problem(NAME, error.strerror, "can be read")
        raise InputError(str(folder), [problem]) from None
    lines = data.split(b"\n")[:-1]  # what follows the last line end is nothing, or torn
    rows = (_row(Path(folder), number, line) for number, line in enumerate(lines, start=1))
    by_step = {row["step"]: row for row in rows}
    return [by_step[step] for step in sorted(by_step)]


def _row(folder: Path, number: int, line: bytes) -> Json:
    try:
        row = decode(line)
    except ValueError as error:
        row, why = {}, str(error)
    else:
        why = "no whole number `step`"
    if type(row.get("step")) is not int:
        problem = Problem(f"{NAME} line {number}", why, "is one row of metrics")
        raise InputError(str(folder), [problem])
    return row
