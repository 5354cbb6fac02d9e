"""The spec of a language model: a frozen value that cannot be impossible.

An `Arch` is built of small frozen dataclasses. Where architectures differ in kind,
the field is a union (`Attention | LatentAttention`, `Dense | Experts`, `Rope | Alibi |
RelativeBias | None`), not a set of flags. Every constructor checks its rules and
raises `InputError` with all the problems it found; nothing is rounded or rewritten.

Letters, here and everywhere in isoflop (the scaling book's):
    B batch · T query tokens · S key tokens · D d_model · F d_ff · N n_heads ·
    K n_kv_heads · H d_head · V vocab_size · L n_layers · E n_experts · k experts per token
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from enum import StrEnum
from functools import cached_property
from typing import ClassVar, Literal, TypeAlias

from isoflop.arch.rules import Rules

Activation: TypeAlias = Literal["relu", "gelu", "gelu_tanh", "silu", "relu_squared"]

# --- positions ------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Learned:
    """A trained vector per position, added to the embedding.

    `offset` rows come before position 0 (OPT keeps 2).
    """

    n_positions: int
    offset: int = 0
    kind: Literal["learned"] = "learned"

    def __post_init__(self) -> None:
        Rules(self).size("n_positions").size("offset", least=0).close()


@dataclass(frozen=True, slots=True)
class Sinusoidal:
    """Fixed sines and cosines, added to the embedding (Vaswani 2017, section 3.5)."""

    kind: Literal["sinusoidal"] = "sinusoidal"


@dataclass(frozen=True, slots=True)
class LinearScaling:
    """Positions divided by `factor` (position interpolation, Chen 2023)."""

    factor: float
    kind: Literal["linear"] = "linear"

    def __post_init__(self) -> None:
        Rules(self).real("factor", least=1).close()


@dataclass(frozen=True, slots=True)
class DynamicScaling:
    """NTK-aware base that grows with the length read (dynamic NTK)."""

    factor: float
    kind: Literal["dynamic"] = "dynamic"

    def __post_init__(self) -> None:
        Rules(self).real("factor", least=1).close()


@dataclass(frozen=True, slots=True)
class Llama3Scaling:
    """Wavelength-dependent scaling of Llama 3.1: long waves slowed, short ones kept."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_seq_len: int
    kind: Literal["llama3"] = "llama3"

    def __post_init__(self) -> None:
        rules = Rules(self).real("factor", least=1).real("low_freq_factor", above=0)
        rules.real("high_freq_factor", above=0).size("original_max_seq_len")
        if not rules.broken:
            rules.must("high_freq_factor", "exceeds low_freq_factor",
                       self.high_freq_factor > self.low_freq_factor)  # fmt: skip
        rules.close()


@dataclass(frozen=True, slots=True)
class YarnScaling:
    """YaRN (Peng 2023): a ramp between kept and interpolated waves, and a temperature.

    `attention_factor` None means 0.1 ln(factor) + 1, the paper's equation 22;
    `mscale` and `mscale_all_dim` are DeepSeek's replacement for it.
    """

    factor: float
    original_max_seq_len: int
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    attention_factor: float | None = None
    mscale: float | None = None
    mscale_all_dim: float | None = None
    truncate: bool = True
    kind: Literal["yarn"] = "yarn"

    def __post_init__(self) -> None:
        rules = Rules(self).real("factor", least=1).size("original_max_seq_len")
        rules.real("beta_fast", above=0).real("beta_slow", above=0).close()


@dataclass(frozen=True, slots=True)
class LongRopeScaling:
    """One factor per rotated pair, one set for short and one for long contexts (Phi-3)."""

    short_factor: tuple[float, ...]
    long_factor: tuple[float, ...]
    original_max_seq_len: int
    attention_factor: float | None = None
    kind: Literal["longrope"] = "longrope"

    def __post_init__(self) -> None:
        rules = Rules(self).size("original_max_seq_len")
        rules.must("long_factor", "has as many factors as short_factor",
                   len(self.long_factor) == len(self.short_factor))  # fmt: skip
        rules.close()


RopeScaling: TypeAlias = (
    LinearScaling | DynamicScaling | Llama3Scaling | YarnScaling | LongRopeScaling
)


