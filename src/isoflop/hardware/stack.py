"""The software that trains: which kernels it runs, what it overlaps, how far off it stays.

Equal layouts differ by a factor of 1.15 to 1.25 between trainers, and mixtures of experts
doubled their speed within a year of releases: the stack is an input like the chip.
"""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from importlib import resources
from typing import Any, Literal, TypeAlias, get_args

from isoflop.errors import InputError, Problem, UnknownName
from isoflop.hardware.fitted import Beliefs, shipped
from isoflop.quantity import Basis, Symbol

#: `unfused` writes every score to memory; the others keep scores on the chip.
Kernel: TypeAlias = Literal["unfused", "flash1", "flash2", "flash3", "cudnn"]


#: What each uncertain number of a stack is, as plans list it.
MEANINGS = {
    "expert_imbalance": "tokens of the busiest rank's experts over the mean",
    "seconds_host_layer": "time of the host to issue one dense layer of one micro-batch, both ways",
    "seconds_host_experts": "time of the host to issue one layer of experts, both ways",
    "share_sorting": "traffic of putting tokens in their experts' order, over each copy moved twice each way",
    "share_elementwise": "traffic of norms, activations and sums over what they move unfused",
    "slowed": "seconds of a step over those of a machine in order",
    "residual": "measured over predicted seconds of a step, from trainer to trainer",
}


@dataclass(frozen=True, slots=True)
class Stack:
    """A trainer's software, by name and release.

    Attributes:
        schedules: the orders in which its pipelines can work, by a layout's names of them.
        attention: the kernel of scores and weighted values.
        dropout: whether probabilities and outputs of blocks are dropped out in training.
        overlaps_tensor: tensor-parallel collectives run beside matrix products.
        overlaps_data: gradients are reduced, and weights gathered, beside backward and forward.
        overlaps_experts: the experts' exchange runs beside another micro-batch's work.
        once_per_domain: a token goes to a domain once, not once per expert there (DeepEP).
        recompute_stops_early: a layer that is made again stops once all that backward needs is
            there, so what its last product writes is never made (PyTorch's checkpoint from 2.1
            on, where it is not reentrant).
        experts_padded: each expert takes as many tokens as its capacity, more are dropped: the
            host need not read back how many there are.
        bytes_grad: bytes per gradient in the reduction over data-parallel copies.
        expert_imbalance: tokens of the busiest rank's experts over the mean.
        seconds_host_layer: time that the host needs to issue one dense layer of one
            micro-batch, both ways; the accelerator waits where it is faster.
        seconds_host_experts: the same for a layer of experts, where the host must first
            read back how many tokens each expert has.
        share_sorting: traffic of putting tokens in their experts' order, over each copy
            read and written twice each way.
        share_elementwise: traffic of norms, activations and sums over what they move when
            each runs alone: below 1 where kernels are fused.
        slowed: seconds of a step over those of a machine in order, where one is known not to be.
        residual: measured over predicted seconds of this stack, with its 90 % range.

    Raises:
        InputError: an unknown kernel, or gradients of other than 2 or 4 bytes.
    """

    name: str
    schedules: tuple[str, ...]
    attention: Kernel
    dropout: bool
    overlaps_tensor: bool
    overlaps_data: bool
    overlaps_experts: bool
    once_per_domain: bool
    recompute_stops_early: bool
    experts_padded: bool
    bytes_grad: int
    expert_imbalance: Symbol
    seconds_host_layer: Symbol
    seconds_host_experts: Symbol
    share_sorting: Symbol
    share_elementwise: Symbol
    slowed: Symbol
    residual: Symbol
    source: str

    def __post_init__(self) -> None:
        bad = []
        if self.attention not in get_args(Kernel):
            rule = f"is one of {', '.join(get_args(Kernel))}"
            bad.append(Problem("attention", self.attention, rule))
        if self.bytes_grad not in (2, 4):
            bad.append(Problem("bytes_grad", self.bytes_grad, "is 2 or 4"))
        if bad:
            raise InputError(f"stack {self.name}", bad)


def find_stack(name: str, beliefs: Beliefs | None = None) -> Stack:
    """The stack called `name`, upper or lower case.

    Raises:
        UnknownName: no such stack; the near names are listed.

    >>> find_stack("megatron-2021").attention
    'unfused'
    """
    rows, folded = _rows(), name.strip().casefold()
    if folded not in rows:
        raise UnknownName("stack", name, rows, hint="`unknown` stands for any other")
    return _stack(_own(folded, rows), _whole(folded, rows), beliefs or shipped())


def stack_names() -> tuple[str, ...]:
    """Every stack's name.

    >>> "unknown" in stack_names()
    True
    """
    return tuple(_rows())


@cache
def _rows() -> Mapping[str, Any]:
    text = resources.files("isoflop.hardware").joinpath("stacks.toml").read_text("utf-8")
    return dict(tomllib.loads(text)["stack"])


def _own(name: str, rows: Mapping[str, Any]) -> str:
    """Whose uncertain numbers a row has: another's where it says so, or says nothing else."""
    row = rows[name]
    same = row.get("numbers", row["like"] if row.keys() == {"like"} else None)
    return name if same is None else _own(same, rows)


def _whole(name: str, rows: Mapping[str, Any]) -> Mapping[str, Any]:
    """A row with the fields that it takes from the row it is like."""
    row = rows[name]
    return {**_whole(row["like"], rows), **row} if "like" in row else row


def _stack(name: str, row: Mapping[str, Any], beliefs: Beliefs) -> Stack:
    def number(field: str) -> Symbol:
        key, meaning = f"{field}_{name}", MEANINGS[field]
        return beliefs.symbol(key, row[field], Basis.ASSUMED, row["source"], meaning)

    return Stack(
        name=name,
        schedules=tuple(row["schedules"]),
        attention=row["attention"],
        dropout=row["dropout"],
        overlaps_tensor=row["overlaps_tensor"],
        overlaps_data=row["overlaps_data"],
        overlaps_experts=row["overlaps_experts"],
        once_per_domain=row["once_per_domain"],
        recompute_stops_early=row["recompute_stops_early"],
        experts_padded=row["experts_padded"],
        bytes_grad=row["bytes_grad"],
        expert_imbalance=number("expert_imbalance"),
        seconds_host_layer=number("seconds_host_layer"),
        seconds_host_experts=number("seconds_host_experts"),
        share_sorting=number("share_sorting"),
        share_elementwise=number("share_elementwise"),
        slowed=number("slowed"),
        residual=number("residual"),
        source=row["source"],
    )
