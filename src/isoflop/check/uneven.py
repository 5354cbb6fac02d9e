"""Mixtures where shapes depend on data: a small model routes tokens as it likes, and every
product that is really made is counted.

The meta device knows no choices, so there a mixture is counted as if its load were even.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from isoflop.arch import Arch
from isoflop.arch.spec import Attention, Embedding, Experts, Head, Layer, RmsNorm, Wiring
from isoflop.check.paths import tree_path
from isoflop.check.row import Row, leaf_values, rows
from isoflop.check.work import count_flops
from isoflop.count import Workload, flops_backward, flops_forward
from isoflop.model import build

#: Widths of the small model; how many experts there are and work on a token stays.
D_MODEL, D_FF, D_SHARED, VOCAB = 16, 6, 10, 61
BATCH, SEQ_LEN = 2, 24


def uneven_rows(arch: Arch) -> Iterator[Row]:
    """FLOPs of each mixture, forward and backward together, in a real run of a small model."""
    small = small_mixtures(arch)
    if small is None:
        return
    work = Workload.train(BATCH, SEQ_LEN)
    both = (flops_forward(small, work), flops_backward(small, work))
    derived = _of_mixtures(*map(leaf_values, both))
    with OneByOne():
        found = count_flops(build(small), (some_tokens(),) * 2)
    built = _of_mixtures(*(_by_path(small, flops) for flops in found))
    yield from rows("flops_uneven", derived, built)


def small_mixtures(arch: Arch) -> Arch | None:
    """A narrow model with one layer of each kind that has a mixture; None where none has."""
    layers = tuple(_small(x) for x in arch.kinds.values() if isinstance(x.feed_forward, Experts))
    if not layers:
        return None
    return Arch(arch.name, D_MODEL, VOCAB, SEQ_LEN, Embedding(VOCAB), layers, Head(), RmsNorm())


def _small(layer: Layer) -> Layer:
    experts = layer.feed_forward
    assert isinstance(experts, Experts)
    shared = experts.shared
    return replace(
        layer,
        attention=Attention(n_heads=2, n_kv_heads=2, d_head=8),
        cross=None,
        wiring=Wiring.PRE,
        feed_forward=replace(
            experts,
            expert=replace(experts.expert, d_ff=D_FF),
            shared=None if shared is None else replace(shared, d_ff=D_SHARED),
        ),
    )


def some_tokens() -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(VOCAB, (BATCH, SEQ_LEN), generator=generator)


def _by_path(arch: Arch, flops: Mapping[str, int]) -> dict[str, int]:
    found: dict[str, int] = defaultdict(int)
    for name, value in flops.items():
        found[tree_path(name, arch)] += value
    return found


def _of_mixtures(*passes: Mapping[str, int]) -> dict[str, int]:
    found: dict[str, int] = defaultdict(int)
    for path, value in (item for flops in passes for item in flops.items()):
        if "/feed_forward/" in path and value:
            found[path] += value
    return found


class OneByOne(TorchFunctionMode):
    """An expert's product is a product of its own rows, which PyTorch counts as it is made."""

    def __torch_function__(
        self, func: Any, _types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if func is not torch.ops.isoflop.grouped_linear.default:
            return func(*args, **(kwargs or {}))
        x_RX, weight_EYX, ends_E = args
        rows_of = x_RX.tensor_split(ends_E[:-1].tolist())
        return torch.cat([x @ w_YX.T for x, w_YX in zip(rows_of, weight_EYX, strict=True)])
