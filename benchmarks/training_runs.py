"""Predicted against published training runs: docs/run-validation.md is what this prints.

    python benchmarks/training_runs.py PATH/TO/training_runs.csv -o docs/run-validation.md

A row is predicted as `isoflop plan train` does and as `isoflop validate --rows` judges: from its model,
its tokens, its machine, and what is known of how it was made
(`src/isoflop/check/published/run_recipes.py`). Beside it stands what was predicted before steps were
timed: the roofline times an assumed utilization. Rows that state too little are listed with the reason.
"""

from __future__ import annotations

import argparse
import csv
import statistics
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TypeAlias

from isoflop.check.published.run_recipes import RECIPES
from isoflop.check.published.runs import LONGEST, plan_of
from isoflop.check.published.shapes import Skip
from isoflop.check.published.table import Cells
from isoflop.plan.assumed import OVERRUN
from isoflop.plan.economics import energy_mwh, tonnes_co2e
from isoflop.plan.training.plan import TrainPlan
from isoflop.plan.training.work import Work, accelerator_seconds
from isoflop.quantity import Node, Symbol
from isoflop.quantity.units import format_count

Row: TypeAlias = dict[str, str]


@dataclass(frozen=True, slots=True)
class Line:
    """One number of one row: published, predicted, and as it was predicted before."""

    row: Row
    predicted: Node
    published: float
    before: float

    @property
    def error(self) -> float:
        return float(self.predicted.value) / self.published - 1

    @property
    def error_before(self) -> float:
        return self.before / self.published - 1

    @property
    def held(self) -> bool:
        interval = self.predicted.interval
        return interval is not None and self.published in interval

    @property
    def source(self) -> str:
        """Who published it: one hand, one way of counting hours."""
        return self.row["source"].split()[0].partition("@")[0]

    @property
    def overrun(self) -> float:
        """What the run took over what is planned without an overrun."""
        assert OVERRUN.given is not None
        return self.published / float(self.predicted.value) * float(OVERRUN.given)

    def __str__(self) -> str:
        interval = self.predicted.interval
        assert interval is not None
        span = f"{format_count(interval.low)} to {format_count(interval.high)}"
        cells = [self.row["row_id"], self.row["model"], self.row["hardware"], format_count(self.published),
                 f"{self.error_before:+.0%}", format_count(self.predicted.value), span, f"{self.error:+.0%}",
                 "yes" if self.held else "no", "" if self.row["verified"] == "yes" else "recalled"]  # fmt: skip
        return f"| {' | '.join(cells)} |"


@cache
def _plan(items: tuple[tuple[str, str], ...]) -> TrainPlan | str:
    try:
        return plan_of(Cells(dict(items), 1))
    except Skip as why:
        return str(why)


def plan(row: Row) -> TrainPlan | str:
    """The plan of a row, or why there is none."""
    return _plan(tuple(row.items()))


def why_not(row: Row) -> str:
    """Why a row has no prediction; empty where it has one."""
    if hours_published(row) is None:
        return "neither hours nor accelerators and days stated"
    found = plan(row)
    return found if isinstance(found, str) else ""


def hours_published(row: Row) -> float | None:
    if row["gpu_hours"]:
        return float(row["gpu_hours"])
    if row["num_gpus"] and row["wall_days"]:
        return 24 * float(row["num_gpus"]) * float(row["wall_days"])
    return None


def nodes_of(found: TrainPlan) -> dict[str, Node]:
    return {
        "hours": found.accelerator_hours,
        "energy": found.energy_mwh,
        "carbon": found.tonnes_co2e,
    }


def before(row: Row, found: TrainPlan) -> dict[str, float]:
    """The same numbers from the table's own tokens at a share of the roofline."""
    arch, chip = found.ask.work.arch, found.cluster.chip
    work = Work(arch, int(float(row["tokens"])), min(arch.max_seq_len, LONGEST))
    hours = accelerator_seconds(work, chip, found.ask.precision) / 3600
    energy = energy_mwh(hours, chip, watts=None, pue=None)
    nodes = {"energy": energy, "carbon": tonnes_co2e(energy, None)}
    return {"hours": float(hours.value), **{n: float(node.value) for n, node in nodes.items()}}


def from_hours(row: Row, name: str) -> float | None:
    """What the row's own hours, watts, PUE and grid give; None where one is not stated."""
    inputs = [hours_published(row), row["power_W_per_gpu"], row["pue"]]
    if name == "carbon":
        inputs.append(row["kgCO2_per_kWh"])
    found = plan(row) if all(inputs) else ""
    if isinstance(found, str):
        return None
    hours = Symbol("accelerator_hours", hours_published(row))
    energy = energy_mwh(hours, found.cluster.chip, watts=float(row["power_W_per_gpu"]),
                        pue=float(row["pue"]))  # fmt: skip
    node = tonnes_co2e(energy, float(row["kgCO2_per_kWh"])) if name == "carbon" else energy
    return float(node.value)


PUBLISHED: dict[str, Callable[[Row], float | None]] = {
    "hours": hours_published,
    "energy": lambda row: float(row["energy_MWh"]) if row["energy_MWh"] else None,
    "carbon": lambda row: float(row["tCO2e"]) if row["tCO2e"] else None,
}

