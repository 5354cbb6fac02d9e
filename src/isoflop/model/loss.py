"""Cross entropy of a head's logits; on a CPU some rows at a time, so that they never stand whole.

Letters: B batch · T tokens · R rows, the tokens of all sequences · r some of them · D width ·
V classes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from isoflop.model.parts import HeadModule, ProjectedHead, product_dtype

#: A target that is left out of the mean.
LEFT_OUT = -100

#: Rows at a time: enough that products run at full speed.
ROWS = 512


def mean_loss(logits_BTV: Tensor, targets_BT: Tensor) -> Tensor:
    """Mean cross entropy in nats per token, in at least single precision.

    A target of -100 is left out of the mean.
    """
    wide = torch.promote_types(logits_BTV.dtype, torch.float32)
    logits_RV = logits_BTV.flatten(0, 1).to(wide)
    return F.cross_entropy(logits_RV, targets_BT.flatten(), ignore_index=LEFT_OUT)


def head_loss(
    head: HeadModule | ProjectedHead,
    x_BTD: Tensor,
    embedding_VD: Tensor,
    targets_BT: Tensor,
    vocab_size: int,
) -> Tensor:
    """`mean_loss` of the first `vocab_size` logits that a head makes of x.

    Forward and backward of 1024 rows, 320 x 8192, one thread, medians of 11: all logits at once
    243 ms, by rows 187; in bfloat16 by autocast 158 and 97.
    """
    if not _goes_by_rows(x_BTD, embedding_VD, *head.parameters()):
        return mean_loss(head(x_BTD, embedding_VD)[..., :vocab_size], targets_BT)
    if isinstance(head, ProjectedHead):
        x_BTD, head = head.project(x_BTD), head.logits
    weight_VD = head.matrix(embedding_VD)
    bias_V = None if head.bias is None else head.bias[:vocab_size]
    if vocab_size < len(weight_VD):  # a slice of all would still copy its gradient
        weight_VD = weight_VD[:vocab_size]
    x_RD, target_R = x_BTD.flatten(0, 1), targets_BT.flatten()
    return _loss_by_rows(x_RD, weight_VD, bias_V, target_R, head, torch.is_grad_enabled())


def _goes_by_rows(*tensors: Tensor) -> bool:
    """Not where they are on other devices, sharded from outside, or compiled."""
    plain = all(type(x) in (Tensor, nn.Parameter) and x.device.type == "cpu" for x in tensors)
    return plain and not torch.compiler.is_compiling()


class _LossByRows(torch.autograd.Function):
    """Gradients are made with the loss, while a few rows' logits are at hand."""

    @staticmethod
    def forward(
        ctx: Any,
        x_RD: Tensor,
        weight_VD: Tensor,
        bias_V: Tensor | None,
        target_R: Tensor,
        head: HeadModule,
        training: bool,
    ) -> Tensor:
        dtype = product_dtype(x_RD)
        wanted = [training and needed for needed in ctx.needs_input_grad[:3]]
        with torch.autocast("cpu", enabled=False):
            x, weight = x_RD.to(dtype), weight_VD.to(dtype)
            bias = None if bias_V is None else bias_V.to(dtype)
            loss, grads = _by_rows(x, weight, bias, target_R, head, wanted)
        ctx.save_for_backward(
            *(
                None if x is None or grad is None else grad.to(x.dtype)
                for x, grad in zip((x_RD, weight_VD, bias_V), grads, strict=True)
            )
        )
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        grads = ctx.saved_tensors
        if grad != 1:
            grads = [None if x is None else x * grad.to(x.dtype) for x in grads]
        return *grads, None, None, None


_loss_by_rows: Callable[..., Tensor] = _LossByRows.apply


def _by_rows(
    x_RD: Tensor,
    weight_VD: Tensor,
    bias_V: Tensor | None,
    target_R: Tensor,
    head: HeadModule,
    wanted: Sequence[bool],
) -> tuple[Tensor, tuple[Tensor | None, ...]]:
    """The mean loss and, where wanted, its gradients by x, weight and bias.

    Products are in the inputs' precision; what is summed over rows is in at least single.
    """
    wide = torch.promote_types(x_RD.dtype, torch.float32)
    told_R = target_R != LEFT_OUT
    share_R1 = (told_R.to(wide) / told_R.sum())[:, None]
    target_R1 = target_R.where(told_R, 0)[:, None]
    loss, grad_x_RD = share_R1.new_zeros(()), torch.empty_like(x_RD)
    grad_weight_VD = torch.zeros_like(weight_VD, dtype=wide) if wanted[1] else None
    grad_bias_V = share_R1.new_zeros(len(weight_VD)) if wanted[2] else None
    room = x_RD.new_empty(min(ROWS, len(x_RD)), len(weight_VD))
    room_wide = room if room.dtype == wide else torch.empty_like(room, dtype=wide)
    by_rows = (torch.split(y, ROWS) for y in (x_RD, target_R1, share_R1, grad_x_RD))
    for x_rD, target_r1, share_r1, grad_x_rD in zip(*by_rows, strict=True):
        logits_rV = room[: len(x_rD)]
        p_rV = logits_rV if room_wide is room else room_wide[: len(x_rD)]
        product = torch.mm(x_rD, weight_VD.T, out=logits_rV)
        slope = head.finish_(product if bias_V is None else product.add_(bias_V))
        loss += (surprisal(logits_rV, target_r1, p_out=p_rV) * share_r1).sum()
        if not any(wanted):
            continue
        grad_rV = surprisal_gradient_(p_rV, target_r1, share_r1 * slope, out=logits_rV)
        torch.mm(grad_rV, weight_VD, out=grad_x_rD)
        if grad_weight_VD is not None:
            grad_weight_VD += grad_rV.T @ x_rD
        if grad_bias_V is not None:
            grad_bias_V += grad_rV.sum(0, dtype=wide)
    return loss, (grad_x_RD, grad_weight_VD, grad_bias_V)


def surprisal(logits_RV: Tensor, target_R1: Tensor, *, p_out: Tensor) -> Tensor:
    """Minus the log-probability of each target, [R, 1]; all probabilities go to `p_out`.

    The greatest logit and its probability tell the log of the sum, however small others are.
    """
    p_out.copy_(logits_RV)
    greatest_R1, told_R1 = p_out.amax(-1, keepdim=True), p_out.gather(1, target_R1)
    torch.softmax(p_out, -1, out=p_out)
    return greatest_R1 - p_out.amax(-1, keepdim=True).log() - told_R1


def surprisal_gradient_(
    p_RV: Tensor, target_R1: Tensor, factor: Tensor | float, *, out: Tensor
) -> Tensor:
    """The gradient of `surprisal` by the logits times a factor, made where the p stand."""
    p_RV.scatter_add_(1, target_R1, p_RV.new_full(target_R1.shape, -1.0))
    return out.copy_(p_RV.mul_(factor))
