"""Normalisations."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, TypeAlias

from isoflop.arch.rules import Rules


@dataclass(frozen=True, slots=True)
class LayerNorm:
    """Mean and variance removed; `weight` and `bias` say which vectors are trained."""

    eps: float = 1e-5
    weight: bool = True
    bias: bool = True
    kind: Literal["layer_norm"] = "layer_norm"

    def __post_init__(self) -> None:
        Rules(self).real("eps", above=0).close()


@dataclass(frozen=True, slots=True)
class RmsNorm:
    """Root mean square removed (Zhang 2019). `unit_offset` trains weight - 1 (Gemma)."""

    eps: float = 1e-6
    unit_offset: bool = False
    kind: Literal["rms_norm"] = "rms_norm"

    def __post_init__(self) -> None:
        Rules(self).real("eps", above=0).close()


Norm: TypeAlias = LayerNorm | RmsNorm
