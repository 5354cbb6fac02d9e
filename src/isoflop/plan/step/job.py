"""A setting as its messages see it: what is sent how often, and among whom."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TypeAlias

from isoflop.arch import Layer
from isoflop.count.blocks import Part, describe
from isoflop.count.memory_saved import stream_of
from isoflop.count.workload import Workload
from isoflop.hardware.fabric import fabric_of
from isoflop.plan.layout import Layout
from isoflop.plan.network.exchange import Exchange
from isoflop.plan.network.group import Dimension, Group, Ways, groups
from isoflop.plan.step.setting import Setting
from isoflop.quantity import Expr, Symbol, number, where

Groups: TypeAlias = Mapping[Dimension, Group]


@dataclass(frozen=True, slots=True)
class Job:
    """A setting, described, with the symbols that its messages share."""

    setting: Setting
    exchange: Exchange
    root: Part
    ways: Ways
    n_micro: Symbol
    virtual: Symbol
    bytes_activation: Symbol
    bytes_grad: Symbol
    bytes_weight: Symbol
    bytes_dispatch: Symbol
    groups: Groups = field(repr=False)

    @classmethod
    def of(cls, setting: Setting, exchange: Exchange) -> Job:
        layout = setting.layout
        each = 4 if setting.compute in ("fp32", "tf32") else 2

        def width(what: str, given: int | None) -> Symbol:
            return Symbol(f"bytes_{what}", given or each, meaning=f"bytes of one {what} sent")

        return cls(
            setting,
            exchange,
            describe(setting.arch, Workload.train(layout.micro_batch, setting.seq_len)),
            Ways.of(layout),
            Symbol("n_micro_batches", setting.n_micro_batches, meaning="micro-batches per step"),
            Symbol("virtual_pp", layout.virtual, meaning="chunks of layers per stage"),
            width("activation", None),
            width("grad", exchange.bytes_grad),
            width("weight", exchange.bytes_weight),
            width("dispatch", exchange.bytes_dispatch),
            groups(Ways.of(layout), fabric_of(setting.cluster), layout.n_accelerators),
        )

    @property
    def layout(self) -> Layout:
        return self.setting.layout

    @property
    def forwards(self) -> int:
        """How often a layer runs forward; made again whole, it talks again."""
        return 2 if self.setting.recompute == "full" else 1

    @property
    def layers(self) -> list[Part]:
        return [part for part in self.root.parts if part.name in self.setting.arch.kinds]

    def kind(self, part: Part) -> Layer:
        return self.setting.arch.kinds[part.name]

    @property
    def copies(self) -> int:
        """How often a pipeline holds each layer."""
        return 2 if self.layout.schedule == "dualpipe" else 1

    @property
    def ends(self) -> tuple[Expr, Expr]:
        """The share of a pipeline's micro-batches that the rank begins, and that it ends."""
        match self.layout.schedule:
            case "dualpipe":
                return number(1) / 2, number(1) / 2
            case "dualpipev":
                return number(1), number(1)
            case _:
                return where(self.ways.pp - 1, 0, 1), number(1)

    def per_stage(self, part: Part) -> Expr:
        """Layers of a kind that one micro-batch passes on one rank."""
        return part.times / self.ways.pp

    def passes(self, part: Part) -> Expr:
        """Times that a micro-batch goes through a layer of a kind on one rank."""
        return self.n_micro * self.per_stage(part)

    @property
    def stream(self) -> Expr:
        """Bytes of the residual stream of one micro-batch on one context-parallel rank."""
        return stream_of(self.layers[0]) / self.ways.cp * self.bytes_activation

    @property
    def stream_held(self) -> Expr:
        """The part of the stream that one rank holds between sharded matrices."""
        return self.stream / self.ways.tp if self.layout.sequence_parallel else self.stream
