"""Attention whose queries, keys and values are maps of their own.

Letters: B batch · T query tokens · S key tokens · D d_model · N n_heads · K n_kv_heads ·
H d_head · X the heads' numbers side by side.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from isoflop.arch.spec import Attention, QkNorm, Span, Window
from isoflop.attention import attention
from isoflop.errors import Fault
from isoflop.model.attention.context import Context
from isoflop.model.parts import Linear, make_norm


@dataclass(frozen=True, slots=True)
class KeysValues:
    """Tokens as attention reads them: what a cache holds."""

    k_BSKH: Tensor  # noqa: N815 - shape suffix
    v_BSKH: Tensor  # noqa: N815


class AttentionModule(nn.Module):
    """Attention to the tokens themselves or to others: multi-head, grouped-query or multi-query."""

    def __init__(self, spec: Attention, d_model: int, *, causal: bool = True) -> None:
        super().__init__()
        self.spec = spec
        self.causal = causal
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

    def forward(
        self, x_BTD: Tensor, context: Context, source: Tensor | KeysValues | None = None
    ) -> Tensor:
        """What x gathers from `source`, a stream or its keys and values; None: from itself."""
        q_BTNH = self._heads(self.q(x_BTD), self.q_norm)
        if context.rotation is not None:
            q_BTNH = context.rotation(q_BTNH)
        if not isinstance(source, KeysValues):
            source = self.keys_values(x_BTD if source is None else source, context)
            if context.memory is not None:
                source = KeysValues(*context.memory.extend(source.k_BSKH, source.v_BSKH))
        out_BTNH = self.attend(q_BTNH, source, context)
        y_BTD: Tensor = self.out(out_BTNH.flatten(-2))
        return y_BTD

    def keys_values(self, x_BSD: Tensor, context: Context) -> KeysValues:
        """Keys, turned, and values of tokens, to be attended to as often as wanted."""
        k_BSKH = self._heads(self.k(x_BSD), self.k_norm)
        if context.rotation is not None:
            k_BSKH = context.rotation(k_BSKH)
        return KeysValues(k_BSKH, torch.unflatten(self.v(x_BSD), -1, (-1, self.spec.d_head)))

    def attend(self, q_BTNH: Tensor, source: KeysValues, context: Context) -> Tensor:
        """What the heads read, [B, T, N, H]."""
        return attention(
            q_BTNH,
            source.k_BSKH,
            source.v_BSKH,
            causal=self.causal and not context.unordered,
            window=None if context.unordered else self.window,
            sinks=None if self.sinks is None else self.sinks.weight,
            softcap=self.spec.logit_softcap,
            alibi=context.slopes,
            bias=context.bias,
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

    def attend(self, q_BTNH: Tensor, source: KeysValues, context: Context) -> Tensor:
        if context.waves is None or (context.bias is not None and not context.unordered):
            raise Fault("positions by distance are told by sine waves, and by nothing else")
        u_NH, v_NH = (
            torch.unflatten(vector, -1, (-1, self.spec.d_head)).to(q_BTNH.dtype)
            for vector in (self.distance_biases.u, self.distance_biases.v)
        )
        if context.unordered:
            bias_BNTS = self._score_pairs(q_BTNH + v_NH, context.waves)
        else:
            r_TNH = torch.unflatten(self.distances(context.waves), -1, (-1, self.spec.d_head))
            bias_BNTS = _score_distances(q_BTNH + v_NH, r_TNH)
        bias_BNTS = self.scale * bias_BNTS
        if context.bias is not None:
            bias_BNTS = bias_BNTS.masked_fill(~context.bias, -torch.inf)
        return super().attend(q_BTNH + u_NH, source, replace(context, bias=bias_BNTS))

    def _score_pairs(self, q_BTNH: Tensor, waves_BTSD: Tensor) -> Tensor:
        """[B, N, T, S]: queries against each key's distance.

        The map meets the few queries, not the many distances: q (W w) = (q W) w.
        """
        weight_NHD = torch.unflatten(self.distances.weight, 0, (-1, self.spec.d_head))
        q_BTND = torch.einsum("btnh,nhd->btnd", q_BTNH, weight_NHD)
        return torch.einsum("btnd,btsd->bnts", q_BTND, waves_BTSD.expand(len(q_BTNH), -1, -1, -1))


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
