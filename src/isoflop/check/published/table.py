"""Tables of published measurements: CSV files, one row per measurement."""

from __future__ import annotations

import csv
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, TypeAlias

from isoflop.errors import InputError, Problem, nearest

#: A file larger than this is refused before it is read.
LARGEST_FILE_BYTES = 16 * 2**20
#: Rows beyond this are refused: each becomes a model and a prediction.
MOST_ROWS = 20_000
#: Bad cells shown one by one; the rest are counted.
MOST_SHOWN = 5

Form: TypeAlias = Literal["step", "memory", "run"]

#: What each kind of table is told by, what it must have, and what it may have besides.
MARKS: dict[str, Form] = {
    "peak_mem_per_gpu_gb": "memory",
    "gpu_hours": "run",
    "global_batch_seqs": "step",
}
REQUIRED: dict[Form, str] = {
    "step": "row_id source_family model seq_len gpu_type num_gpus global_batch_seqs precision",
    "memory": "row_id source_family model params task num_gpus tp pp dp virtual_pp seq_len micro_batch "
    "batch_or_grad_accum recompute sequence_parallel quantization sharding peak_mem_per_gpu_gb "
    "unit component notes",
    "run": "row_id model tokens hardware gpu_hours",
}
OPTIONAL: dict[Form, str] = {
    "step": "params active_params layers hidden heads kv_heads ffn vocab task tp pp dp cp ep virtual_pp "
    "micro_batch recompute zero_fsdp sequence_parallel stack step_time_s model_tflops_per_gpu "
    "hw_tflops_per_gpu tokens_per_s_per_gpu mfu_pct hfu_pct mem_per_gpu_gb date_or_version "
    "source verified notes",
    "memory": "trainable_params gpu_type cp ep precision optimizer step_time_s tokens_per_s_per_gpu "
    "source verified",
    "run": "params active_params num_gpus wall_days power_W_per_gpu energy_MWh tCO2e pue "
    "kgCO2_per_kWh train_flops cost_usd mfu_pct seq_len global_batch_seqs tp pp dp cp ep virtual_pp "
    "micro_batch recompute zero_fsdp sequence_parallel precision stack source verified notes",
}


@dataclass(frozen=True, slots=True)
class Table:
    """The rows of one file and which kind of measurement they are."""

    name: str
    form: Form
    rows: tuple[Mapping[str, str], ...]
    #: Line of the file that each row stands on.
    lines: tuple[int, ...]

    def cells(self) -> Iterator[Cells]:
        """Each row, ready to be read."""
        return (Cells(row, line) for row, line in zip(self.rows, self.lines, strict=True))


def read_table(path: str | Path) -> Table:
    """Read a CSV file of throughput, of memory, or of whole runs; its header says which.

    Lines that begin with # are comments.

    Raises:
        InputError: no such file, too large, not UTF-8, a header of no kind, a column that is
            missing, twice there or unknown, or a row of another length than the header.
    """
    path = Path(path)
    header, rows = _read(path)
    form = next((form for mark, form in MARKS.items() if mark in header), None)
    if form is None:
        rule = "has " + ", ".join(
            f"{mark} (a table of {form} rows)" for mark, form in MARKS.items()
        )
        hint = (
            f"a step needs {REQUIRED['step'].replace(' ', ', ')} and step_time_s: docs/own-steps.md"
        )
        raise InputError(path.name, [Problem("header", ", ".join(header), rule, hint)])
    _check_header(path.name, header, form)
    if len(rows) > MOST_ROWS:
        raise InputError(path.name, [Problem("rows", len(rows), f"is at most {MOST_ROWS:,}")])
    bad = [
        Problem(f"row {line}", f"{len(row)} cells", f"has {len(header)} cells, as the header")
        for line, row in rows
        if len(row) != len(header)
    ]
    if bad:
        raise InputError(path.name, shown(bad))
    named = tuple({k: v.strip() for k, v in zip(header, row, strict=True)} for _, row in rows)
    return Table(path.name, form, named, tuple(line for line, _ in rows))


