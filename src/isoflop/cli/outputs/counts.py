"""JSON of models, show, count, explain, compare and hardware."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, ConfigDict

from isoflop.cli.outputs.base import Basis, Command, Interval, Node, Number, Out


class Model(Out):
    name: str
    params: int
    published: int | None
    source: str
    published_source: str
    note: str


class Models(Command):
    models: list[Model]


class Show(Command):
    model: str
    spec: dict[str, Any]


class CountWorkload(Out):
    batch: int
    seq_len: int
    precision: str


class CountParams(Out):
    total: int
    active: int
    embedding: int
    conventions: dict[str, int]
    tree: Node


class CountMemory(BaseModel):
    """Bytes by part; which parts depends on inference or training."""

    model_config = ConfigDict(extra="allow", strict=True)
    bytes_total: Number
    bytes_kv_cache: Number
    bytes_weights: Number
    tree: Node


class CountFlops(Out):
    forward: Number
    training: Number
    training_6n: Number
    convention: str
    conventions: dict[str, Number]
    tree: Node


class CountFinetune(Out):
    rank: int
    targets: list[str]
    base: str | None
    params_trained: int
    share_trained: float
    tree: Node


class Count(Command):
    model: str
    workload: CountWorkload
    params: CountParams
    memory: CountMemory
    flops: CountFlops
    finetune: CountFinetune | None = None


class Quantity(Out):
    quantity: str
    path: str
    unit: str
    value: Number
    formula: str
    numbers: str
    copies: Number
    share: float
    basis: list[Basis]
    source: str
    letters: dict[str, str]


class Explain(Command):
    model: str
    path: str
    quantities: list[Quantity]


class ChipNumber(Out):
    value: Number
    basis: Basis
    source: str
    interval: Interval | None = None
    note: str | None = None


class Chip(Out):
    name: str
    vendor: str
    year: int
    per_node: int
    numbers: dict[str, ChipNumber]
    not_stated: list[str]


class Machine(Out):
    """A node: chips in one machine, and the chips that its fast link joins."""

    name: str
    chip: str
    chips: int
    domain: int
    bytes_per_second_network: ChipNumber | None
    source: str


class Hardware(Command):
    hardware: list[Chip]
    nodes: list[Machine]


class Beside(Out):
    name: str
    params: int
    params_active: int
    n_layers: int
    d_model: int
    max_seq_len: int
    flops_forward_per_token: Number
    flops_training_per_token: Number
    bytes_weights: Number
    bytes_kv_cache: Number


class Compare(Command):
    seq_len: int
    batch: int
    precision: str
    models: list[Beside]
