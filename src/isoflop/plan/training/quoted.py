"""What others say that training a model takes, derived again from their own inputs.

The rows of quoted.toml: each is one run on one machine with the inputs that its source
states. Figures of one model often come from several machines; read side by side, they are
not those of one run.
"""

from __future__ import annotations

import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from importlib.resources import files
from typing import Any

from isoflop.arch import Arch
from isoflop.arch.zoo import entry
from isoflop.hardware import Cluster, parse_cluster
from isoflop.hardware.chip import Precision as Format
from isoflop.plan.economics import dollars, energy_mwh, price_of, tonnes_co2e
from isoflop.plan.memory.shard import Recompute
from isoflop.plan.training.work import Work, named
from isoflop.quantity import Basis, Expr, Node, Symbol, leaf
from isoflop.quantity.node import plain

#: The inputs that each figure needs, beside the machine.
NEEDS = {
    "flops": ("tokens",),
    "accelerator_hours": ("rate",),
    "days": ("hours",),
    "energy_mwh": ("hours", "watts", "pue"),
    "tonnes_co2e": ("hours", "watts", "pue", "carbon"),
    "dollars": ("hours", "price"),
}


@dataclass(frozen=True, slots=True)
class Figure:
    """One number as it is quoted, and as its own inputs give it.

    `derived` is None where the source leaves out an input, which `missing` names.
    """

    name: str
    quoted: float
    derived: Node | None
    missing: tuple[str, ...] = ()

    @property
    def difference(self) -> float | None:
        """Derived over quoted, less one."""
        return None if self.derived is None else float(self.derived.value) / self.quoted - 1

    def to_json(self) -> dict[str, Any]:
        derived = None if self.derived is None else plain(self.derived.value)
        return {
            "name": self.name,
            "quoted": self.quoted,
            "derived": derived,
            "difference": self.difference,
            "not_stated": list(self.missing),
            "formula": None if self.derived is None else self.derived.size.text,
            "numbers": None if self.derived is None else self.derived.size.digits,
        }


@dataclass(frozen=True, slots=True)
class Stated:
    """One run as its source states it; None where it does not say. A row of quoted.toml."""

    model: str
    by: str
    source: str
    tokens: int
    quoted: Mapping[str, float] = field(hash=False)
    on: str | None = None
    precision: Format = "bf16"
    recompute: Recompute = "none"
    flops: float | None = None
    tflops: float | None = None
    accelerator_hours: float | None = None
    watts: float | None = None
    pue: float | None = None
    price: float | None = None
    carbon: float | None = None

    @property
    def cluster(self) -> Cluster | None:
        return None if self.on is None else parse_cluster(self.on)

    @property
    def inputs(self) -> dict[str, Any]:
        """What the source states, by name."""
        names = ("tokens", "recompute", "flops", "tflops", "accelerator_hours", "watts", "pue",
                 "price", "carbon")  # fmt: skip
        found = {name: getattr(self, name) for name in names}
        return {name: value for name, value in found.items() if value is not None}


@dataclass(frozen=True, slots=True)
class Quoted:
    """What one source says of a model: its machine, its inputs, its figures held against them.

    `flops` are those of the spec, `mfu` the share of peak that stated hours imply.
    """

    stated: Stated
    flops: Node
    mfu: Node | None
    figures: tuple[Figure, ...]

    def to_json(self) -> dict[str, Any]:
        return {
            "by": self.stated.by,
            "source": self.stated.source,
            "machine": self.stated.on,
            "inputs": self.stated.inputs,
            "flops": plain(self.flops.value),
            "mfu_implied": None if self.mfu is None else float(self.mfu.value),
            "figures": [figure.to_json() for figure in self.figures],
        }


def quoted_for(arch: Arch) -> tuple[Quoted, ...]:
    """Everything quoted for a model of the zoo; nothing for any other.

    >>> from isoflop.arch.zoo import entry
    >>> for run in quoted_for(entry("gpt3-175b").arch):
    ...     print(run.stated.by, *(f"{f.name} {f.difference:+.1%}" for f in run.figures))
    Brown 2020 flops +0.1%
    Narayanan 2021 days -0.5%
    Patterson 2021 days -0.1% energy_mwh +0.1% tonnes_co2e +0.1%
    Lambda 2020 accelerator_hours -0.7% dollars +0.7%
    """
    rows = [row for row in stated_runs() if row.model == arch.name]
    return tuple(_derive(row, arch) for row in rows if entry(row.model).arch == arch)


@cache
def stated_runs() -> tuple[Stated, ...]:
    """Every run of quoted.toml."""
    text = files("isoflop.plan.training").joinpath("quoted.toml").read_text(encoding="utf-8")
    return tuple(Stated(**row) for row in tomllib.loads(text)["run"])


def machines(runs: Sequence[Quoted]) -> int:
    """How many different machines are quoted: another chip, number of them, or rate."""
    return len({(r.stated.on, r.stated.tflops) for r in runs if r.stated.on is not None})


def _derive(row: Stated, arch: Arch) -> Quoted:
    work = Work(arch, row.tokens, arch.max_seq_len, "6nd", row.recompute)
    hours = _hours(row, work)
    figures = [_figure(row, name, quoted, work, hours) for name, quoted in row.quoted.items()]
    return Quoted(row, work.flops, _mfu(row, work), tuple(figures))


def _hours(row: Stated, work: Work) -> Expr | None:
    """From the stated rate, or as stated."""
    if row.tflops is not None:
        flops = named("flops_hardware", work.flops_hardware)
        if row.flops is not None:
            flops = Symbol("flops_stated", row.flops, source=row.source)
        return flops / (3600 * Symbol("flops_per_second_achieved", row.tflops * 1e12))
    if row.accelerator_hours is not None:
        return Symbol("accelerator_hours", row.accelerator_hours, source=row.source)
    return None


def _mfu(row: Stated, work: Work) -> Node | None:
    if row.cluster is None or row.accelerator_hours is None:
        return None
    seconds = 3600 * Symbol("accelerator_hours", row.accelerator_hours, source=row.source)
    share = named("flops", work.flops) / (seconds * row.cluster.chip.peak(row.precision))
    return leaf("mfu", "share of peak", share, source="6 N D over the stated hours")


def _figure(row: Stated, name: str, quoted: float, work: Work, hours: Expr | None) -> Figure:
    has = {"rate": row.tflops, "hours": hours}
    needed = {need: has.get(need, getattr(row, need, None)) for need in NEEDS[name]}
    missing = tuple(need for need, value in needed.items() if value is None)
    if missing:
        return Figure(name, quoted, None, missing)
    return Figure(name, quoted, work.flops if name == "flops" else _from_hours(row, name, hours))


def _from_hours(row: Stated, name: str, hours: Expr | None) -> Node:
    cluster = row.cluster
    assert hours is not None, row
    assert cluster is not None, row
    energy = energy_mwh(hours, cluster.chip, watts=row.watts, pue=row.pue)
    match name:
        case "accelerator_hours":
            return leaf(name, "hours", hours, basis=Basis.MODELLED)
        case "days":
            return leaf(name, "days", hours / (24 * cluster.n_accelerators), basis=Basis.MODELLED)
        case "energy_mwh":
            return energy
        case "tonnes_co2e":
            return tonnes_co2e(energy, row.carbon)
        case _:
            return dollars(hours, price_of(cluster.chip, row.price))
