"""Published memory beside its predictions: what trainers.py says of each row, judged."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from isoflop.check.published.score import Judged
from isoflop.check.published.shapes import Skip
from isoflop.check.published.table import Table
from isoflop.check.published.trainers import Predicted, Row, trainer_of
from isoflop.count.memory_stack import ERROR_OF_MEMORY
from isoflop.errors import InputError, Problem
from isoflop.quantity import Interval, Symbol, branch, leaf, number

GB, GIB = 10**9, 2**30


@dataclass(frozen=True, slots=True)
class Result:
    """One row: bytes predicted and published (None: a bound or an out-of-memory)."""

    row: str
    family: str
    group: str
    by: Predicted
    published: float | None
    stated: str

    @property
    def kind(self) -> str:
        return self.by.kind

    @property
    def predicted(self) -> float:
        beside = self.by.beside
        return self.by.own + (self.by.n_accelerators * float(beside.value) if beside else 0)

    @property
    def spread(self) -> Interval | None:
        """Where the published number is expected, where a whole process was measured."""
        return self.spread_by(ERROR_OF_MEMORY)

    def spread_by(self, error: Symbol) -> Interval | None:
        """By the ranges of what the software holds, and how far such predictions lie off."""
        n, beside = self.by.n_accelerators, self.by.beside
        if beside is None:
            return None
        own = leaf("own", "bytes", number(round(self.by.own / n)))
        inside = branch("held", "bytes", [own, beside], times=error).interval
        return None if inside is None else Interval(n * inside.low, n * inside.high, inside.level)

    @property
    def error(self) -> float:
        assert self.published is not None
        return self.predicted / self.published - 1

    @property
    def error_own(self) -> float:
        """With the model's own bytes alone."""
        assert self.published is not None
        return self.by.own / self.published - 1

    @property
    def missing(self) -> float:
        """Bytes per accelerator that were there and are not the model's own."""
        assert self.published is not None
        return (self.published - self.by.own) / self.by.n_accelerators

    @property
    def in_range(self) -> bool | None:
        if self.spread is None or self.published is None:
            return None
        return self.published in self.spread


#: Sources whose "GB" are 2^30 bytes: BigScience's are read off nvidia-smi ("was quickly getting
#: the memory snapshot with nvidia-smi"); Qwen's README gives a 72B model of 144.6e9 bytes, cache
#: included, 144.69.
BINARY = frozenset({"bloom-tr11", "bigscience-v100", "qwen-kv"})


def unit(row: Row) -> float:
    if row["unit"].startswith("percent"):
        return 1
    binary = row["unit"].startswith("GiB") or row["source_family"] in BINARY
    return GIB if binary else GB


def results(rows: Sequence[Row]) -> Iterator[Result | tuple[Row, str]]:
    """Each row as a result, or as the reason why there is none."""
    for row in rows:
        try:
            by = trainer_of(row)(row)
        except Skip as why:
            yield row, str(why)
            continue
        stated = row["peak_mem_per_gpu_gb"]
        published = float(stated) * unit(row) if stated[0].isdigit() else None
        group = row["task"] if row["task"] != "pretrain" else f"recompute {row['recompute']}"
        if row["source_family"] == "litgpt":
            group = f"LoRA, base {row['quantization'].replace('None', 'bf16')}"
        if row["source_family"] == "korthikanti-2022":
            group = row["component"]
        yield Result(row["row_id"], row["source_family"], group, by, published, stated)


def judge_memory(table: Table) -> tuple[Judged, ...]:
    """Every row of a table of memory beside its prediction.

    What the software holds besides is added with its range where a whole process was measured;
    what an allocator handed out, and a paper's own formulas, are met as they are.

    Raises:
        InputError: a row of a known source has a cell that cannot be read.
    """
    found = []
    for row, line in zip(table.rows, table.lines, strict=True):
        try:
            (item,) = results([row])
        except (ValueError, LookupError, ArithmeticError) as error:
            rule = f"has the cells that {row['source_family']} needs, numbers readable"
            raise InputError(
                table.name, [Problem(f"row {line}", row["row_id"], rule, str(error))]
            ) from None
        found.append(_judged(row, item))
    return tuple(found)


def _judged(row: Row, item: Result | tuple[Row, str]) -> Judged:
    if not isinstance(item, Result):
        return Judged(row["row_id"], row["source_family"], row["task"], row["model"], "bytes",
                      None, skipped=item[1])  # fmt: skip
    if item.published is None:
        return Judged(row["row_id"], item.family, item.group, row["model"], "bytes", None,
                      skipped=f"a bound is stated, {item.stated}")  # fmt: skip
    what = "percent" if row["unit"].startswith("percent") else "bytes"
    judged = Judged(row["row_id"], item.family, item.group, row["model"], what, item.published,
                    item.predicted, sort="memory")  # fmt: skip
    spread = item.spread
    return judged if spread is None else replace(judged, low=spread.low, high=spread.high)
