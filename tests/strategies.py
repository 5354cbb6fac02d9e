"""Random legal specs, for properties that must hold of every model."""

from __future__ import annotations

from typing import Any

from hypothesis import strategies as st

from isoflop.arch.families import gpt, llama, palm
from isoflop.arch.spec import (
    Alibi,
    Arch,
    Attention,
    BlockSparse,
    Chunked,
    Dense,
    DynamicScaling,
    Embedding,
    Encoder,
    Experts,
    Full,
    Head,
    LatentAttention,
    Layer,
    LayerNorm,
    Learned,
    LinearScaling,
    Llama3Scaling,
    LongRopeScaling,
    Projector,
    QkNorm,
    RelativeBias,
    RelativeProjection,
    RmsNorm,
    Rope,
    Rope2d,
    RopeScaling,
    Sinusoidal,
    VisionTower,
    Window,
    Wiring,
    YarnScaling,
)

ACTIVATIONS = st.sampled_from(["relu", "gelu", "gelu_tanh", "silu", "relu_squared"])
ANY_ACTIVATION = st.one_of(ACTIVATIONS, st.sampled_from(["gelu_quick", "silu_clamped"]))
WORDS = st.text(
    st.characters(categories=["L", "N", "P", "S", "Zs"]), min_size=1, max_size=20
).filter(str.isprintable)
KIND_NAMES = st.one_of(
    st.from_regex(r"[a-z_][a-z0-9_]{0,8}", fullmatch=True), st.sampled_from(["layer", "été", "层"])
)
dropouts = st.one_of(st.just(0.0), st.floats(0, 0.9))
sizes = st.integers(1, 64)
factors = st.floats(1, 64)
QK_NORMS = st.sampled_from(["head", "each_head", "all_heads"])


