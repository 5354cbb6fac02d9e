"""Initial weights by name."""

from __future__ import annotations

import hashlib
from collections import defaultdict
from dataclasses import dataclass
from typing import Literal, TypeAlias

import torch
from torch import Tensor, nn

from isoflop.errors import UnknownName
from isoflop.model.attention.grouped import DistanceBiases, SinkLogits
from isoflop.model.experts import Router
from isoflop.model.layer import LayerModule
from isoflop.model.parts import (
    HeadModule,
    LayerNormModule,
    LearnedPositions,
    RmsNormModule,
    TokenVectors,
)
from isoflop.model.relative_bias import RelativeBiasModule
from isoflop.model.vision_tower import ClassToken

#: What has one axis that grows with the width of a model (Yang 2022, 2203.03466, section 4).
VECTORS = (
    TokenVectors,
    LearnedPositions,
    HeadModule,
    Router,
    DistanceBiases,
    SinkLogits,
    RelativeBiasModule,
    ClassToken,
)
#: What these give is added to the residual stream.
WRITE_TO_STREAM = (
    ".attention.out",
    ".cross.out",
    ".feed_forward.down",
    ".experts.down",
    ".shared.down",
)


@dataclass(frozen=True, slots=True)
class Normal:
    """Normal with one deviation, that of what writes to the residual stream / sqrt(2 L).

    GPT-2 (Radford 2019, section 2.3: 0.02) and Megatron-LM, whose `--init-method-std` is the
    deviation, 0.02 when not given (megatron/core/utils.py, init_method_normal and
    scaled_init_method_normal).
    """

    deviation: float = 0.02

    def of(self, module: nn.Module, weight: Tensor, n_writing: int | None) -> float:
        return self.deviation if n_writing is None else self.deviation * n_writing**-0.5


@dataclass(frozen=True, slots=True)
class MaximalUpdate:
    """muP's initial weights (Yang 2022, 2203.03466, table 8): matrices by their fan-in.

    Variance 1 / fan_in where both axes grow with the width; `deviation` at any width for
    embeddings, head and other vectors. A router gives few numbers and has no multiplier, so it is
    drawn as table 3 draws an output, with variance 1 / fan_in^2. The rest of the table is the
    spec's and the trainer's: logits times base width / width (`Head.scale`), scores times
    sqrt(base d_head) / d_head (`Attention.scale`), Adam's rate of matrices and routers times base
    width / width (`Recipe.mup_base_width`).
    """

    deviation: float = 0.02

    def of(self, module: nn.Module, weight: Tensor, n_writing: int | None) -> float:
        fan_in = int(weight.shape[-1])
        if isinstance(module, Router):
            return 1 / fan_in
        return self.deviation if isinstance(module, VECTORS) else float(fan_in**-0.5)


Initial: TypeAlias = Normal | MaximalUpdate
InitialName: TypeAlias = Literal["gpt2", "megatron", "mup"]
INITIAL: dict[str, Initial] = {"gpt2": Normal(), "megatron": Normal(), "mup": MaximalUpdate()}


@torch.no_grad()
def initialise(model: nn.Module, seed: int = 0, init: InitialName | Initial = "gpt2") -> None:
    """Draw every weight afresh: biases and score corrections 0, norms 1, all else normal as `init` says.

    A tensor's draw depends on `seed` and its name alone: not on the device, the number of
    threads, or which other tensors exist.

    Raises:
        UnknownName: no initialisation of that name.
    """
    how = init if isinstance(init, Initial) else initial(init)
    blocks = _blocks(model)
    for module_name, module in model.named_modules():
        if isinstance(module, Router) and module.correction is not None:
            module.correction.zero_()
        writes = module_name.endswith(WRITE_TO_STREAM)
        n_writing = blocks[stack_of(module_name)] if writes else None
        for name, weight in module.named_parameters(recurse=False):
            if name == "bias":
                weight.zero_()
            elif isinstance(module, LayerNormModule | RmsNormModule):
                weight.fill_(0.0 if getattr(module, "unit_offset", False) else 1.0)
            else:
                deviation = how.of(module, weight, n_writing)
                _draw(weight, f"{module_name}.{name}", seed, deviation)


def _blocks(model: nn.Module) -> dict[str, int]:
    """How many blocks write to the residual stream of each stack of layers."""
    count: dict[str, int] = defaultdict(int)
    for name, layer in model.named_modules():
        if isinstance(layer, LayerModule):
            count[stack_of(name)] += layer.n_blocks
    return count


def stack_of(name: str) -> str:
    """The stack that a module inside it belongs to.

    >>> stack_of("encoder.layers.3.attention.out")
    'encoder.layers'
    """
    return f"{name.partition('layers.')[0]}layers"


def initial(name: str) -> Initial:
    """The initialisation of that name.

    >>> initial("megatron")
    Normal(deviation=0.02)

    Raises:
        UnknownName: there is none; lists the names.
    """
    if name not in INITIAL:
        raise UnknownName("initialisation", name, INITIAL)
    return INITIAL[name]


def _draw(weight: Tensor, path: str, seed: int, deviation: float) -> None:
    digest = hashlib.blake2b(f"{seed}:{path}".encode(), digest_size=8).digest()
    stream = torch.Generator().manual_seed(int.from_bytes(digest) >> 1)
    weight.copy_(torch.empty(weight.shape).normal_(0.0, deviation, generator=stream))
