"""A layer's attention: projections around `isoflop.attention.attention`.

Letters: B batch · T tokens · D d_model · N n_heads · K n_kv_heads · H d_head.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from isoflop.arch.spec import Attention, QkNorm, Span, Window
from isoflop.attention import attention
from isoflop.model.parts import Linear, make_norm
from isoflop.model.rotary import Rotation


class AttentionModule(nn.Module):
    """Causal self-attention; q, k and v are maps of their own."""

    def __init__(self, spec: Attention, d_model: int) -> None:
        super().__init__()
        self.spec = spec
        self.window = window_of(spec.span)
        width_q, width_kv = spec.n_heads * spec.d_head, spec.n_kv_heads * spec.d_head
        self.q = Linear(d_model, width_q, spec.bias_qkv)
        self.k = Linear(d_model, width_kv, spec.bias_qkv)
        self.v = Linear(d_model, width_kv, spec.bias_qkv)
        self.out = Linear(width_q, d_model, spec.bias_out)
        self.q_norm = _make_qk_norm(spec.qk_norm, spec.d_head, width_q)
        self.k_norm = _make_qk_norm(spec.qk_norm, spec.d_head, width_kv)

    def forward(self, x_BTD: Tensor, rotation: Rotation | None) -> Tensor:
        q_BTNH = self._heads(self.q(x_BTD), self.q_norm)
        k_BTKH = self._heads(self.k(x_BTD), self.k_norm)
        v_BTKH = torch.unflatten(self.v(x_BTD), -1, (-1, self.spec.d_head))
        if rotation is not None:
            q_BTNH, k_BTKH = rotation(q_BTNH), rotation(k_BTKH)
        out_BTNH = attention(
            q_BTNH,
            k_BTKH,
            v_BTKH,
            causal=True,
            window=self.window,
            scale=self.spec.scale,
            softcap=self.spec.logit_softcap,
            dropout_p=self.spec.dropout if self.training else 0.0,
        )
        y_BTD: Tensor = self.out(out_BTNH.flatten(-2))
        return y_BTD

    def _heads(self, x_BTX: Tensor, norm: nn.Module) -> Tensor:
        """Cut into heads; the number of heads is left open, so a shard of them works too."""
        if self.spec.qk_norm is not None and self.spec.qk_norm.per == "all_heads":
            return torch.unflatten(norm(x_BTX), -1, (-1, self.spec.d_head))
        x_BTNH: Tensor = norm(torch.unflatten(x_BTX, -1, (-1, self.spec.d_head)))
        return x_BTNH


def window_of(span: Span) -> int | None:
    """The window that `attention` takes for a span."""
    return span.window if isinstance(span, Window) else None


def _make_qk_norm(qk_norm: QkNorm | None, d_head: int, width: int) -> nn.Module:
    if qk_norm is None:
        return nn.Identity()
    return make_norm(qk_norm.norm, d_head if qk_norm.per == "head" else width)