def some(strategy: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    return st.one_of(st.none(), strategy)


norms = st.one_of(
    st.builds(LayerNorm, eps=st.floats(1e-8, 1e-3), weight=st.booleans(), bias=st.booleans()),
    st.builds(RmsNorm, eps=st.floats(1e-8, 1e-3), unit_offset=st.booleans()),
)

lengths = st.integers(16, 8192)
thetas = st.floats(1, 1e7, exclude_min=True)  # yarn divides by the logarithm


@st.composite
def scalings(draw: st.DrawFn, d_rotary: int) -> RopeScaling:
    """A scaling that can turn `d_rotary` dimensions."""
    per_pair = st.tuples(*[factors] * (d_rotary // 2))
    kinds: list[st.SearchStrategy[RopeScaling]] = [
        st.builds(LinearScaling, factors),
        st.builds(Llama3Scaling, factors, st.floats(0.5, 1), st.floats(2, 4), lengths),
        st.builds(
            YarnScaling,
            factor=factors,
            original_max_seq_len=lengths,
            beta_fast=st.floats(16, 64),
            attention_factor=some(st.floats(0.5, 2)),
            mscale=some(st.floats(0.5, 2)),
            truncate=st.booleans(),
        ),
        st.builds(LongRopeScaling, per_pair, per_pair, lengths),
    ]
    if d_rotary > 2:
        kinds.append(st.builds(DynamicScaling, factors))
    return draw(st.one_of(kinds))


spans = st.one_of(
    st.just(Full()),
    st.builds(Window, sizes),
    st.builds(Chunked, sizes),
    st.builds(BlockSparse, sizes, sizes, st.integers(0, 4)),
)


@st.composite
def ropes(draw: st.DrawFn, d_head: int) -> Rope:
    """Rotary positions that fit a head of `d_head`, which must be even."""
    halves = st.integers(1, d_head // 2)
    d_rotary = draw(some(halves.map(lambda half: 2 * half)))
    scaling = draw(some(scalings(d_rotary or d_head)))
    sections = None
    if not isinstance(scaling, DynamicScaling | LongRopeScaling) and draw(st.booleans()):
        pairs = (d_rotary or d_head) // 2
        ends = sorted([draw(st.integers(0, pairs)), draw(st.integers(0, pairs))])
        sections = (ends[0], ends[1] - ends[0], pairs - ends[1])
    return Rope(draw(thetas), d_rotary, draw(st.booleans()), scaling, sections)


@st.composite
def attentions(draw: st.DrawFn) -> Attention:
    n_kv_heads = draw(st.integers(1, 4))
    d_head = 2 * draw(st.integers(1, 16))
    positions = st.one_of(
        st.none(),
        ropes(d_head),
        st.builds(Rope2d, thetas) if d_head % 4 == 0 else st.none(),
        st.builds(Alibi, st.floats(0.01, 2)),
        st.just(RelativeProjection()),
        st.builds(RelativeBias, sizes, sizes, st.booleans(), st.booleans()),
    )
    return Attention(
        n_heads=n_kv_heads * draw(st.integers(1, 4)),
        n_kv_heads=n_kv_heads,
        d_head=d_head,
        position=draw(positions),
        span=draw(spans),
        bias_qkv=draw(st.booleans()),
        bias_out=draw(st.booleans()),
        qk_norm=draw(some(st.builds(QkNorm, norms, QK_NORMS))),
        scale=draw(some(st.floats(0.01, 2))),
        logit_softcap=draw(some(st.floats(1, 100))),
        sinks=draw(st.booleans()),
        dropout=draw(dropouts),
    )


@st.composite
def latent_attentions(draw: st.DrawFn) -> LatentAttention:
    d_head_rope = 2 * draw(st.integers(1, 8))
    return LatentAttention(
        n_heads=draw(st.integers(1, 8)),
        d_kv_latent=draw(sizes),
        d_head_nope=draw(sizes),
        d_head_rope=d_head_rope,
        d_head_value=draw(sizes),
        d_q_latent=draw(some(sizes)),
        position=Rope(
            draw(thetas), interleaved=draw(st.booleans()), scaling=draw(some(scalings(d_head_rope)))
        ),
        norm=draw(norms),
        scale=draw(some(st.floats(0.01, 2))),
        dropout=draw(dropouts),
    )


dense = st.builds(
    Dense, sizes, ANY_ACTIVATION, gated=st.booleans(), bias=st.booleans(), dropout=dropouts
)


@st.composite
def experts(draw: st.DrawFn) -> Experts:
    n_groups = draw(st.integers(1, 3))
    n_experts = n_groups * draw(st.integers(1, 4))
    n_active_groups = draw(st.integers(1, n_groups))
    return Experts(
        n_experts=n_experts,
        n_active=draw(st.integers(1, n_active_groups * (n_experts // n_groups))),
        expert=draw(dense),
        shared=draw(some(dense)),
        router_bias=draw(st.booleans()),
        score_correction=draw(st.booleans()),
        score=draw(st.sampled_from(["softmax", "sigmoid"])),
        normalize=draw(st.booleans()),
        scale=draw(st.floats(0.5, 3)),
        n_groups=n_groups,
        n_active_groups=n_active_groups,
    )


@st.composite
def layers(draw: st.DrawFn, name: str = "layer", crossed: bool = False) -> Layer:
    return Layer(
        attention=draw(st.one_of(attentions(), latent_attentions())),
        feed_forward=draw(st.one_of(dense, experts())),
        norm=draw(norms),
        wiring=draw(st.sampled_from(Wiring)),
        cross=draw(attentions()) if crossed else None,
        residual_scale=draw(st.floats(0.1, 2)),
        dropout=draw(dropouts),
        name=name,
    )


@st.composite
def stacks(draw: st.DrawFn, crossed: bool = False) -> tuple[Layer, ...]:
    """One to nine layers of one to three kinds."""
    names = draw(st.lists(KIND_NAMES, min_size=1, max_size=3, unique=True))
    kinds = [draw(layers(name, crossed)) for name in names]
    return tuple(draw(st.lists(st.sampled_from(kinds), min_size=1, max_size=9)))


@st.composite
def embeddings(draw: st.DrawFn, vocab_size: int, max_seq_len: int) -> Embedding:
    learned = st.builds(
        Learned, n_positions=st.integers(max_seq_len, 300), offset=st.integers(0, 2)
    )
    return Embedding(
        n_rows=vocab_size + draw(st.integers(0, 64)),
        position=draw(st.one_of(st.none(), learned, st.just(Sinusoidal()))),
        norm=draw(some(norms)),
        d_embed=draw(some(sizes)),
        scale=draw(st.floats(0.5, 100)),
        dropout=draw(dropouts),
    )


@st.composite
def encoders(draw: st.DrawFn) -> Encoder:
    return Encoder(draw(stacks()), draw(some(norms)), draw(st.integers(1, 256)))


@st.composite
def visions(draw: st.DrawFn) -> VisionTower:
    patch, merge = draw(st.integers(1, 16)), draw(st.integers(1, 3))
    layers = draw(stacks())
    projector = Projector(
        n_maps=draw(st.integers(1, 3)),
        bias=draw(st.booleans()),
        norm=draw(some(norms)),
        merge=merge,
        averaged=draw(st.booleans()),
        d_hidden=draw(some(sizes)),
    )
    return VisionTower(
        d_model=draw(sizes),
        layers=layers,
        image=patch * merge * draw(st.integers(1, 8)),
        patch=patch,
        class_token=draw(st.booleans()),
        pre_norm=draw(some(norms)),
        final_norm=draw(some(norms)),
        positions=draw(st.booleans()),
        projector=projector,
        feature_layer=draw(some(st.integers(0, len(layers)))),
        both_ways=draw(st.booleans()),
        frames=draw(st.integers(1, 2)),
    )


@st.composite
def gpts(draw: st.DrawFn) -> Arch:
    """GPT-2-shaped specs of which transformers can build the class."""
    n_heads, d_head = draw(st.integers(1, 4)), draw(st.integers(1, 16))
    return gpt(
        draw(WORDS),
        d_model=n_heads * d_head,
        n_layers=draw(st.integers(1, 4)),
        n_heads=n_heads,
        d_ff=draw(some(sizes)),
        vocab_size=draw(st.integers(2, 300)),
        max_seq_len=draw(st.integers(1, 256)),
        activation=draw(ACTIVATIONS),
        eps=draw(st.floats(1e-8, 1e-3)),
        tied=draw(st.booleans()),
        dropout=draw(dropouts),
        dropout_attention=draw(dropouts),
        dropout_embedding=draw(dropouts),
    )


@st.composite
def llamas(draw: st.DrawFn) -> Arch:
    """Llama-shaped specs of which transformers can build the class."""
    n_kv_heads, groups = draw(st.integers(1, 3)), draw(st.integers(1, 4))
    n_heads = n_kv_heads * groups
    d_model = n_heads * 2 * draw(st.integers(1, 8))
    d_head = draw(some(st.integers(1, 16).map(lambda half: 2 * half)))
    return llama(
        draw(WORDS),
        d_model=d_model,
        n_layers=draw(st.integers(1, 4)),
        n_heads=n_heads,
        n_kv_heads=n_kv_heads,
        d_head=d_head,
        d_ff=draw(sizes),
        vocab_size=draw(st.integers(2, 300)),
        max_seq_len=draw(st.integers(64, 256)),
        theta=draw(st.floats(2, 1e7)),
        scaling=draw(some(scalings(d_head or d_model // n_heads))),
        activation=draw(ACTIVATIONS),
        eps=draw(st.floats(1e-8, 1e-3)),
        tied=draw(st.booleans()),
        bias_attention=draw(st.booleans()),
        bias_feed_forward=draw(st.booleans()),
        dropout_attention=draw(dropouts),
    )


@st.composite
def palms(draw: st.DrawFn) -> Arch:
    return palm(
        draw(WORDS),
        d_model=draw(sizes),
        n_layers=draw(st.integers(1, 4)),
        n_heads=draw(st.integers(1, 8)),
        d_head=2 * draw(st.integers(1, 16)),
        d_ff=draw(sizes),
        vocab_size=draw(st.integers(1, 300)),
        max_seq_len=draw(st.integers(1, 256)),
    )


@st.composite
def archs(draw: st.DrawFn) -> Arch:
    """Any legal spec: kinds of layer, wirings, experts, latents, windows, encoder, vision."""
    vocab_size, max_seq_len = draw(st.integers(1, 300)), draw(st.integers(1, 256))
    encoder = draw(some(encoders()))
    return Arch(
        name=draw(WORDS),
        d_model=draw(sizes),
        vocab_size=vocab_size,
        max_seq_len=max_seq_len,
        embedding=draw(embeddings(vocab_size, max_seq_len)),
        layers=draw(stacks(crossed=encoder is not None)),
        head=Head(draw(st.booleans()), draw(st.booleans()), draw(st.floats(0.1, 2)),
                  draw(some(st.floats(1, 100)))),
        final_norm=draw(some(norms)),
        encoder=encoder,
        vision=draw(some(visions())),
    )  # fmt: skip
