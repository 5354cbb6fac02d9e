"""One product for many experts: rows that stand in groups, each group with a matrix of its own.

Two operators registered with PyTorch, so that they work on the meta device, under
`torch.compile`, and are counted by its FLOP counter whatever the groups' sizes. PyTorch's
`grouped_mm` does the work where it can, one product after another elsewhere. Milliseconds of
forward and backward on a CPU (single precision, one thread, medians of 13, uneven groups):

    rows · groups · widths      grouped_mm   this loop   loop under autograd   one matrix for all
    512 · 8 · 64 to 128         0.46         0.68        0.75                  0.40
    2048 · 64 · 256 to 128      9.9          10.6        13.1                  6.1
    4096 · 128 · 512 to 192     63           67          86                    49
    4096 · 8 · 512 to 1024      164          162         169                   161

Letters: R rows · E groups · X width in · Y width out.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

#: Dtypes that grouped_mm takes.
GROUPED_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
#: Every row that grouped_mm reads or writes starts at a multiple of this.
BYTES_ALIGNED = 16


@torch.library.custom_op(
    "isoflop::grouped_linear",
    mutates_args=(),
    schema="(Tensor x, Tensor weight, Tensor ends) -> Tensor",
)
def grouped_linear(x_RX: Tensor, weight_EYX: Tensor, ends_E: Tensor) -> Tensor:
    """Each row times its group's matrix, [R, Y]; `ends_E` (int32) is where each group ends."""
    weight_EXY = weight_EYX.transpose(1, 2)
    if _grouped_mm_takes(x_RX, *weight_EYX.shape[1:]):
        return F.grouped_mm(x_RX, weight_EXY, offs=ends_E)
    out_RY = x_RX.new_empty(x_RX.shape[0], weight_EYX.shape[1])
    for rows, weight_XY in zip(_groups(ends_E), weight_EXY, strict=True):
        torch.mm(x_RX[rows], weight_XY, out=out_RY[rows])
    return out_RY


@torch.library.custom_op(
    "isoflop::grouped_outer", mutates_args=(), schema="(Tensor y, Tensor x, Tensor ends) -> Tensor"
)
def grouped_outer(y_RY: Tensor, x_RX: Tensor, ends_E: Tensor) -> Tensor:
    """The sum of y x^T over each group's rows, [E, Y, X]; 0 for a group without rows."""
    if _grouped_mm_takes(x_RX, y_RY.shape[1], x_RX.shape[1]):
        return F.grouped_mm(y_RY.T, x_RX, offs=ends_E)
    out_EYX = x_RX.new_empty(len(ends_E), y_RY.shape[1], x_RX.shape[1])
    for rows, out_YX in zip(_groups(ends_E), out_EYX, strict=True):
        torch.mm(y_RY[rows].T, x_RX[rows], out=out_YX)
    return out_EYX


def _grouped_mm_takes(x_RX: Tensor, *widths: int) -> bool:
    if x_RX.dtype not in GROUPED_DTYPES or not hasattr(F, "grouped_mm"):  # new in PyTorch 2.10
        return False
    if x_RX.is_cuda and torch.cuda.get_device_capability(x_RX.device) < (8, 0):
        return False
    return all(width * x_RX.element_size() % BYTES_ALIGNED == 0 for width in widths)


def _groups(ends_E: Tensor) -> Iterator[slice]:
    return (slice(first, last) for first, last in pairwise([0, *ends_E.tolist()]))


@grouped_linear.register_fake
def _(x_RX: Tensor, weight_EYX: Tensor, _ends_E: Tensor) -> Tensor:
    return x_RX.new_empty(x_RX.shape[0], weight_EYX.shape[1])


@grouped_outer.register_fake
def _(y_RY: Tensor, x_RX: Tensor, ends_E: Tensor) -> Tensor:
    return x_RX.new_empty(ends_E.shape[0], y_RY.shape[1], x_RX.shape[1])


def _keep(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor], **_: Any) -> None:
    ctx.save_for_backward(*inputs)


def _gradients(ctx: Any, grad_RY: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
    x_RX, weight_EYX, ends_E = ctx.saved_tensors
    wants_x, wants_weight, _ = ctx.needs_input_grad
    grad_RY = grad_RY.contiguous()  # grouped_mm refuses the gradient of a sum, whose stride is 0
    grad_x = grouped_linear(grad_RY, weight_EYX.transpose(1, 2), ends_E) if wants_x else None
    grad_weight = grouped_outer(grad_RY, x_RX, ends_E) if wants_weight else None
    return grad_x, grad_weight, None


grouped_linear.register_autograd(_gradients, setup_context=_keep)


@register_flop_formula([torch.ops.isoflop.grouped_linear])
def _flops_linear(x: list[int], weight: list[int], *_: Any, **__: Any) -> int:
    """A row meets one matrix, whichever: 2 R X Y."""
    return 2 * x[0] * weight[1] * weight[2]


@register_flop_formula([torch.ops.isoflop.grouped_outer])
def _flops_outer(y: list[int], x: list[int], *_: Any, **__: Any) -> int:
    return 2 * y[0] * y[1] * x[1]