@dataclass(frozen=True, slots=True)
class Rope:
    """Rotary positions (Su 2021). `d_rotary` None rotates the whole head.

    `interleaved` pairs neighbours (GPT-J); otherwise halves are paired (GPT-NeoX, Llama).
    """

    theta: float = 10_000.0
    d_rotary: int | None = None
    interleaved: bool = False
    scaling: RopeScaling | None = None
    kind: Literal["rope"] = "rope"

    def __post_init__(self) -> None:
        rules = Rules(self).real("theta", least=1)
        if self.d_rotary is not None:
            rules.size("d_rotary")
            if not rules.broken:
                rules.must("d_rotary", "is even: it is rotated in pairs", self.d_rotary % 2 == 0)
        rules.close()


@dataclass(frozen=True, slots=True)
class Alibi:
    """A penalty per head that grows linearly with distance (Press 2021)."""

    kind: Literal["alibi"] = "alibi"


@dataclass(frozen=True, slots=True)
class RelativeBias:
    """T5's learned bias per head and distance bucket.

    `shared` means that the first layer's table serves all layers.
    """

    n_buckets: int = 32
    max_distance: int = 128
    bidirectional: bool = False
    shared: bool = True
    kind: Literal["relative_bias"] = "relative_bias"

    def __post_init__(self) -> None:
        Rules(self).size("n_buckets").size("max_distance").close()


Position: TypeAlias = Rope | Alibi | RelativeBias | None

