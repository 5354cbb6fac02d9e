"""Predicted against published memory: docs/memory-validation.md is what this prints.

    python benchmarks/memory_published.py PATH/TO/memory.csv -o docs/memory-validation.md

The predictions are those of `isoflop validate --rows PATH/TO/memory.csv`
(isoflop.check.published.memory); this lays them out by source and kind. Rows whose settings
are not stated, or whose method isoflop does not model, are listed with the reason instead.
"""

from __future__ import annotations

import argparse
import csv
import statistics
from collections import defaultdict
from dataclasses import dataclass, replace
from math import exp, log
from pathlib import Path

from isoflop.check.published.memory import GB, GIB, Result, results
from isoflop.check.published.trainers import Row
from isoflop.count.memory_stack import ERROR_OF_MEMORY
from isoflop.quantity import Interval


def line(name: str, group: str, found: list[Result]) -> str:
    errors = [r.error for r in found]
    sizes = sorted(abs(e) for e in errors)
    worst = max(found, key=lambda r: abs(r.error))
    cells = [name, group, len(found), f"{statistics.mean(sizes):.1%}", f"{statistics.median(sizes):.1%}",
             f"{sizes[-1]:.1%} ({worst.row})", f"{statistics.mean(errors):+.1%}"]  # fmt: skip
    if found[0].kind == "allocator":
        own = statistics.mean(abs(r.error_own) for r in found)
        asked = [r.in_range for r in found if r.in_range is not None]
        cells += [f"{own:.1%}", f"{sum(asked)} of {len(asked)}" if asked else "-"]
    return f"| {' | '.join(map(str, cells))} |"


HEADS = {
    "formula": """| source | rows of | n | mean | median | largest (row) | mean signed |
|---|---|--:|--:|--:|--:|--:|""",
    "allocator": """| source | rows of | n | mean | median | largest (row) | mean signed | own bytes alone, mean | in range |
|---|---|--:|--:|--:|--:|--:|--:|--:|""",
}

#: What is tried for the one fitted constant, fragments as a share of activations.
TRIED = [share / 100 for share in range(61)]


@dataclass(frozen=True, slots=True)
class Terms:
    """A row per byte published: what is fixed, and what the fitted constant scales."""

    fixed: float
    activations: float

    def error(self, share: float) -> float:
        return abs(self.fixed + share * self.activations - 1)


def processes(found: list[Result]) -> dict[str, list[Terms]]:
    """Rows whose measurement holds the whole process, by source."""
    families: dict[str, list[Terms]] = defaultdict(list)
    for r in found:
        parts = {part.name: part for part in r.by.beside.children} if r.by.beside else {}
        if "fragments" not in parts or r.published is None:
            continue
        fragments = parts["fragments"]
        share = float(fragments.total.symbols()["share_fragments"].value)
        scaled = r.by.n_accelerators * float(fragments.value)
        families[r.family].append(
            Terms((r.predicted - scaled) / r.published, scaled / share / r.published)
        )
    return families


def mean(rows: list[Terms], share: float) -> float:
    return statistics.mean(row.error(share) for row in rows)


def best(families: list[list[Terms]]) -> float:
    """The constant with the least mean error, every source weighing the same."""
    return min(TRIED, key=lambda share: statistics.mean(mean(rows, share) for rows in families))


def left_out(found: list[Result]) -> str:
    """Each source by the constant set on the others alone."""
    families = processes(found)
    lines = ["| source left out | share of fragments | mean error on it | with its own best |",
             "|---|--:|--:|--:|"]  # fmt: skip
    for name, rows in families.items():
        others = best([v for n, v in families.items() if n != name])
        own = best([rows])
        lines.append(f"| {name} | {others:.2f} | {mean(rows, others):.1%} | {mean(rows, own):.1%} ({own:.2f}) |")  # fmt: skip
    whole = best(list(families.values()))
    error = mean([row for rows in families.values() for row in rows], whole)
    return "\n".join([*lines, f"| none | {whole:.2f} | {error:.1%} of all | |"])


#: Share of the peaks that lie as near to their predictions as the spread says, without what the
#: ranges of the software's constants add: as of seconds (check/step_fit.py).
COVERED = 0.85


def spread(families: list[list[Result]]) -> float:
    """How far peaks lie from their predictions, in logarithms, every source weighing the same."""
    away = sorted((abs(log(1 + r.error)), 1 / len(rows)) for rows in families for r in rows)
    weight = 0.0
    for distance, one in away:
        weight += one
        if weight >= COVERED * len(families):
            return distance
    raise ValueError("no rows")


