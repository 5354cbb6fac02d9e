"""Attention whose queries, keys and values are maps of their own.

Letters: B batch · T tokens, queries and keys alike · D d_model · N n_heads · K n_kv_heads ·
H d_head · X the heads' numbers side by side.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from isoflop.arch.spec import Attention, QkNorm, Span, Window
from isoflop.attention import attention
from isoflop.errors import Fault
from isoflop.model.attention.context import Context
from isoflop.model.parts import Linear, make_norm


class AttentionModule(nn.Module):
    """Causal self-attention: multi-head, grouped-query or multi-query."""

    def __init__(self, spec: Attention, d_model: int) -> None:
        super().__init__()
        self.spec = spec
        self.scale = spec.d_head**-0.5 if spec.scale is None else spec.scale
        self.window = window_of(spec.span)
        width_q, width_kv = spec.n_heads * spec.d_head, spec.n_kv_heads * spec.d_head
        self.q = Linear(d_model, width_q, spec.bias_qkv)
        self.k = Linear(d_model, width_kv, spec.bias_qkv)
        self.v = Linear(d_model, width_kv, spec.bias_qkv)
        self.out = Linear(width_q, d_model, spec.bias_out)
        self.q_norm = _make_qk_norm(spec.qk_norm, spec.n_heads, spec.d_head)
        self.k_norm = _make_qk_norm(spec.qk_norm, spec.n_kv_heads, spec.d_head)
        self.sinks = SinkLogits(spec.n_heads) if spec.sinks else None

    def forward(self, x_BTD: Tensor, context: Context) -> Tensor:
        q_BTNH = self._heads(self.q(x_BTD), self.q_norm)
        if context.rotation is not None:
            q_BTNH = context.rotation(q_BTNH)
        k_BTKH, v_BTKH = self.keys_and_values(x_BTD, context)
        out_BTNH = self.attend(q_BTNH, k_BTKH, v_BTKH, context)
        y_BTD: Tensor = self.out(out_BTNH.flatten(-2))
        return y_BTD

    def keys_and_values(self, x_BTD: Tensor, context: Context) -> tuple[Tensor, Tensor]:
        """[B, T, K, H] each, the keys turned: what later tokens need of these."""
        k_BTKH = self._heads(self.k(x_BTD), self.k_norm)
        if context.rotation is not None:
            k_BTKH = context.rotation(k_BTKH)
        return k_BTKH, torch.unflatten(self.v(x_BTD), -1, (-1, self.spec.d_head))

    def attend(
        self,
        q_BTNH: Tensor,
        k_BTKH: Tensor,
        v_BTKH: Tensor,
        context: Context,
        bias_BNTT: Tensor | None = None,
    ) -> Tensor:
        """What the heads read, [B, T, N, H]; a bias is added to the scaled scores."""
        return attention(
            q_BTNH,
            k_BTKH,
            v_BTKH,
            causal=True,
            window=self.window,
            sinks=None if self.sinks is None else self.sinks.weight,
            softcap=self.spec.logit_softcap,
            alibi=context.slopes,
            bias=bias_BNTT,
            block_mask=context.blocks,
            scale=self.scale,
            dropout_p=self.spec.dropout if self.training else 0.0,
        )

    def _heads(self, x_BTX: Tensor, norm: nn.Module) -> Tensor:
        """Cut into heads; the number of heads is left open, so a shard of them works too."""
        if self.spec.qk_norm is not None and self.spec.qk_norm.per == "all_heads":
            return torch.unflatten(norm(x_BTX), -1, (-1, self.spec.d_head))
        x_BTNH: Tensor = norm(torch.unflatten(x_BTX, -1, (-1, self.spec.d_head)))
        return x_BTNH


class RelativeAttentionModule(AttentionModule):
    """Attention that scores each key and, by a map of sine waves, its distance.

    A query q, a key k and their distance's r score (q + u) k + (q + v) r, with u and v trained
    for each head (Transformer-XL: Dai 2019, 1901.02860, section 3.3).
    """

    def __init__(self, spec: Attention, d_model: int) -> None:
        super().__init__(spec, d_model)
        self.distances = Linear(d_model, spec.n_heads * spec.d_head, bias=False)
        self.distance_biases = DistanceBiases(spec.n_heads * spec.d_head)

    def attend(
        self,
        q_BTNH: Tensor,
        k_BTKH: Tensor,
        v_BTKH: Tensor,
        context: Context,
        bias_BNTT: Tensor | None = None,
    ) -> Tensor:
        if context.waves is None or bias_BNTT is not None:
            raise Fault("positions by distance are told by sine waves, and by nothing else")
        r_TNH = torch.unflatten(self.distances(context.waves), -1, (-1, self.spec.d_head))
        u_NH, v_NH = (
            torch.unflatten(vector, -1, (-1, self.spec.d_head)).to(q_BTNH.dtype)
            for vector in (self.distance_biases.u, self.distance_biases.v)
        )
        bias_BNTT = self.scale * _score_distances(q_BTNH + v_NH, r_TNH)
        return super().attend(q_BTNH + u_NH, k_BTKH, v_BTKH, context, bias_BNTT)


def _score_distances(q_BTNH: Tensor, r_SNH: Tensor) -> Tensor:
    """[B, N, T, S]: queries against the distance to each key; nonsense at later keys.

    `r_SNH` holds the distances S - 1 to 0, and the last query stands at the last key. Row t
    is to move left by T - 1 - t places, which a column more and a cut one row later do at
    once (Dai 2019, appendix B).
    """
    scores_BNTS = torch.einsum("btnh,snh->bnts", q_BTNH, r_SNH)
    batch, n_heads, n_queries, n_keys = scores_BNTS.shape
    wider = F.pad(scores_BNTS, (1, 0)).reshape(batch, n_heads, n_keys + 1, n_queries)
    return wider[:, :, 1:].reshape(batch, n_heads, n_queries, n_keys)


class DistanceBiases(nn.Module):
    """What is added to queries: u where they meet keys, v where they meet distances."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.u = nn.Parameter(torch.empty(width))
        self.v = nn.Parameter(torch.empty(width))


class SinkLogits(nn.Module):
    """A trained logit per head that takes probability and gives nothing (gpt-oss)."""

    def __init__(self, n_heads: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(n_heads))


def window_of(span: Span) -> int | None:
    """The window that `attention` takes for a span."""
    return span.window if isinstance(span, Window) else None


def _make_qk_norm(qk_norm: QkNorm | None, n_heads: int, d_head: int) -> nn.Module:
    if qk_norm is None:
        return nn.Identity()
    match qk_norm.per:
        case "head":
            return make_norm(qk_norm.norm, d_head)
        case "each_head":
            return make_norm(qk_norm.norm, n_heads, d_head)
        case "all_heads":
            return make_norm(qk_norm.norm, n_heads * d_head)