# --- which keys a query sees ------------------------------------------------------------


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

    Tokens are cut into blocks of `block`; a query sees its `n_local` latest blocks and,
    of the earlier ones, each `stride`-th (0: none).
    """

    block: int
    n_local: int
    stride: int = 0
    kind: Literal["block_sparse"] = "block_sparse"

    def __post_init__(self) -> None:
        Rules(self).size("block").size("n_local").size("stride", least=0).close()


Span: TypeAlias = Full | Window | Chunked | BlockSparse

# --- norms ------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class LayerNorm:
    """Mean and variance removed; `weight` and `bias` say which vectors are trained."""

    eps: float = 1e-5
    weight: bool = True
    bias: bool = True
    kind: Literal["layer_norm"] = "layer_norm"

    def __post_init__(self) -> None:
        Rules(self).real("eps", above=0).close()


@dataclass(frozen=True, slots=True)
class RmsNorm:
    """Root mean square removed (Zhang 2019). `unit_offset` trains weight - 1 (Gemma)."""

    eps: float = 1e-6
    unit_offset: bool = False
    kind: Literal["rms_norm"] = "rms_norm"

    def __post_init__(self) -> None:
        Rules(self).real("eps", above=0).close()


Norm: TypeAlias = LayerNorm | RmsNorm


class Wiring(StrEnum):
    """Where a layer's norms stand.

    pre: x + f(norm(x)) · post: norm(x + f(x)) · output: x + norm(f(x)) (OLMo 2) ·
    sandwich: x + norm(f(norm(x))) (Gemma 2) · parallel: attention and feed-forward read
    one norm (GPT-J, PaLM) · parallel_two_norms: each reads its own (GPT-NeoX)
    """

    PRE = "pre"
    POST = "post"
    OUTPUT = "output"
    SANDWICH = "sandwich"
    PARALLEL = "parallel"
    PARALLEL_TWO_NORMS = "parallel_two_norms"


# --- attention --------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class QkNorm:
    """A norm on queries and keys; over each head, or over all heads at once (OLMo 2)."""

    norm: Norm
    per: Literal["head", "all_heads"] = "head"


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
        if self.scale is not None:
            rules.real("scale", above=0)
        if self.logit_softcap is not None:
            rules.real("logit_softcap", above=0)
        rules.close()


@dataclass(frozen=True, slots=True)
class LatentAttention:
    """Multi-head latent attention (DeepSeek-V2, 2405.04434, section 2.1).

    Keys and values are rebuilt from a latent of size `d_kv_latent`; each head's query and
    key have a part without position (`d_head_nope`) and a rotated part (`d_head_rope`),
    whose key is shared by all heads. `d_q_latent` None means queries are not compressed.
    """

    n_heads: int
    d_kv_latent: int
    d_head_nope: int
    d_head_rope: int
    d_head_value: int
    d_q_latent: int | None = None
    position: Rope = Rope()
    norm: Norm = RmsNorm()
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
            check_scaling(rules, self.position.scaling, self.d_head_rope)
        rules.close()


def check_scaling(rules: Rules, scaling: RopeScaling | None, d_rotary: int) -> None:
    """What a scaling asks of the number of rotated dimensions."""
    if isinstance(scaling, LongRopeScaling):
        rules.must("position.scaling.short_factor", f"has one factor per rotated pair, {d_rotary // 2}",
                   2 * len(scaling.short_factor) == d_rotary, value=len(scaling.short_factor))  # fmt: skip
    if isinstance(scaling, DynamicScaling):  # its exponent is d_rotary / (d_rotary - 2)
        rules.must("position.scaling", "turns more than one pair", d_rotary > 2, value="dynamic")


# --- feed-forward -----------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Dense:
    """Two matrices, or three when `gated` (SwiGLU is silu gated, GeGLU gelu gated)."""

    d_ff: int
    activation: Activation = "gelu"
    gated: bool = False
    bias: bool = False
    dropout: float = 0.0
    kind: Literal["dense"] = "dense"

    def __post_init__(self) -> None:
        Rules(self).size("d_ff").one_of("activation", Activation).share("dropout").close()


@dataclass(frozen=True, slots=True)
class Experts:
    """A mixture of experts: each token goes to `n_active` of `n_experts`.

    `shared` is read by every token, `shared_gate` scales it by a learned gate
    (Qwen2-MoE). `router_bias` is a trained bias on the router's scores, `score_correction`
    the auxiliary-loss-free correction that is a buffer, not a weight (DeepSeek-V3).
    """

    n_experts: int
    n_active: int
    expert: Dense
    shared: Dense | None = None
    shared_gate: bool = False
    router_bias: bool = False
    score_correction: bool = False
    score: Literal["softmax", "sigmoid"] = "softmax"
    normalize: bool = True
    scale: float = 1.0
    n_groups: int = 1
    n_active_groups: int = 1
    kind: Literal["experts"] = "experts"

    def __post_init__(self) -> None:
        rules = (
            Rules(self).size("n_experts").size("n_active").size("n_groups").size("n_active_groups")
        )
        if not rules.broken:
            rules.must("n_active", f"is at most n_experts={self.n_experts}",
                       self.n_active <= self.n_experts)  # fmt: skip
            rules.divides("n_groups", "n_experts")
            rules.must("n_active_groups", f"is at most n_groups={self.n_groups}",
                       self.n_active_groups <= self.n_groups)  # fmt: skip
        rules.close()


FeedForward: TypeAlias = Dense | Experts

# --- layers and the whole ---------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Layer:
    """One layer: attention, feed-forward, their norm and how they are wired.

    `name` is the layer's place in every tree (`layer/attention/k`); layers of one name
    are equal. `cross` is attention to an encoder's output.
    """

    attention: Attention | LatentAttention
    feed_forward: FeedForward
    norm: Norm
    wiring: Wiring = Wiring.PRE
    cross: Attention | None = None
    residual_scale: float = 1.0
    dropout: float = 0.0
    name: str = "layer"

    def __post_init__(self) -> None:
        rules = Rules(self).identifier("name").share("dropout").one_of("wiring", tuple(Wiring))
        rules.real("residual_scale", above=0).close()


@dataclass(frozen=True, slots=True)
class Embedding:
    """Tokens to vectors.

    `n_rows` is the number of rows stored, at least vocab_size: padding is explicit.
    `d_embed` other than d_model adds a projection. `scale` multiplies the vectors.
    """

    n_rows: int
    position: Learned | Sinusoidal | None = None
    norm: Norm | None = None
    d_embed: int | None = None
    scale: float = 1.0
    dropout: float = 0.0

    def __post_init__(self) -> None:
        rules = Rules(self).size("n_rows").share("dropout").real("scale", above=0)
        if self.d_embed is not None:
            rules.size("d_embed")
        rules.close()


@dataclass(frozen=True, slots=True)
class Head:
    """Vectors to logits. `tied` reuses the embedding's matrix.

    `scale` multiplies the logits, `softcap` c replaces a logit z by c tanh(z / c).
    """

    tied: bool = False
    bias: bool = False
    scale: float = 1.0
    softcap: float | None = None

    def __post_init__(self) -> None:
        rules = Rules(self).real("scale", above=0)
        if self.softcap is not None:
            rules.real("softcap", above=0)
        rules.close()


@dataclass(frozen=True, slots=True)
class Encoder:
    """The encoder of an encoder-decoder model; it shares the decoder's embedding."""

    layers: tuple[Layer, ...]
    final_norm: Norm | None
    max_seq_len: int

    def __post_init__(self) -> None:
        rules = Rules(self).size("max_seq_len")
        check_layers(rules, self.layers)
        rules.close()


