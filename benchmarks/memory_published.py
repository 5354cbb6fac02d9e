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
from pathlib import Path

from isoflop.check.published.memory import GB, Result, Row, results


def line(name: str, group: str, found: list[Result]) -> str:
    errors = [r.error for r in found]
    sizes = sorted(abs(e) for e in errors)
    worst = max(found, key=lambda r: abs(r.error))
    cells = [name, group, len(found), f"{statistics.mean(sizes):.1%}", f"{statistics.median(sizes):.1%}",
             f"{sizes[-1]:.1%} ({worst.row})", f"{statistics.mean(errors):+.1%}"]  # fmt: skip
    if found[0].kind == "allocator":
        sizes = [abs(r.error_with_runtime) for r in found]
        missing = sorted(r.missing / GB for r in found)
        cells += [f"{statistics.median(missing):.1f} ({missing[0]:.1f} to {missing[-1]:.1f})",
                  f"{statistics.mean(sizes):.1%}", sum(r.in_range for r in found)]  # fmt: skip
    return f"| {' | '.join(map(str, cells))} |"


HEADS = {
    "formula": """| source | rows of | n | mean | median | largest (row) | mean signed |
|---|---|--:|--:|--:|--:|--:|""",
    "allocator": """| source | rows of | n | mean | median | largest (row) | mean signed | GB missing, median (range) | mean + runtime | in range |
|---|---|--:|--:|--:|--:|--:|--:|--:|--:|""",
}


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


def across(found: list[Result]) -> str:
    """What the 5 to 95 % of one DeepSpeed source's gaps hold of the other's."""
    names = ("bigscience-v100", "bloom-tr11")
    gaps = {name: sorted(r.missing for r in found if r.family == name) for name in names}
    said = []
    for own, other in (names, names[::-1]):
        cuts = statistics.quantiles(gaps[own], n=20)
        held = sum(cuts[0] <= gap <= cuts[-1] for gap in gaps[other])
        said.append(f"{held} of the {len(gaps[other])} of {other}")
    return " and ".join(said)


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
    kept = [r for r in found if r.published is not None]
    text = Path(__file__).with_name("memory_published.md").read_text(encoding="utf-8")
    return text.format(n_rows=len(rows), n_predicted=len(found), formula=table(found, "formula"),
                       allocator=table(found, "allocator"), bounds=bounds(found), skipped=skipped,
                       across=across(kept))  # fmt: skip


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
