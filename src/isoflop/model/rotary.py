"""Rotary positions (Su 2021, 2104.09864): pairs of a head's numbers, turned by an angle that
grows with the position.

Letters: B batch · T tokens · N heads · H d_head · R d_rotary · P rotated pairs, R / 2.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from isoflop.arch.spec import LinearScaling, Llama3Scaling, Rope
from isoflop.errors import Fault


def rotary_angles(rope: Rope, d_head: int, positions_T: Tensor) -> Tensor:
    """The angle of each position and pair, [T, P], in float64.

    Single precision would be off by 0.06 radians at position 1,000,000.
    """
    d_rotary = rope.d_rotary or d_head
    step_P = torch.arange(0, d_rotary, 2, dtype=torch.float64, device=positions_T.device)
    frequency_P = _scale(rope, rope.theta ** (-step_P / d_rotary))
    return positions_T.double()[:, None] * frequency_P


def _scale(rope: Rope, frequency_P: Tensor) -> Tensor:
    match rope.scaling:
        case None:
            return frequency_P
        case LinearScaling(factor=factor):
            return frequency_P / factor
        case Llama3Scaling() as scaling:
            return _scale_llama3(scaling, frequency_P)
        case _:
            raise Fault(f"no rotary frequencies for {rope.scaling}")


def _scale_llama3(scaling: Llama3Scaling, frequency_P: Tensor) -> Tensor:
    """Llama 3.1: waves that turn often within the original context are kept, rare ones slowed.

    Between `low_freq_factor` and `high_freq_factor` turns the two are mixed.
    """
    turns_P = scaling.original_max_seq_len * frequency_P / (2 * math.pi)
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    kept_P = ((turns_P - low) / (high - low)).clamp(0, 1)
    return frequency_P * (kept_P + (1 - kept_P) / scaling.factor)


@dataclass(frozen=True, slots=True)
class HalfTurn:
    """Pairs (0, P), (1, P + 1), ... (GPT-NeoX, Llama)."""

    cos: Tensor  # [T, 1, R]
    sin: Tensor  # [T, 1, R], its first half negated

    @classmethod
    def of(cls, angles_TP: Tensor, dtype: torch.dtype) -> HalfTurn:
        cos_TP, sin_TP = angles_TP.cos().to(dtype), angles_TP.sin().to(dtype)
        cos_TR, sin_TR = torch.cat((cos_TP, cos_TP), -1), torch.cat((-sin_TP, sin_TP), -1)
        return cls(cos_TR[:, None], sin_TR[:, None])

    def __call__(self, x_BTNR: Tensor) -> Tensor:
        return _turn_halves(x_BTNR.to(self.cos.dtype), self.cos, self.sin).to(x_BTNR.dtype)


class _TurnHalves(torch.autograd.Function):
    """x * cos + swapped x * sin, in place after the swap; its gradient is the turn back.

    Forward and backward of 2048 x 8 heads of 64, single precision, one thread, medians of 21:
    2.0 ms, where autograd through the same line takes 3.3 and out of place 5.3.
    """

    @staticmethod
    def forward(ctx: Any, x_BTNR: Tensor, cos_T1R: Tensor, sin_T1R: Tensor) -> Tensor:
        ctx.save_for_backward(cos_T1R, sin_T1R)
        return _swapped(x_BTNR).mul_(sin_T1R).addcmul_(x_BTNR, cos_T1R)

    @staticmethod
    def backward(ctx: Any, grad_BTNR: Tensor) -> tuple[Tensor, None, None]:
        cos_T1R, sin_T1R = ctx.saved_tensors
        return _swapped(grad_BTNR).mul_(-sin_T1R).addcmul_(grad_BTNR, cos_T1R), None, None


def _swapped(x_BTNR: Tensor) -> Tensor:
    return x_BTNR.roll(x_BTNR.shape[-1] // 2, dims=-1)


_turn_halves: Callable[[Tensor, Tensor, Tensor], Tensor] = _TurnHalves.apply


@dataclass(frozen=True, slots=True)
class NeighbourTurn:
    """Pairs (0, 1), (2, 3), ... (GPT-J): complex numbers times e^(i angle)."""

    turn: Tensor  # [T, 1, P], complex

    @classmethod
    def of(cls, angles_TP: Tensor, dtype: torch.dtype) -> NeighbourTurn:
        turn_TP = torch.polar(torch.ones_like(angles_TP), angles_TP)
        return cls(turn_TP[:, None].to(dtype.to_complex()))

    def __call__(self, x_BTNR: Tensor) -> Tensor:
        wide_BTNP2 = torch.unflatten(x_BTNR.to(self.turn.dtype.to_real()), -1, (-1, 2))
        turned_BTNP = torch.view_as_complex(wide_BTNP2) * self.turn
        return torch.view_as_real(turned_BTNP).flatten(-2).to(x_BTNR.dtype)


@dataclass(frozen=True, slots=True)
class Rotation:
    """The turn of each position, computed once per forward pass for all layers of a kind.

    The first `d_rotary` numbers of a head are turned, the rest passes unchanged.
    """

    d_rotary: int
    turn: HalfTurn | NeighbourTurn

    @classmethod
    def of(cls, rope: Rope, d_head: int, positions_T: Tensor, dtype: torch.dtype) -> Rotation:
        """For queries and keys of `dtype`; turns are kept in at least single precision."""
        angles_TP = rotary_angles(rope, d_head, positions_T)
        kind = NeighbourTurn if rope.interleaved else HalfTurn
        wide = torch.promote_types(dtype, torch.float32)
        return cls(rope.d_rotary or d_head, kind.of(angles_TP, wide))

    def __call__(self, x_BTNH: Tensor) -> Tensor:
        if self.d_rotary == x_BTNH.shape[-1]:
            return self.turn(x_BTNH)
        turned_BTNR = self.turn(x_BTNH[..., : self.d_rotary])
        return torch.cat((turned_BTNR, x_BTNH[..., self.d_rotary :]), dim=-1)
