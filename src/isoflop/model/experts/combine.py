"""What experts said, times their gates, added up where it came from.

Letters: M tokens of all sequences · D d_model · R rows that experts worked on.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


class _Combine(torch.autograd.Function):
    """Keeps the rows and the gates. Under autograd index_add keeps the products of both too."""

    @staticmethod
    def forward(ctx: Any, y_RD: Tensor, gate_R: Tensor, token_R: Tensor, n_tokens: int) -> Tensor:
        ctx.save_for_backward(y_RD, gate_R, token_R)
        gated_RD = y_RD * gate_R[:, None]
        return y_RD.new_zeros(n_tokens, y_RD.shape[1]).index_add_(0, token_R, gated_RD)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_MD: Tensor) -> tuple[Tensor, Tensor, None, None]:
        y_RD, gate_R, token_R = ctx.saved_tensors
        grad_RD = grad_MD.index_select(0, token_R)
        grad_gate_R = torch.linalg.vecdot(grad_RD, y_RD)
        return grad_RD.mul_(gate_R[:, None]), grad_gate_R, None, None


#: sum over the rows of a token of gate * row, [M, D]: rows, gates, the rows' tokens, M.
combine: Callable[[Tensor, Tensor, Tensor, int], Tensor] = _Combine.apply