def held_left_out(found: list[Result]) -> str:
    """How many of a source's peaks the ranges hold with the spread set on the others alone."""
    families: dict[str, list[Result]] = defaultdict(list)
    for r in found:
        if r.in_range is not None:
            families[r.family].append(r)
    lines = ["| source left out | spread of the others | held | half-width |", "|---|--:|--:|--:|"]
    total = 0
    for name, rows in families.items():
        wide = spread([v for n, v in families.items() if n != name])
        error = replace(ERROR_OF_MEMORY, spread=Interval(exp(-wide), exp(wide)))
        ranges = [(r, r.spread_by(error)) for r in rows]
        held = sum(r.published in range_ for r, range_ in ranges if range_ and r.published)
        half = statistics.median((i.high - i.low) / 2 / r.predicted for r, i in ranges if i)
        lines.append(f"| {name} | {wide:.3f} | {held} of {len(rows)} | {half:.1%} |")
        total += held
    wide, n = spread(list(families.values())), sum(map(len, families.values()))
    return "\n".join([*lines, f"| **all** | {wide:.3f} | {total} of {n}, {total / n:.0%} | |"])


def unseen() -> tuple[str, str]:
    """Rows that nothing was set on: their errors, and those that ran out of memory."""
    with Path(__file__).with_name("memory_unseen.csv").open(encoding="utf-8") as file:
        rows = list(csv.DictReader(row for row in file if not row.startswith("#")))
    found = [r for r in results(rows) if isinstance(r, Result)]
    measured = [r for r in found if r.published is not None]
    ran_out = [r for r in found if r.published is None]
    said = ", ".join(f"{r.predicted / GIB:.0f} GiB ({r.row})" for r in ran_out)
    return f"{HEADS['allocator']}\n{line('bigscience', 'all', measured)}", said


def table(found: list[Result], kind: str) -> str:
    of_kind = [r for r in found if r.kind == kind and r.published is not None]
    groups: dict[tuple[str, str], list[Result]] = defaultdict(list)
    families: dict[str, list[Result]] = defaultdict(list)
    for r in of_kind:
        groups[r.family, r.group].append(r)
        families[r.family].append(r)
    lines = []
    for name, rows in families.items():
        below = [(g, v) for (f, g), v in groups.items() if f == name]
        lines += [line(name, g, v) for g, v in below] if len(below) > 1 else []
        lines.append(line(f"**{name}**", "all", rows))
    return "\n".join([HEADS[kind], *lines, line("**every source**", "all", of_kind)])


def bounds(found: list[Result]) -> str:
    """Rows that state a bound: what ran out of memory, and what fitted."""
    lines = ["| row | source | stated | predicted | agrees |", "|---|---|---|--:|---|"]
    for r in found:
        if r.published is None:
            room = 40 * GB if r.stated == "OOM" else float(r.stated.lstrip("<")) * GB
            agrees = (r.predicted > room) == (r.stated == "OOM")
            stated = "out of memory at 40 GB" if r.stated == "OOM" else f"{r.stated} GB"
            lines.append(
                f"| {r.row} | {r.family} | {stated} | {r.predicted / GB:.1f} GB | {'yes' if agrees else 'no'} |"
            )
    return "\n".join(lines)


def page(rows: list[Row]) -> str:
    everything = list(results(rows))
    found = [r for r in everything if isinstance(r, Result)]
    left: dict[tuple[str, str], int] = defaultdict(int)
    for item in everything:
        if not isinstance(item, Result):
            left[item[0]["source_family"], item[1]] += 1
    skipped = "\n".join(f"- {name}: {count} rows, {why}" for (name, why), count in left.items())
    text = Path(__file__).with_name("memory_published.md").read_text(encoding="utf-8")
    new, ran_out = unseen()
    return text.format(n_rows=len(rows), n_predicted=len(found), formula=table(found, "formula"),
                       allocator=table(found, "allocator"), bounds=bounds(found), skipped=skipped,
                       left_out=left_out(found), held=held_left_out(found), unseen=new, ran_out=ran_out)  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument(
        "rows", type=Path, help="a table of published memory, one row per measurement"
    )
    parser.add_argument("-o", "--output", type=Path)
    parser.add_argument("--all", action="store_true", help="print every row")
    given = parser.parse_args()
    with given.rows.open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    if given.all:
        for r in results(rows):
            if isinstance(r, Result) and r.published is not None:
                print(
                    f"{r.row} {r.family:18} {r.group:28} {r.predicted / GB:8.2f} {r.published / GB:8.2f} {r.error:+.1%}"
                )
        return
    text = page(rows)
    if given.output:
        given.output.write_text(text, encoding="utf-8")
    else:
        print(text)


if __name__ == "__main__":
    main()
