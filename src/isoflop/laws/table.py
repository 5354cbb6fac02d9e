"""Measured runs from a CSV file: parameters, tokens and the loss they reached."""

from __future__ import annotations

import csv
import math
from dataclasses import dataclass
from pathlib import Path

from isoflop.errors import InputError, Problem, nearest
from isoflop.laws.form import FLOPS_PER_PARAM_TOKEN

#: A file larger than this is refused before it is read.
LARGEST_FILE_BYTES = 64 * 2**20
#: Bad cells shown one by one; the rest are counted.
MOST_SHOWN = 3


@dataclass(frozen=True, slots=True)
class Runs:
    """One row per run; the three columns have one length. `tokens_source` says how D came."""

    params: tuple[float, ...]
    tokens: tuple[float, ...]
    loss: tuple[float, ...]
    source: str
    tokens_source: str

    def __len__(self) -> int:
        return len(self.loss)


def read_runs(
    path: str | Path,
    *,
    params: str = "params",
    tokens: str = "tokens",
    flops: str = "flops",
    loss: str = "loss",
) -> Runs:
    """Read runs from the named columns of a CSV file with a header.

    Where the file has no `tokens` column, tokens = flops / (6 params).

    Raises:
        InputError: no such file, too large, not UTF-8, a missing column (with near names), or
            cells that are not positive numbers (the first three with row and column).
    """
    path = Path(path)
    header, rows = _read_cells(path)
    derived = tokens not in header and flops in header
    wanted = [params, flops if derived else tokens, loss]
    _check_columns(path, header, wanted, tokens)
    columns = _numbers(path, header, rows, wanted)
    sizes, amounts, losses = columns
    if derived:
        amounts = tuple(
            c / (FLOPS_PER_PARAM_TOKEN * n) for c, n in zip(amounts, sizes, strict=True)
        )
    origin = f"{flops} / ({FLOPS_PER_PARAM_TOKEN:g} {params})" if derived else f"column {tokens}"
    return Runs(sizes, amounts, losses, source=str(path), tokens_source=origin)


def _read_cells(path: Path) -> tuple[list[str], list[list[str]]]:
    try:
        if not path.is_file():
            raise _refusal(path, "is a file that exists")
        size = path.stat().st_size
        if size > LARGEST_FILE_BYTES:
            raise _refusal(path, f"is a file of at most {LARGEST_FILE_BYTES // 2**20} MiB")
        with path.open(encoding="utf-8-sig", newline="") as file:
            header, *rows = csv.reader(file, strict=True)
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise _refusal(path, "is a readable UTF-8 CSV file", str(error)) from None
    except ValueError:  # nothing to unpack; also what a path with a null character raises
        raise _refusal(path, "is a CSV file with a header row") from None
    return [name.strip() for name in header], rows


def _refusal(path: Path, rule: str, hint: str = "") -> InputError:
    return InputError("runs", [Problem("file", str(path), rule, hint)])


def _check_columns(path: Path, header: list[str], wanted: list[str], tokens: str) -> None:
    problems = []
    for column in wanted:
        if header.count(column) != 1:
            near = nearest(column, header)
            hint = f"did you mean {' or '.join(near)}?" if near else f"it has {', '.join(header)}"
            if column == tokens:
                hint += "; or name a column of flops"
            problems.append(Problem("column", column, "is in the header exactly once", hint))
    if problems:
        raise InputError(path.name, problems)


def _numbers(
    path: Path, header: list[str], rows: list[list[str]], wanted: list[str]
) -> tuple[tuple[float, ...], ...]:
    """The wanted columns as positive numbers; blank lines are skipped."""
    places = [header.index(column) for column in wanted]
    columns: tuple[list[float], ...] = ([], [], [])
    problems = []
    for line, row in enumerate(rows, start=2):
        if not row:
            continue
        for place, column, values in zip(places, wanted, columns, strict=True):
            cell = row[place] if place < len(row) else ""
            values.append(_positive(cell))
            if math.isnan(values[-1]):
                where = f"row {line}, column {column}"
                problems.append(Problem(where, cell or "(empty)", "is a finite number above 0"))
    if problems:
        raise InputError(path.name, shown(problems))
    return tuple(tuple(values) for values in columns)


def _positive(cell: str) -> float:
    """The number in a cell; NaN where there is none above 0."""
    try:
        value = float(cell)
    except ValueError:
        return math.nan
    return value if 0 < value < math.inf else math.nan


def shown(problems: list[Problem]) -> list[Problem]:
    """The first few problems, and one line that counts the rest."""
    more = len(problems) - MOST_SHOWN
    if more <= 0:
        return problems
    rest = Problem("and", f"{more} more like these", problems[0].rule)
    return [*problems[:MOST_SHOWN], rest]