HEAD = """| row | model | machine | published | before | predicted | 90 % range | error | in range | read |
|---|---|---|--:|--:|--:|---|--:|---|---|"""


def lines(rows: list[Row], name: str) -> list[Line]:
    found = []
    for row in rows:
        published, planned = PUBLISHED[name](row), plan(row)
        if published and not why_not(row) and not isinstance(planned, str):
            was = before(row, planned)[name]
            found.append(Line(row, nodes_of(planned)[name], published, was))
    return found


def table(found: list[Line]) -> str:
    sizes = [abs(line.error) for line in found]
    held = sum(line.held for line in found)
    was = statistics.mean(abs(line.error_before) for line in found)
    last = (f"{len(found)} rows: {held} in range; error {statistics.mean(sizes):.0%} on average, "
            f"{statistics.median(sizes):.0%} in the middle, {max(sizes):.0%} at most; before, {was:.0%} "
            "on average.")  # fmt: skip
    return "\n".join([HEAD, *map(str, found), "", last])


def overrun_of(found: list[Line]) -> float:
    """The median of the sources' medians: a source with many runs counts once."""
    sources = {line.source for line in found}
    return statistics.median(
        statistics.median(x.overrun for x in found if x.source == source) for source in sources
    )


def left_out(found: list[Line]) -> str:
    """Each source's hours with the overrun of the others."""
    told = ["| source | runs | its own overrun | the others' | error on average | bias |",
            "|---|--:|--:|--:|--:|--:|"]  # fmt: skip
    errors = []
    for source in sorted({line.source for line in found}):
        own = [line for line in found if line.source == source]
        others = overrun_of([line for line in found if line.source != source])
        off = [others / line.overrun - 1 for line in own]
        told.append(f"| {source} | {len(own)} | {overrun_of(own):.2f} | {others:.2f} | "
                    f"{statistics.mean(map(abs, off)):.0%} | {statistics.mean(off):+.0%} |")  # fmt: skip
        errors += off
    told.append(f"| all | {len(found)} | {overrun_of(found):.2f} | | "
                f"{statistics.mean(map(abs, errors)):.1%} | {statistics.mean(errors):+.1%} |")  # fmt: skip
    return "\n".join([*told, "", f"In the middle {statistics.median(map(abs, errors)):.1%}."])


def inputs(rows: list[Row]) -> Iterator[str]:
    """How each row was planned, and which of it was known."""
    yield "| row | model | accelerators | software | layout | recompute | known |"
    yield "|---|---|--:|---|---|---|---|"
    for row in rows:
        planned = plan(row)
        if why_not(row) or isinstance(planned, str):
            continue
        recipe = RECIPES.get(row["model"].casefold())
        told = {} if recipe is None else {**recipe.cells, **recipe.instead}
        known = sorted({"layout" if n in LAYOUT else WORDS.get(n, n) for n in told})
        cells = [row["row_id"], row["model"], f"{planned.cluster.count:,}", planned.stack or "share of roofline",
                 str(planned.layout), planned.ask.work.recompute, ", ".join(known) or "nothing"]  # fmt: skip
        yield f"| {' | '.join(cells)} |"


#: Cells of a recipe that say the layout, and what others are called.
LAYOUT = {"tp", "pp", "micro_batch", "zero_fsdp"}
WORDS = {
    "num_gpus": "accelerators",
    "global_batch_seqs": "batch",
    "seq_len": "length",
    "stack": "software",
}


def own(rows: list[Row]) -> Iterator[str]:
    """Energy and carbon from each row's own inputs."""
    yield "| row | model | number | published | from its own inputs | error |"
    yield "|---|---|---|--:|--:|--:|"
    for row in rows:
        for name, label in (("energy", "MWh"), ("carbon", "tonnes of CO2e")):
            published, derived = PUBLISHED[name](row), from_hours(row, name)
            if published and derived:
                cells = [row["row_id"], row["model"], label, f"{published:g}", f"{derived:.4g}",
                         f"{derived / published - 1:+.1%}"]  # fmt: skip
                yield f"| {' | '.join(cells)} |"


def page(rows: list[Row]) -> str:
    skipped = [f"- {row['row_id']} {row['model']}: {why}" for row in rows if (why := why_not(row))]
    text = Path(__file__).with_name("training_runs.md").read_text(encoding="utf-8")
    tables = {name: table(lines(rows, name)) for name in PUBLISHED}
    return text.format(
        n_rows=len(rows),
        left_out=left_out(lines(rows, "hours")),
        own="\n".join(own(rows)),
        inputs="\n".join(inputs(rows)),
        skipped="\n".join(skipped),
        **tables,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("rows", type=Path, help="a table of published runs, one row per run")
    parser.add_argument("-o", "--output", type=Path)
    given = parser.parse_args()
    with given.rows.open(encoding="utf-8") as file:
        text = page(list(csv.DictReader(file)))
    if given.output:
        given.output.write_text(text, encoding="utf-8")
    else:
        print(text)


if __name__ == "__main__":
    main()
