"""How rotary positions reach further than they were trained for.

Letters: B batch · T tokens · R rotated numbers of a head · P rotated pairs, R / 2.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from isoflop.arch.spec import (
    DynamicScaling,
    LinearScaling,
    Llama3Scaling,
    LongRopeScaling,
    Rope,
    RopeScaling,
    YarnScaling,
)


def turns_outdated(scaling: RopeScaling | None, max_seq_len: int, first: int, last: int) -> bool:
    """Whether a text whose last position goes from `first` to `last` turns its first tokens anew.

    >>> [turns_outdated(DynamicScaling(2.0), 8, 5, last) for last in (7, 8)]
    [False, True]
    """
    match scaling:
        case LongRopeScaling(original_max_seq_len=original):
            return first < original <= last
        case DynamicScaling():
            return last > first and last >= max_seq_len
    return False


def frequencies(rope: Rope, d_rotary: int, positions: Tensor, max_seq_len: int) -> Tensor:
    """Radians per position of each pair in float64: [P], or [B, 1, P] for positions [B, T].

    Two scalings depend on how far each text reaches, its last position (`turns_outdated`);
    `max_seq_len` is the longest that the model was made for.
    """
    share_P = torch.arange(0, d_rotary, 2, dtype=torch.float64, device=positions.device) / d_rotary
    frequency_P: Tensor = rope.theta**-share_P
    match rope.scaling:
        case None:
            return frequency_P
        case LinearScaling(factor=factor):
            return frequency_P / factor
        case Llama3Scaling() as scaling:
            return _slow(frequency_P, _kept_llama3(scaling, frequency_P), scaling.factor)
        case YarnScaling() as scaling:
            kept_P = _kept_yarn(scaling, rope.theta, d_rotary, share_P * d_rotary / 2)
            return _slow(frequency_P, kept_P, scaling.factor)
        case LongRopeScaling() as scaling:
            is_long = _last(positions) >= scaling.original_max_seq_len
            short_P, long_P = map(share_P.new_tensor, (scaling.short_factor, scaling.long_factor))
            return frequency_P / torch.where(is_long, long_P, short_P)
        case DynamicScaling(factor=factor):
            reach = (_last(positions) + 1).double().clamp(min=max_seq_len) / max_seq_len
            stretch = (factor * reach - (factor - 1)) ** (d_rotary / (d_rotary - 2))
            slowed_P: Tensor = frequency_P * stretch**-share_P
            return slowed_P


def _last(positions: Tensor) -> Tensor:
    """The last position of each text, to be broadcast over its tokens and pairs."""
    last = positions.amax(-1)
    return last if positions.dim() == 1 else last[:, None, None]


def amplitude(scaling: RopeScaling | None, max_seq_len: int) -> float:
    """What turned queries and keys are multiplied by, each."""
    match scaling:
        case YarnScaling(attention_factor=None) as yarn:
            if yarn.mscale and yarn.mscale_all_dim:
                whole = yarn_temperature(yarn.factor, yarn.mscale_all_dim)
                return yarn_temperature(yarn.factor, yarn.mscale) / whole
            return yarn_temperature(yarn.factor)
        case LongRopeScaling(attention_factor=None, original_max_seq_len=original):
            longer = max_seq_len / original
            return math.sqrt(1 + math.log(longer) / math.log(original)) if longer > 1 else 1.0
        case YarnScaling(attention_factor=stated) | LongRopeScaling(attention_factor=stated):
            return 1.0 if stated is None else stated
        case _:
            return 1.0


def yarn_temperature(factor: float, mscale: float = 1.0) -> float:
    """0.1 ln(factor) + 1 (YaRN: Peng 2023, 2309.00071, equation 22); DeepSeek's mscale is 0.1's.

    >>> round(yarn_temperature(40.0, 0.707), 4)
    1.2608
    """
    return 0.1 * mscale * math.log(factor) + 1.0


def _slow(frequency_P: Tensor, kept_P: Tensor, factor: float) -> Tensor:
    """Slowed by `factor`, but for the share of each that is kept."""
    return frequency_P * (kept_P + (1 - kept_P) / factor)


def _kept_llama3(scaling: Llama3Scaling, frequency_P: Tensor) -> Tensor:
    """Llama 3.1: waves that turn often within the original context are kept, rare ones slowed.

    Between `low_freq_factor` and `high_freq_factor` turns the two are mixed.
    """
    turns_P = scaling.original_max_seq_len * frequency_P / (2 * math.pi)
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    return ((turns_P - low) / (high - low)).clamp(0, 1)


def _kept_yarn(scaling: YarnScaling, theta: float, d_rotary: int, pair_P: Tensor) -> Tensor:
    """As Llama 3.1, but mixed evenly over the pairs between those two turns (section 3.2)."""

    def pair_of(turns: float) -> float:
        wavelength = scaling.original_max_seq_len / (2 * math.pi * turns)
        return d_rotary * math.log(wavelength) / (2 * math.log(theta))

    first, last = pair_of(scaling.beta_fast), pair_of(scaling.beta_slow)
    if scaling.truncate:
        first, last = math.floor(first), math.ceil(last)
    # The bounds are transformers', as is the last one in rotated numbers, not pairs.
    first, last = max(first, 0), min(last, d_rotary - 1)
    return 1 - ((pair_P - first) / ((last - first) or 0.001)).clamp(0, 1)
