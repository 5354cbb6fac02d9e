"""Attention: which keys a query sees, and how its heads are made."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, TypeAlias

from isoflop.arch.rules import Rules
from isoflop.arch.spec.norms import Norm, RmsNorm
from isoflop.arch.spec.positions import (
    DynamicScaling,
    LongRopeScaling,
    Position,
    Rope,
    Rope2d,
    RopeScaling,
)


@dataclass(frozen=True, slots=True)
class Full:
    """Every key (every earlier one where attention is causal)."""

    kind: Literal["full"] = "full"


@dataclass(frozen=True, slots=True)
class Window:
    """The `window` latest keys, the query's own included."""

    window: int
    kind: Literal["window"] = "window"

    def __post_init__(self) -> None:
        Rules(self).size("window").close()


@dataclass(frozen=True, slots=True)
class Chunked:
    """The keys of the query's own chunk of `chunk` tokens (Llama 4)."""

    chunk: int
    kind: Literal["chunked"] = "chunked"

    def __post_init__(self) -> None:
        Rules(self).size("chunk").close()


@dataclass(frozen=True, slots=True)
class BlockSparse:
    """Local blocks plus every `stride`-th block before (Child 2019, the strided pattern).

    Tokens are cut into blocks of `block`; a query sees its `n_local` latest blocks and, of the
    earlier ones, those a multiple of `stride` blocks away (0: none).
    """

    block: int
    n_local: int
    stride: int = 0
    kind: Literal["block_sparse"] = "block_sparse"

    def __post_init__(self) -> None:
        Rules(self).size("block").size("n_local").size("stride", least=0).close()


Span: TypeAlias = Full | Window | Chunked | BlockSparse


@dataclass(frozen=True, slots=True)
class QkNorm:
    """A norm on queries and keys.

    `per` head: over each head, with weights that all heads share (Qwen 3) · each_head:
    over each head, with weights of its own (Command R+, StableLM 2) · all_heads: over
    all heads at once (OLMo 2).
    """

    norm: Norm
    per: Literal["head", "each_head", "all_heads"] = "head"

    def __post_init__(self) -> None:
        Rules(self).one_of("per", ("head", "each_head", "all_heads")).close()


@dataclass(frozen=True, slots=True)
class Attention:
    """Attention with N query heads and K key-value heads of size H.

    K = N is multi-head, K = 1 multi-query, between them grouped-query attention. H is a
    field of its own: d_model / n_heads is a habit, not a rule.

    `scale` None means H ** -0.5. `sinks` is a trained logit per head that takes
    probability and gives nothing (GPT-OSS). `logit_softcap` c replaces a score s by
    c tanh(s / c) (Gemma 2).
    """

    n_heads: int
    n_kv_heads: int
    d_head: int
    position: Position = None
    span: Span = Full()
    bias_qkv: bool = False
    bias_out: bool = False
    qk_norm: QkNorm | None = None
    scale: float | None = None
    logit_softcap: float | None = None
    sinks: bool = False
    dropout: float = 0.0
    kind: Literal["attention"] = "attention"

    def __post_init__(self) -> None:
        rules = Rules(self).size("n_heads").size("n_kv_heads").size("d_head").share("dropout")
        if not rules.broken:
            rules.divides("n_kv_heads", "n_heads")
            if isinstance(self.position, Rope):
                rotary = self.position.d_rotary or self.d_head
                rules.must("d_head", "is even: rotary positions turn pairs", rotary % 2 == 0)
                rules.must("position.d_rotary", f"is at most d_head={self.d_head}",
                           rotary <= self.d_head)  # fmt: skip
                check_scaling(rules, self.position.scaling, rotary)
                if (sections := self.position.sections) is not None:
                    rules.must("position.sections", f"add up to the {rotary // 2} rotated pairs",
                               2 * sum(sections) == rotary, value=sections)  # fmt: skip
            if isinstance(self.position, Rope2d):
                rules.must("d_head", "is divisible by 4: pairs turn by row and by column",
                           self.d_head % 4 == 0)  # fmt: skip
        if self.scale is not None:
            rules.real("scale", above=0)
        if self.logit_softcap is not None:
            rules.real("logit_softcap", above=0)
        rules.close()


#: Values, not calls: a frozen default may be shared.
_ROPE, _RMS_NORM = Rope(), RmsNorm()


@dataclass(frozen=True, slots=True)
class LatentAttention:
    """Multi-head latent attention (DeepSeek-V2, 2405.04434, section 2.1).

    Keys and values are rebuilt from a latent of size `d_kv_latent`; each head's query and
    key have a part without position (`d_head_nope`) and a rotated part (`d_head_rope`),
    whose key is shared by all heads. `d_q_latent` None means queries are not compressed.
    `bias_qkv` is on the maps into latents; the maps out of them have none.
    """

    n_heads: int
    d_kv_latent: int
    d_head_nope: int
    d_head_rope: int
    d_head_value: int
    d_q_latent: int | None = None
    position: Rope = _ROPE
    norm: Norm = _RMS_NORM
    bias_qkv: bool = False
    bias_out: bool = False
    scale: float | None = None
    dropout: float = 0.0
    kind: Literal["latent_attention"] = "latent_attention"

    def __post_init__(self) -> None:
        rules = Rules(self).size("n_heads").size("d_kv_latent").size("d_head_nope")
        rules.size("d_head_rope").size("d_head_value").share("dropout")
        if self.d_q_latent is not None:
            rules.size("d_q_latent")
        if not rules.broken:
            rules.must("d_head_rope", "is even: it is rotated in pairs", self.d_head_rope % 2 == 0)
            rules.must("position.d_rotary", "is None: all of d_head_rope is rotated",
                       self.position.d_rotary is None)  # fmt: skip
            check_scaling(rules, self.position.scaling, self.d_head_rope)
        rules.close()


def check_scaling(rules: Rules, scaling: RopeScaling | None, d_rotary: int) -> None:
    """What a scaling asks of the number of rotated dimensions."""
    if isinstance(scaling, LongRopeScaling):
        rules.must("position.scaling.short_factor", f"has one factor per rotated pair, {d_rotary // 2}",
                   2 * len(scaling.short_factor) == d_rotary, value=len(scaling.short_factor))  # fmt: skip
    if isinstance(scaling, DynamicScaling):  # its exponent is d_rotary / (d_rotary - 2)
        rules.must("position.scaling", "turns more than one pair", d_rotary > 2, value="dynamic")