def _read(path: Path) -> tuple[list[str], list[tuple[int, list[str]]]]:
    """The header, and each row with its line."""
    try:
        if not path.is_file():
            raise _refusal(path, "is a file that exists")
        if path.stat().st_size > LARGEST_FILE_BYTES:
            raise _refusal(path, f"is a file of at most {LARGEST_FILE_BYTES // 2**20} MiB")
        with path.open(encoding="utf-8-sig", newline="") as file:
            reader = csv.reader(file, strict=True)
            found = [(reader.line_num, row) for row in reader if row and row[0][:1] != "#"]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise _refusal(path, "is a readable UTF-8 CSV file", str(error)) from None
    if not found:
        raise _refusal(path, "is a CSV file with a header row")
    return [name.strip() for name in found[0][1]], found[1:]


def _refusal(path: Path, rule: str, hint: str = "") -> InputError:
    return InputError("rows", [Problem("file", str(path), rule, hint)])


def _check_header(name: str, header: list[str], form: Form) -> None:
    required, known = REQUIRED[form].split(), [*REQUIRED[form].split(), *OPTIONAL[form].split()]
    bad = [Problem("column", c, "is in the header", f"a table of {form} rows needs it")
           for c in required if c not in header]  # fmt: skip
    for column in dict.fromkeys(header):
        if header.count(column) > 1:
            bad.append(Problem("column", column, "is in the header once"))
        if column not in known:
            near = nearest(column, known)
            hint = f"did you mean {' or '.join(near)}?" if near else f"known: {', '.join(known)}"
            bad.append(Problem("column", column, f"is a column of {form} rows", hint))
    if bad:
        raise InputError(name, bad)


@dataclass(slots=True)
class Cells:
    """One row while it is read: keeps what was wrong with it and what had to be assumed."""

    row: Mapping[str, str]
    line: int
    problems: list[Problem] = field(default_factory=list)
    assumed: list[str] = field(default_factory=list)

    def text(self, column: str) -> str:
        """The cell, empty where the column is absent."""
        return self.row.get(column, "")

    def whole(self, column: str, most: int = 10**12) -> int | None:
        """A whole number from 1, None where the cell is blank; 30e9 is read too.

        >>> cells = Cells({"params": "1.3e9", "tp": "2.5"}, line=7)
        >>> cells.whole("params"), cells.whole("tp"), str(cells.problems[0])
        (1300000000, None, 'row 7, column tp=2.5: must be a whole number from 1 to 1e+12')
        """
        value = self.real(column)
        if value is None:
            return None
        if value != int(value) or not 1 <= value <= most:
            self.wrong(column, f"is a whole number from 1 to {most:g}")
            return None
        return int(value)

    def real(self, column: str) -> float | None:
        """A finite number above 0, None where the cell is blank."""
        text = self.text(column)
        if not text:
            return None
        try:
            value = float(text)
        except ValueError:
            value = math.nan
        if not 0 < value < math.inf:
            self.wrong(column, "is a finite number above 0")
            return None
        return value

    def or_assume(self, column: str, value: int, why: str = "", *, most: int = 10**12) -> int:
        """The cell's whole number; where it is blank the value, listed as assumed."""
        found = self.whole(column, most)
        if found is not None:
            return found
        if not self.text(column):
            self.assume(f"{column}: {value}{f', {why}' if why else ''}")
        return value

    def choice(self, column: str, known: Mapping[str, str]) -> str | None:
        """What the cell stands for among the known texts; None where it is blank."""
        text = self.text(column)
        if text and text.casefold() not in known:
            self.wrong(column, f"is one of {', '.join(known)}")
        return known.get(text.casefold())

    def assume(self, text: str) -> None:
        self.assumed.append(text)

    def wrong(self, column: str, rule: str, hint: str = "") -> None:
        self.problems.append(
            Problem(f"row {self.line}, column {column}", self.text(column), rule, hint)
        )


def shown(problems: list[Problem]) -> list[Problem]:
    """The first few problems, and one line that counts the rest."""
    more = len(problems) - MOST_SHOWN
    if more <= 0:
        return problems
    return [*problems[:MOST_SHOWN], Problem("and", f"{more} more like these", "are mended too")]
