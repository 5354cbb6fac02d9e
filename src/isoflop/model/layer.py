"""One layer: attention, feed-forward and their norms, wired.

Letters: B batch · T tokens · D d_model.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor, nn

from isoflop.arch.spec import Dense, Experts, FeedForward, Layer, Wiring
from isoflop.model.attention import AttentionModule, Context, KeysValues, make_attention
from isoflop.model.experts import ExpertsModule
from isoflop.model.parts import FeedForwardModule, make_norm

SEQUENTIAL = (Wiring.PRE, Wiring.OUTPUT, Wiring.SANDWICH)
READS_NORMED = (Wiring.PRE, Wiring.SANDWICH)
ADDS_NORMED = (Wiring.OUTPUT, Wiring.SANDWICH)


@dataclass(frozen=True, slots=True)
class Source:
    """What cross-attention reads: an encoder's output or its keys and values, and what is seen."""

    memory: Tensor | KeysValues
    seen: Tensor | None = None  # boolean [B, 1, 1, S]


class LayerModule(nn.Module):
    """What every wiring shares: the two blocks, and what a block adds to the stream."""

    def __init__(self, spec: Layer, d_model: int, *, causal: bool) -> None:
        super().__init__()
        self.dropout = spec.dropout
        self.residual_scale = spec.residual_scale
        self.attention = make_attention(spec.attention, d_model, causal=causal)
        self.feed_forward = make_feed_forward(spec.feed_forward, d_model)

    @property
    def n_blocks(self) -> int:
        """How many blocks add to the stream."""
        return sum(
            name in ("attention", "cross", "feed_forward") for name, _ in self.named_children()
        )

    def add(self, x_BTD: Tensor, change_BTD: Tensor) -> Tensor:
        change_BTD = F.dropout(change_BTD, self.dropout, self.training)
        if self.residual_scale != 1.0:
            change_BTD = change_BTD * self.residual_scale
        return x_BTD + change_BTD


class SequentialLayer(LayerModule):
    """x + norm_out(attention(norm_in(x))), then the same with cross-attention, where there is
    some, and with the feed-forward.

    The wirings pre (no norm_out), output (no norm_in) and sandwich (both).
    """

    def __init__(self, spec: Layer, d_model: int, *, causal: bool) -> None:
        super().__init__(spec, d_model, causal=causal)
        norm_in = spec.norm if spec.wiring in READS_NORMED else None
        norm_out = spec.norm if spec.wiring in ADDS_NORMED else None
        self.norm_attention = make_norm(norm_in, d_model)
        self.norm_attention_out = make_norm(norm_out, d_model)
        self.norm_feed_forward = make_norm(norm_in, d_model)
        self.norm_feed_forward_out = make_norm(norm_out, d_model)
        if spec.cross is not None:
            self.norm_cross = make_norm(norm_in, d_model)
            self.cross = AttentionModule(spec.cross, d_model, causal=False)
            self.norm_cross_out = make_norm(norm_out, d_model)

    def forward(self, x_BTD: Tensor, context: Context, source: Source | None = None) -> Tensor:
        mixed_BTD = self.attention(self.norm_attention(x_BTD), context)
        x_BTD = self.add(x_BTD, self.norm_attention_out(mixed_BTD))
        if source is not None:
            h_BTD = self.norm_cross(x_BTD)
            crossed_BTD = self.cross(h_BTD, Context(bias=source.seen), source.memory)
            x_BTD = self.add(x_BTD, self.norm_cross_out(crossed_BTD))
        fed_BTD = self.feed_forward(self.norm_feed_forward(x_BTD))
        return self.add(x_BTD, self.norm_feed_forward_out(fed_BTD))


class PostNormLayer(LayerModule):
    """norm(x + attention(x)), then the same with the feed-forward (Vaswani 2017)."""

    def __init__(self, spec: Layer, d_model: int, *, causal: bool) -> None:
        super().__init__(spec, d_model, causal=causal)
        self.norm_attention = make_norm(spec.norm, d_model)
        self.norm_feed_forward = make_norm(spec.norm, d_model)

    def forward(self, x_BTD: Tensor, context: Context) -> Tensor:
        x_BTD = self.norm_attention(self.add(x_BTD, self.attention(x_BTD, context)))
        y_BTD: Tensor = self.norm_feed_forward(self.add(x_BTD, self.feed_forward(x_BTD)))
        return y_BTD


class ParallelLayer(LayerModule):
    """x + attention(norm(x)) + feed_forward(norm(x)), both blocks reading one norm (PaLM)."""

    def __init__(self, spec: Layer, d_model: int, *, causal: bool) -> None:
        super().__init__(spec, d_model, causal=causal)
        self.norm = make_norm(spec.norm, d_model)

    def forward(self, x_BTD: Tensor, context: Context) -> Tensor:
        h_BTD = self.norm(x_BTD)
        x_BTD = self.add(x_BTD, self.attention(h_BTD, context))
        return self.add(x_BTD, self.feed_forward(h_BTD))


class ParallelTwoNormsLayer(LayerModule):
    """x + attention(norm_1(x)) + feed_forward(norm_2(x)) (GPT-NeoX)."""

    def __init__(self, spec: Layer, d_model: int, *, causal: bool) -> None:
        super().__init__(spec, d_model, causal=causal)
        self.norm_attention = make_norm(spec.norm, d_model)
        self.norm_feed_forward = make_norm(spec.norm, d_model)

    def forward(self, x_BTD: Tensor, context: Context) -> Tensor:
        fed_BTD = self.feed_forward(self.norm_feed_forward(x_BTD))
        x_BTD = self.add(x_BTD, self.attention(self.norm_attention(x_BTD), context))
        return self.add(x_BTD, fed_BTD)


def make_feed_forward(spec: FeedForward, d_model: int) -> nn.Module:
    """The module of a layer's feed-forward, by its kind."""
    match spec:
        case Dense():
            return FeedForwardModule(spec, d_model)
        case Experts():
            return ExpertsModule(spec, d_model)


def make_layer(spec: Layer, d_model: int, *, causal: bool = True) -> LayerModule:
    """The module of a layer, by its wiring; its tokens see later ones unless `causal`."""
    match spec.wiring:
        case Wiring.PRE | Wiring.OUTPUT | Wiring.SANDWICH:
            return SequentialLayer(spec, d_model, causal=causal)
        case Wiring.POST:
            return PostNormLayer(spec, d_model, causal=causal)
        case Wiring.PARALLEL:
            return ParallelLayer(spec, d_model, causal=causal)
        case Wiring.PARALLEL_TWO_NORMS:
            return ParallelTwoNormsLayer(spec, d_model, causal=causal)
