"""A layer's attention: projections around `isoflop.attention.attention`.

Letters: B batch · T query tokens · S key tokens · D d_model · N n_heads · K n_kv_heads ·
H d_head.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from isoflop.arch.spec import Attention, QkNorm, Span, Window
from isoflop.attention import attention
from isoflop.model.parts import Linear, make_norm
from isoflop.model.rotary import Rotation


@dataclass(frozen=True, slots=True)
class KeysValues:
    """Tokens as attention reads them: what a cache holds of an encoder's output."""

    k_BSKH: Tensor  # noqa: N815 - shape suffix
    v_BSKH: Tensor  # noqa: N815


class AttentionModule(nn.Module):
    """Attention to the tokens themselves or to others; q, k and v are maps of their own."""

    def __init__(self, spec: Attention, d_model: int, *, causal: bool = True) -> None:
        super().__init__()
        self.spec = spec
        self.causal = causal
        self.window = window_of(spec.span)
        width_q, width_kv = spec.n_heads * spec.d_head, spec.n_kv_heads * spec.d_head
        self.q = Linear(d_model, width_q, spec.bias_qkv)
        self.k = Linear(d_model, width_kv, spec.bias_qkv)
        self.v = Linear(d_model, width_kv, spec.bias_qkv)
        self.out = Linear(width_q, d_model, spec.bias_out)
        self.q_norm = _make_qk_norm(spec.qk_norm, spec.d_head, width_q)
        self.k_norm = _make_qk_norm(spec.qk_norm, spec.d_head, width_kv)

    def forward(
        self,
        x_BTD: Tensor,
        rotation: Rotation | None,
        bias: Tensor | None = None,
        source: Tensor | KeysValues | None = None,
    ) -> Tensor:
        """What x gathers from `source`, a stream or its keys and values; None: from itself.

        `bias` broadcasts to [B, N, T, S]: added to the scores, or boolean (true: seen).
        """
        q_BTNH = self._heads(self.q(x_BTD), self.q_norm)
        if rotation is not None:
            q_BTNH = rotation(q_BTNH)
        if not isinstance(source, KeysValues):
            source = self.keys_values(x_BTD if source is None else source, rotation)
        out_BTNH = attention(
            q_BTNH,
            source.k_BSKH,
            source.v_BSKH,
            causal=self.causal,
            window=self.window,
            scale=self.spec.scale,
            softcap=self.spec.logit_softcap,
            bias=bias,
            dropout_p=self.spec.dropout if self.training else 0.0,
        )
        y_BTD: Tensor = self.out(out_BTNH.flatten(-2))
        return y_BTD

    def keys_values(self, x_BSD: Tensor, rotation: Rotation | None = None) -> KeysValues:
        """Keys and values of tokens, to be attended to as often as wanted."""
        k_BSKH = self._heads(self.k(x_BSD), self.k_norm)
        if rotation is not None:
            k_BSKH = rotation(k_BSKH)
        v_BSKH = torch.unflatten(self.v(x_BSD), -1, (-1, self.spec.d_head))
        return KeysValues(k_BSKH, v_BSKH)

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