@dataclass(frozen=True, slots=True)
class VisionTower:
    """A vision transformer and the projector into the language model's width.

    Patches of `patch` x `patch` pixels and `channels` colours; `class_token` adds one
    trained token. The projector is `projector` linear maps, the first into d_model.
    """

    d_model: int
    layers: tuple[Layer, ...]
    image: int
    patch: int
    channels: int = 3
    class_token: bool = True
    patch_bias: bool = False
    pre_norm: Norm | None = None
    final_norm: Norm | None = None
    projector: int = 2
    projector_bias: bool = True

    def __post_init__(self) -> None:
        rules = Rules(self).size("d_model").size("image").size("patch").size("channels")
        rules.size("projector")
        if not rules.broken:
            rules.divides("patch", "image")
        check_layers(rules, self.layers)
        rules.close()


@dataclass(frozen=True)
class Arch:
    """A language model, whole.

    Attributes:
        name: what it is called; free text of at most 128 printable characters.
        d_model: D, the width of the residual stream.
        vocab_size: V, the number of tokens that can be read and written.
        max_seq_len: the longest context it was made for.
        layers: one `Layer` per layer, first to last; equal layers share one name.

    Raises:
        InputError: any rule broken; all broken rules are listed.
    """

    name: str
    d_model: int
    vocab_size: int
    max_seq_len: int
    embedding: Embedding
    layers: tuple[Layer, ...]
    head: Head
    final_norm: Norm | None
    encoder: Encoder | None = None
    vision: VisionTower | None = None

    MAX_LAYERS: ClassVar[int] = 10_000

    def __post_init__(self) -> None:
        rules = Rules(self, where=self.name if isinstance(self.name, str) else "spec")
        rules.text("name").size("d_model").size("vocab_size").size("max_seq_len")
        check_layers(rules, self.layers)
        if not rules.broken:
            rules.must("embedding.n_rows", f"is at least vocab_size={self.vocab_size}",
                       self.embedding.n_rows >= self.vocab_size)  # fmt: skip
            crossed = any(layer.cross for layer in self.layers)
            rules.must("layers.cross", "is set if and only if there is an encoder",
                       crossed == (self.encoder is not None))  # fmt: skip
            learned = self.embedding.position
            if isinstance(learned, Learned):
                rules.must("max_seq_len", f"is at most embedding.position.n_positions="
                           f"{learned.n_positions}", self.max_seq_len <= learned.n_positions)  # fmt: skip
        rules.close()

    @property
    def n_layers(self) -> int:
        return len(self.layers)

    @cached_property
    def kinds(self) -> dict[str, Layer]:
        """The distinct layers by name, in order of first appearance."""
        return {layer.name: layer for layer in self.layers}

    def times(self, name: str) -> int:
        """How many layers are of the kind `name`."""
        return sum(layer.name == name for layer in self.layers)

    def attentions(self) -> Iterator[Attention | LatentAttention]:
        """Each layer's self-attention, first to last."""
        return (layer.attention for layer in self.layers)


def check_layers(rules: Rules, layers: tuple[Layer, ...]) -> None:
    """At least one layer, not absurdly many, and one name per kind."""
    rules.must("layers", f"has 1 to {Arch.MAX_LAYERS:,} layers", 1 <= len(layers) <= Arch.MAX_LAYERS,
               value=len(layers))  # fmt: skip
    seen: dict[str, Layer] = {}
    for layer in layers:
        if seen.setdefault(layer.name, layer) != layer:
            rules.must("layers.name", "names one kind of layer: unequal layers need two names",
                       False, value=layer.name)  # fmt: skip
            break
