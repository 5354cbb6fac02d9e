"""isoflop validate"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from isoflop.check.published.width import MOST_TOLD
from isoflop.cli.options import Json
from isoflop.cli.output import emit, say
from isoflop.cli.progress import busy
from isoflop.report.text import table

if TYPE_CHECKING:
    from isoflop.check.published.judge import Report
    from isoflop.check.published.missing import Miss
    from isoflop.check.published.score import Judged, Score

#: Rows named in the text as the worst.
MOST_WORST = 5
#: Lines of assumptions in the text; JSON has all of them.
MOST_ASSUMED = 6

WHAT = {"step": "step times", "memory": "memory peaks", "run": "numbers of whole runs"}
HOW = {
    "as shipped": "predicted as isoflop ships",
    "in-sample": "constants refitted to these very rows",
    "source left out": "each source predicted with constants refitted to the others",
    "chip left out": "each chip predicted with constants refitted to the others",
    "model left out": "each quarter of the models predicted with constants refitted to the others",
}
COLUMNS = ["n", "mean", "median", "p90", "max", "bias", "in range", "half-width"]


def validate(*, rows: Path | None = None, as_json: Json = False) -> None:
    """Hold predictions against published measurements: error, range, source by source.

    Parameters
    ----------
    rows
        A CSV file of step times (docs/own-steps.md), memory or whole runs, one row each; without it
        the published step times that isoflop ships with.
    """
    from isoflop.check.published.judge import validate as judge

    with busy("predicting every row, and refitting without each source: some 20 s"):
        report = judge(rows)
    if as_json:
        return emit("validate", report.to_json())
    return say(render(report))


def render(report: Report) -> str:
    """Tables by source and by chip, what else was tried, the worst rows, the assumptions."""
    of = f"{report.overall.n} of {len(report.rows)} {WHAT[report.form]}"
    blocks = [
        f"predicted against published: {of}, {report.source}",
        f"{report.headline}: {HOW[report.headline]}; errors are predicted / measured - 1",
        scores_table("source", [*report.families, replace(report.overall, name="all")]),
        scores_table("memory of" if report.form == "memory" else "chip", report.chips),
    ]
    blocks += [*_lacking(report), *_widths(report)]
    if len(report.methods) > 1:
        blocks.append(scores_table("by other ways", [*report.methods.values(), *report.baselines]))
    blocks += [*_noise(report), *_worst(report.rows), *_footer(report)]
    return "\n\n".join(blocks)


def scores_table(title: str, found: Iterable[Score]) -> str:
    """One line per score that has rows."""
    lines = [
        [f"  {s.name}", str(s.n), *map(percent, (s.mape, s.median, s.p90, s.max)),
         percent(s.bias, "+"), percent(s.coverage), percent(s.width)]
        for s in found if s.n
    ]  # fmt: skip
    return table(lines, [f"  {title}", *COLUMNS], "lrrrrrrrr")


def percent(value: float | None, sign: str = "") -> str:
    """A share as people read it.

    >>> percent(0.1234), percent(-0.05, "+"), percent(None)
    ('12.3 %', '-5.0 %', '-')
    """
    return "-" if value is None else f"{100 * value:{sign}.1f} %"


def _lacking(report: Report) -> Iterator[str]:
    """What is missing where a source's mean error is above its aim, or its errors have a bias."""
    lines = []
    for name, found in report.lacking.items():
        if found.misses:
            lines.append(f"  {name}: {'; '.join(map(_miss, found.misses))}")
        for reason in found.missing:
            lines.append(f"    {percent(reason.bias, '+')} on {counted(reason.rows, 'row')}: {reason.what}")  # fmt: skip
            lines += [f"      source: {reason.source}"] if reason.source else []
    if lines:
        yield "\n".join(["missing physics, where errors show it:", *lines])


def _widths(report: Report) -> Iterator[str]:
    """How wide ranges are where the trainer is known, and where not; what makes them so wide."""
    if report.stacks:
        yield scores_table("ranges", report.stacks)
    lines = []
    for name, parts in report.width_from.items():
        told = [f"    {percent(p.share)} {p.name}: {p.pinned_by}" for p in parts[:MOST_TOLD]]
        lines += [f"  {name}", *told] if told else []
    if lines:
        yield "\n".join(["width comes from: share of its square, and what would pin it", *lines])


def _miss(miss: Miss) -> str:
    if miss.what == "mean":
        return f"mean {percent(miss.value)} of {miss.of}, aim {percent(miss.beyond)}"
    return f"bias {percent(miss.value, '+')}, beyond {percent(miss.beyond)}"


def _noise(report: Report) -> Iterator[str]:
    if report.noise_floor:
        told = [
            f"  {n.name}: {percent(n.median)} in the median, {percent(n.mean)} in the mean of "
            f"{counted(n.n_pairs, 'pair')}"
            for n in report.noise_floor
        ]
        yield "\n".join(["noise floor, neighbouring releases of one configuration:", *told])


def counted(n: int, noun: str) -> str:
    """How many of something.

    >>> counted(1, "row"), counted(12, "row")
    ('1 row', '12 rows')
    """
    return f"{n} {noun}" if n == 1 else f"{n} {noun}s"


def _worst(rows: Iterable[Judged]) -> Iterator[str]:
    found = sorted((r for r in rows if r.error is not None), key=lambda r: -abs(r.error or 0))
    lines = [
        [
            f"  {r.row_id}",
            r.family,
            r.model,
            r.group,
            f"{r.measured:.4g}",
            f"{r.predicted:.4g}",
            percent(r.error, "+"),
        ]
        for r in found[:MOST_WORST]
    ]
    if lines:
        unit = found[0].unit
        yield table(
            lines,
            ["  worst", "source", "model", "on", f"measured, {unit}", "predicted", "error"],
            "llllrrr",
        )


def _footer(report: Report) -> Iterator[str]:
    skipped = Counter(r.skipped for r in report.rows if r.skipped)
    if skipped:
        yield _told("no prediction:", skipped.most_common())
    if report.assumed:
        more = len(report.assumed) - MOST_ASSUMED
        rest = f"\n  and {more} more (--json lists them)" if more > 0 else ""
        title = "assumed where the source says nothing:"
        yield _told(title, report.assumed[:MOST_ASSUMED]) + rest


def _told(title: str, found: Iterable[tuple[str, int]]) -> str:
    lines = [[f"  {counted(n, 'row')}", what] for what, n in found]
    return f"{title}\n{table(lines, align='rl')}"
