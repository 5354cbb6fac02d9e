"""Activations made again in backward instead of kept, applied from outside to a built model.

Chen 2016 (1604.06174); what "selective" leaves out is Korthikanti's choice (2022, 2205.05198,
section 5) where attention keeps no scores, as here: what is cheap to make again.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, Literal, TypeAlias, get_args

from torch import nn
from torch.utils.checkpoint import checkpoint

from isoflop.errors import UnknownName
from isoflop.model.experts.module import ExpertStack
from isoflop.model.layer import LayerModule
from isoflop.model.parts import FeedForwardModule

#: none: everything is kept. selective: an activation function's output, and what it makes on
#: the way, is made again. full: a layer keeps its input only.
Recompute: TypeAlias = Literal["none", "selective", "full"]
RECOMPUTES: tuple[Recompute, ...] = get_args(Recompute)


def set_recompute(model: nn.Module, recompute: Recompute) -> None:
    """Let every layer of a model keep or make again what it needs; may be set at any time.

    Losses and gradients stay what they are to the bit, random numbers of dropout too.

    Raises:
        UnknownName: no such policy.
    """
    if recompute not in RECOMPUTES:
        raise UnknownName("recompute", recompute, RECOMPUTES)
    for module in model.modules():
        match module:
            case LayerModule():
                _again(module, "forward", wanted=recompute == "full")
            case FeedForwardModule() | ExpertStack():
                # The product with `down` is not made again: only its input is asked for.
                _again(module, "shrink", wanted=recompute == "selective")


def _again(module: nn.Module, method: str, *, wanted: bool) -> None:
    """Let a method of this one module keep its arguments only, or as its class has it."""
    vars(module).pop(method, None)
    if wanted:
        work: Callable[..., Any] = getattr(module, method)
        vars(module)[method] = partial(checkpoint, work, use_reentrant=False)
