"""docs/validation.md: what `isoflop validate` says of its own table and of larger ones.

    python benchmarks/validation_page.py [FOLDER] -o docs/validation.md

FOLDER holds training_throughput.csv, memory.csv and training_runs.csv; without it the page
says nothing of larger tables.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable
from pathlib import Path

from isoflop.check.published import Report, Score, validate
from isoflop.cli.validate import percent, render

TABLES = ("training_throughput.csv", "memory.csv", "training_runs.csv")
HEAD = """| | rows | mean | median | p90 | largest | bias | in range | half-width |
|---|--:|--:|--:|--:|--:|--:|--:|--:|"""


def markdown(found: Iterable[Score]) -> str:
    lines = [
        f"| {s.name} | {s.n} | {percent(s.mape)} | {percent(s.median)} | {percent(s.p90)} "
        f"| {percent(s.max)} | {percent(s.bias, '+')} | {percent(s.coverage)} | {percent(s.width)} |"
        for s in found
        if s.n
    ]
    return "\n".join([HEAD, *lines])


def section(report: Report) -> str:
    left = sum(bool(r.skipped) for r in report.rows)
    ways = [*report.methods.values(), *report.baselines]
    noise = [
        f"Noise floor, {n.name}: {percent(n.median)} in the median, {percent(n.mean)} in the mean "
        f"of {n.n_pairs} pairs of releases."
        for n in report.noise_floor
    ]
    parts = [
        f"### {report.source}",
        f"{len(report.rows)} rows, {left} without a prediction. By source, {report.headline}:",
        markdown(report.families),
        "All rows:",
        markdown(ways),
        *noise,
    ]
    return "\n\n".join(parts)


def page(folder: Path | None) -> str:
    text = Path(__file__).with_suffix(".md").read_text(encoding="utf-8")
    larger = [] if folder is None else [section(validate(folder / name)) for name in TABLES]
    shown = "\n\n".join(larger) or "None was at hand when this page was written."
    return text.format(shipped=render(validate()), larger=shown)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("folder", type=Path, nargs="?", help="where the larger tables are")
    parser.add_argument("-o", "--output", type=Path, required=True)
    given = parser.parse_args()
    given.output.write_text(page(given.folder), encoding="utf-8")


if __name__ == "__main__":
    main()
