"""Predicted against published training runs: docs/run-validation.md is what this prints.

    python benchmarks/training_runs.py PATH/TO/training_runs.csv -o docs/run-validation.md

A row is predicted from its model, its tokens and its machine alone: the roofline times the
assumed utilization that `isoflop plan train` takes where the user says nothing, the rated
watts, the assumed PUE and grid. Rows that state too little are listed with the reason.
"""

from __future__ import annotations

import argparse
import csv
import statistics
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

from isoflop.arch.zoo import entry
from isoflop.hardware import find
from isoflop.hardware.chip import Precision
from isoflop.plan.economics import energy_mwh, tonnes_co2e
from isoflop.plan.training.work import Work, accelerator_seconds
from isoflop.quantity import Node, Symbol, leaf
from isoflop.quantity.units import format_count

Row: TypeAlias = dict[str, str]

#: The table's models by name in the zoo. All were trained on sequences of at most 8,192.
MODELS = {
    "LLaMA-7B": "llama-1-7b", "LLaMA-33B": "llama-1-33b", "OPT-175B": "opt-175b",
    "Llama-2-7B": "llama-2-7b", "Llama-2-70B": "llama-2-70b", "Llama-3-8B": "llama-3-8b",
    "Llama-3-70B": "llama-3-70b", "Llama-3.2-1B": "llama-3.2-1b", "Llama-3.2-3B": "llama-3.2-3b",
    "GPT-3-175B": "gpt3-175b", "PaLM-540B": "palm-540b", "MPT-7B": "mpt-7b",
    "Pythia-12B": "pythia-12b", "Pythia-2.8B": "pythia-2.8b", "Pythia-1.4B": "pythia-1.4b",
    "Pythia-160M": "pythia-160m", "Pythia-70M": "pythia-70m",
}  # fmt: skip
LONGEST = 8192
CHIPS: dict[str, tuple[str, Precision]] = {
    "A100 80GB SXM": ("a100-sxm-80gb", "bf16"), "A100 80GB": ("a100-sxm-80gb", "bf16"),
    "A100 40GB": ("a100-sxm-40gb", "bf16"), "H100 80GB SXM": ("h100-sxm", "bf16"),
    "V100": ("v100-sxm-32gb", "fp16"), "TPU v4": ("tpu-v4", "bf16"),
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Line:
    """One number of one row, predicted and published."""

    row: Row
    predicted: Node
    published: float

    @property
    def error(self) -> float:
        return float(self.predicted.value) / self.published - 1

    @property
    def held(self) -> bool:
        interval = self.predicted.interval
        return interval is not None and self.published in interval

    def __str__(self) -> str:
        interval = self.predicted.interval
        assert interval is not None
        span = f"{format_count(interval.low)} to {format_count(interval.high)}"
        cells = [self.row["row_id"], self.row["model"], self.row["hardware"], format_count(self.published),
                 format_count(self.predicted.value), span, f"{self.error:+.0%}",
                 "yes" if self.held else "no", "" if self.row["verified"] == "yes" else "recalled"]  # fmt: skip
        return f"| {' | '.join(cells)} |"


def why_not(row: Row) -> str:
    """Why a row has no prediction; empty where it has one."""
    if hours_published(row) is None:
        return "neither hours nor accelerators and days stated"
    if not row["tokens"]:
        return "tokens not stated"
    if row["model"] not in MODELS:
        return "no spec of the model in the zoo"
    return "" if row["hardware"] in CHIPS else "more than one kind of accelerator"


def hours_published(row: Row) -> float | None:
    if row["gpu_hours"]:
        return float(row["gpu_hours"])
    if row["num_gpus"] and row["wall_days"]:
        return 24 * float(row["num_gpus"]) * float(row["wall_days"])
    return None


def predictions(row: Row) -> dict[str, Node]:
    """Accelerator-hours, energy and CO2e of a row's model, tokens and machine."""
    arch, (name, precision) = entry(MODELS[row["model"]]).arch, CHIPS[row["hardware"]]
    chip = find(name)
    work = Work(arch, int(float(row["tokens"])), min(arch.max_seq_len, LONGEST))
    hours = accelerator_seconds(work, chip, precision) / 3600
    energy = energy_mwh(hours, chip, watts=None, pue=None)
    return {"hours": leaf("accelerator_hours", "hours", hours), "energy": energy,
            "carbon": tonnes_co2e(energy, None)}  # fmt: skip


def from_hours(row: Row, name: str) -> float | None:
    """What the row's own hours, watts, PUE and grid give; None where one is not stated."""
    inputs = [hours_published(row), row["power_W_per_gpu"], row["pue"]]
    if name == "carbon":
        inputs.append(row["kgCO2_per_kWh"])
    if row["hardware"] not in CHIPS or not all(inputs):
        return None
    hours = Symbol("accelerator_hours", hours_published(row))
    energy = energy_mwh(hours, find(CHIPS[row["hardware"]][0]), watts=float(row["power_W_per_gpu"]),
                        pue=float(row["pue"]))  # fmt: skip
    node = tonnes_co2e(energy, float(row["kgCO2_per_kWh"])) if name == "carbon" else energy
    return float(node.value)


PUBLISHED: dict[str, Callable[[Row], float | None]] = {
    "hours": hours_published,
    "energy": lambda row: float(row["energy_MWh"]) if row["energy_MWh"] else None,
    "carbon": lambda row: float(row["tCO2e"]) if row["tCO2e"] else None,
}

HEAD = """| row | model | machine | published | predicted | 90 % range | error | in range | read |
|---|---|---|--:|--:|---|--:|---|---|"""


def lines(rows: list[Row], name: str) -> list[Line]:
    found = []
    for row in rows:
        published = PUBLISHED[name](row)
        if published and not why_not(row):
            found.append(Line(row, predictions(row)[name], published))
    return found


def table(found: list[Line]) -> str:
    sizes = [abs(line.error) for line in found]
    held = sum(line.held for line in found)
    last = (f"{len(found)} rows: {held} in range; error {statistics.mean(sizes):.0%} on average, "
            f"{statistics.median(sizes):.0%} in the middle, {max(sizes):.0%} at most.")  # fmt: skip
    return "\n".join([HEAD, *map(str, found), "", last])


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
        n_rows=len(rows), own="\n".join(own(rows)), skipped="\n".join(skipped), **tables
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
