"""Which backend can do a call, which one does, and why.

Letters: B batch · T query tokens · S key tokens · N heads · H d_head.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from typing import Literal, TypeAlias, get_args

import torch
from torch import Tensor

from isoflop.attention import flash3, sdpa
from isoflop.attention.options import Options
from isoflop.errors import InputError, Problem, UnknownName

Backend: TypeAlias = Literal[
    "auto", "reference", "blockwise", "triangle", "sdpa", "flex", "flash3", "triton"
]
BACKENDS: tuple[Backend, ...] = get_args(Backend)[1:]

#: Up to this many scores per head, PyTorch's kernel on a dense mask beats tiles on a CPU, and
#: up to the smaller number so does every score in memory (benchmarks/attention_cpu.md).
FEW_SCORES = 512 * 512
FEWEST_SCORES = 256 * 256
#: Heads wider than this do not fit the tiles of the Triton kernels.
WIDEST_HEAD = 256

_OWN_NUMBERS = "it draws PyTorch's own random numbers"
_NO_FUSED = "no fused kernel of PyTorch has one"
#: backend -> argument -> why the backend cannot have it.
_LACKS: dict[Backend, dict[str, str]] = {
    "reference": {},
    "blockwise": {},
    "triangle": dict.fromkeys(
        ("sinks", "sinks (learned)", "softcap", "alibi", "bias", "bias (with gradient)",
         "cu_seqlens", "block_mask", "dropout_p", "return_lse"),
        "it knows the causal triangle alone",
    ),
    "sdpa": {
        "softcap": _NO_FUSED,
        "sinks (learned)": _NO_FUSED,
        "return_lse": "PyTorch's function keeps it to itself",
        "dropout_seed": _OWN_NUMBERS,
    },
    "flex": {
        "dropout_p": "FlexAttention has none",
        "bias (with gradient)": "FlexAttention adds its gradient in no fixed order",
        "float64": "its kernels stop at float32",
    },
    "flash3": dict.fromkeys(
        ("sinks", "sinks (learned)", "alibi", "bias", "bias (with gradient)", "cu_seqlens",
         "block_mask", "dropout_p", "return_lse"),
        "FlashAttention-3 is used for plain attention, a window and a softcap",
    ),
    "triton": {"float64": "its kernels stop at float32"},
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Refused:
    """A backend that cannot do a call: what stands in its way, and why."""

    backend: Backend
    what: str
    reason: str

    def __str__(self) -> str:
        return f"{self.backend}: {self.what}: {self.reason}"


@dataclass(frozen=True, slots=True)
class Choice:
    """The backend that runs, why, and which others could not."""

    backend: Backend
    reason: str
    refused: tuple[Refused, ...] = ()

    def __str__(self) -> str:
        return "\n".join([f"{self.backend}: {self.reason}", *(f"not {r}" for r in self.refused)])


def choose(backend: Backend, q_BTNH: Tensor, k_BSKH: Tensor, options: Options) -> Choice:
    """The backend for a checked call.

    Raises:
        UnknownName: no such backend.
        InputError: the backend asked for cannot do what is asked of it.
    """
    if backend != "auto" and backend not in BACKENDS:
        raise UnknownName("attention backend", str(backend), get_args(Backend))
    if backend == "auto":
        for candidate, reason in _preferred(q_BTNH, k_BSKH, options):
            if next(refusals(candidate, q_BTNH, k_BSKH, options), None) is None:
                return Choice(candidate, reason)
    refused = tuple(refusals(backend, q_BTNH, k_BSKH, options))
    if refused:
        hint = f"use backend {choose('auto', q_BTNH, k_BSKH, options).backend}"
        rule = "can do the call, but not with {}: {}"
        raise InputError(
            "attention",
            [Problem("backend", backend, rule.format(r.what, r.reason), hint) for r in refused],
        )
    return Choice(backend, "asked for")


def refusals(
    backend: Backend, q_BTNH: Tensor, k_BSKH: Tensor, options: Options
) -> Iterator[Refused]:
    """Everything that keeps a backend from a call; nothing when it can do it."""
    lacks = _LACKS[backend]
    if lacks:
        asked = (what for what in _asked(q_BTNH, options) if what in lacks)
        yield from (Refused(backend, what, lacks[what]) for what in asked)
    if backend in ("flex", "flash3", "triton"):
        yield from (Refused(backend, *why) for why in _OBSTACLES[backend](q_BTNH, options))
    if backend == "triangle" and not sdpa.triangle_alone(q_BTNH.shape[1], k_BSKH.shape[1], options):
        yield Refused(backend, "shape", "it knows the square causal triangle alone")


def _asked(q_BTNH: Tensor, options: Options) -> Iterator[str]:
    """The arguments of a call that not every backend has."""
    bias, dropout = options.bias, options.dropout
    given = {
        "sinks": options.sinks.tokens > 0,
        "sinks (learned)": options.sinks.logits is not None,
        "softcap": options.softcap is not None,
        "alibi": options.alibi is not None,
        "bias": bias is not None,
        "bias (with gradient)": bias is not None and bias.requires_grad,
        "cu_seqlens": options.packed is not None,
        "block_mask": options.block_mask is not None,
        "dropout_p": dropout is not None,
        "dropout_seed": dropout is not None and dropout.seed is not None,
        "return_lse": options.return_lse,
        "float64": q_BTNH.dtype == torch.float64,
    }
    return (name for name, is_given in given.items() if is_given)


def _preferred(q_BTNH: Tensor, k_BSKH: Tensor, options: Options) -> tuple[tuple[Backend, str], ...]:
    """Backends, fastest first, each with the reason if it is taken; the last can do all."""
    n_queries, n_keys = longest(q_BTNH, k_BSKH, options)
    fits = not sdpa.needs_mask(n_queries, n_keys, options)
    if q_BTNH.is_cuda:
        return _preferred_on_gpu(fits=fits)
    few, fewest = (n_queries * n_keys <= limit for limit in (FEW_SCORES, FEWEST_SCORES))
    order: list[tuple[Backend, str]] = []
    if few and q_BTNH.dtype == torch.bfloat16 and q_BTNH.device.type == "cpu":
        order.append(("triangle", f"at most {FEW_SCORES} scores a head, in bfloat16"))
    # With dropout a CPU has no fused kernel: SDPA would hold every score.
    if fits and options.dropout is None:
        order.append(("sdpa", "the fused kernel of this device"))
    elif few:
        order.append(("sdpa", f"at most {FEW_SCORES} scores a head: a dense mask costs little"))
    if fewest:
        order.append(("reference", f"at most {FEWEST_SCORES} scores a head: cheapest all at once"))
    order.append(("blockwise", "tile by tile: memory grows with tokens, not with their pairs"))
    return tuple(order)


def _preferred_on_gpu(*, fits: bool) -> tuple[tuple[Backend, str], ...]:
    plain: tuple[tuple[Backend, str], ...] = (
        ("flash3", "FlashAttention-3 is installed, the fastest for this on Hopper"),
        ("sdpa", "PyTorch's fused kernel (cuDNN's first on Hopper)"),
    )
    return (
        *(plain if fits else ()),
        ("triton", "own kernels: what no library's plain kernel can do"),
        ("flex", "FlexAttention: the mask is compiled into a kernel"),
        ("blockwise", "tile by tile in PyTorch operations: no kernel here can do it"),
    )


def longest(q_BTNH: Tensor, k_BSKH: Tensor, options: Options) -> tuple[int, int]:
    """Queries and keys of the longest sequence."""
    if options.packed is None:
        return q_BTNH.shape[1], k_BSKH.shape[1]
    n_queries, n_keys = options.packed.lengths()
    return max(n_queries), max(n_keys)


@cache
def _installed(package: str) -> bool:
    return find_spec(package) is not None


def _flex_obstacles(q_BTNH: Tensor, _: Options) -> Iterator[tuple[str, str]]:
    if not q_BTNH.is_cuda:
        yield "device", f"FlexAttention has no backward on {q_BTNH.device.type}"


def _flash3_obstacles(q_BTNH: Tensor, _: Options) -> Iterator[tuple[str, str]]:
    if not q_BTNH.is_cuda or torch.cuda.get_device_capability(q_BTNH.device)[0] != 9:
        yield "device", "FlashAttention-3 is written for Hopper GPUs"
    if not _installed(flash3.PACKAGE):
        yield "package", f"{flash3.PACKAGE} is not installed"
    if q_BTNH.dtype not in (torch.float16, torch.bfloat16):
        yield "dtype", f"FlashAttention-3 takes half precision, not {q_BTNH.dtype}"


def _triton_obstacles(q_BTNH: Tensor, options: Options) -> Iterator[tuple[str, str]]:
    if not _installed("triton"):
        yield "package", "triton is not installed (pip install 'isoflop[triton]')"
    if not q_BTNH.is_cuda and os.environ.get("TRITON_INTERPRET") != "1":
        yield (
            "device",
            f"Triton has no kernels for {q_BTNH.device.type} (TRITON_INTERPRET=1 to test)",
        )
    if q_BTNH.shape[-1] > WIDEST_HEAD:
        yield "head size", f"its tiles hold at most {WIDEST_HEAD}, not {q_BTNH.shape[-1]}"
    size = None if options.block_mask is None else options.block_mask.size
    if size is not None and (size < 16 or size & (size - 1)):
        yield "block_mask", f"its tiles divide powers of two from 16, not {size}"


_OBSTACLES = {
    "flex": _flex_obstacles,
    "flash3": _flash3_obstacles,
    "triton": _triton_obstacles,
}
