"""Llama and its relatives: rotary positions, gated feed-forwards, no biases or few."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Required, TypedDict, Unpack

from isoflop.arch.families.common import (
    at_position,
    attend,
    decoder,
    each,
    every,
    grouped,
    head_size,
    split,
    with_norm,
    with_window,
)
from isoflop.arch.spec import (
    Activation,
    Arch,
    Attention,
    Dense,
    Head,
    Layer,
    LayerNorm,
    QkNorm,
    RmsNorm,
    Rope,
    RopeScaling,
    Wiring,
)


class Numbers(TypedDict, total=False):
    """The arguments of `llama`, which its relatives take too."""

    d_model: Required[int]
    n_layers: Required[int]
    n_heads: Required[int]
    d_ff: Required[int]
    vocab_size: Required[int]
    max_seq_len: Required[int]
    n_kv_heads: int | None
    d_head: int | None
    n_rows: int | None
    theta: float
    d_rotary: int | None
    scaling: RopeScaling | None
    activation: Activation
    eps: float
    tied: bool
    bias_attention: bool
    bias_feed_forward: bool
    dropout_attention: float


def llama(
    name: str,
    *,
    d_model: int,
    n_layers: int,
    n_heads: int,
    d_ff: int,
    vocab_size: int,
    max_seq_len: int,
    n_kv_heads: int | None = None,
    d_head: int | None = None,
    n_rows: int | None = None,
    theta: float = 10_000.0,
    d_rotary: int | None = None,
    scaling: RopeScaling | None = None,
    activation: Activation = "silu",
    eps: float = 1e-5,
    tied: bool = False,
    bias_attention: bool = False,
    bias_feed_forward: bool = False,
    dropout_attention: float = 0.0,
) -> Arch:
    """Llama 1 to 3: rotary positions, pre-norm RMSNorm, SwiGLU, grouped-query attention.

    Source: Touvron 2023 (2302.13971), section 2.2; Dubey 2024 (2407.21783), table 3.

    >>> llama("tiny", d_model=64, n_layers=2, n_heads=4, n_kv_heads=2, d_ff=172,
    ...       vocab_size=256, max_seq_len=128).layers[0].attention.d_head
    16
    """
    layer = Layer(
        attention=Attention(
            n_heads=n_heads,
            n_kv_heads=n_heads if n_kv_heads is None else n_kv_heads,
            d_head=head_size(name, d_model, n_heads, d_head),
            position=Rope(theta=theta, d_rotary=d_rotary, scaling=scaling),
            bias_qkv=bias_attention,
            bias_out=bias_attention,
            dropout=dropout_attention,
        ),
        feed_forward=Dense(d_ff, activation, gated=True, bias=bias_feed_forward),
        norm=RmsNorm(eps=eps),
    )
    return decoder(
        name,
        d_model=d_model,
        n_layers=n_layers,
        vocab_size=vocab_size,
        max_seq_len=max_seq_len,
        layer=layer,
        tied=tied,
        n_rows=n_rows,
    )


def mistral(
    name: str,
    *,
    window: int | None = None,
    dropout: float = 0.0,
    dropout_embedding: float = 0.0,
    **numbers: Unpack[Numbers],
) -> Arch:
    """Mistral: Llama with a sliding window in every layer. Phi-3 is it, too.

    Source: Jiang 2023 (2310.06825), section 2; Abdin 2024 (2404.14219), section 2.
    """
    plain = with_window(llama(name, **numbers), window)
    dropped = each(plain, lambda layer: replace(layer, dropout=dropout))
    return replace(dropped, embedding=replace(plain.embedding, dropout=dropout_embedding))


def qwen2(
    name: str,
    *,
    window: int | None = None,
    local: Sequence[bool] | None = None,
    **numbers: Unpack[Numbers],
) -> Arch:
    """Qwen 2 and 2.5: Llama with biases on queries, keys and values.

    Source: Yang 2024 (2407.10671), section 2.2; Qwen 2024 (2412.15115), table 1.
    """
    plain = each(llama(name, **numbers), lambda layer: attend(layer, bias_qkv=True))
    return with_window(plain, window, local)


def qwen3(
    name: str,
    *,
    window: int | None = None,
    local: Sequence[bool] | None = None,
    **numbers: Unpack[Numbers],
) -> Arch:
    """Qwen 3: Llama with a norm on each head's queries and keys.

    Source: Qwen 2025 (2505.09388), section 2 and table 1.
    """
    plain = llama(name, **numbers)
    qk_norm = QkNorm(plain.layers[0].norm)
    return with_window(each(plain, lambda layer: attend(layer, qk_norm=qk_norm)), window, local)


def granite(
    name: str,
    *,
    scale: float = 1.0,
    residual_scale: float = 1.0,
    embedding_scale: float = 1.0,
    logits_divisor: float = 1.0,
    **numbers: Unpack[Numbers],
) -> Arch:
    """Granite 3: Llama with four multipliers (of scores, residuals, embeddings, logits).

    Source: ibm-granite/granite-3.0-8b-base config.json and model card.
    """
    plain = llama(name, **numbers)
    scaled = each(
        plain, lambda layer: replace(attend(layer, scale=scale), residual_scale=residual_scale)
    )
    return replace(
        scaled,
        embedding=replace(plain.embedding, scale=embedding_scale),
        head=replace(plain.head, scale=1 / logits_divisor if logits_divisor else 0.0),
    )


def smollm3(
    name: str, *, rotated: Sequence[bool] | None = None, **numbers: Unpack[Numbers]
) -> Arch:
    """SmolLM 3: Llama without positions in each fourth layer (NoPE).

    Source: HuggingFaceTB/SmolLM3-3B model card and config.json.
    """
    plain = llama(name, **numbers)
    turned = every(plain.n_layers, 4) if rotated is None else rotated
    bare = [not turn for turn in turned]
    return split(plain, bare, at_position(None), ("unrotated", "rotated"))


def olmo(name: str, **numbers: Unpack[Numbers]) -> Arch:
    """OLMo 1: Llama with a LayerNorm that trains nothing.

    Source: Groeneveld 2024 (2402.00838), section 2.1 and table 1.
    """
    return with_norm(llama(name, **numbers), LayerNorm(eps=1e-5, weight=False, bias=False))


def olmo2(name: str, **numbers: Unpack[Numbers]) -> Arch:
    """OLMo 2: Llama with norms on the blocks' outputs and on all queries and keys.

    Source: OLMo 2025 (2501.00656), section 2.2.
    """
    plain = llama(name, **numbers)
    qk_norm = QkNorm(plain.layers[0].norm, per="all_heads")
    return each(plain, lambda layer: replace(attend(layer, qk_norm=qk_norm), wiring=Wiring.OUTPUT))


def glm4(name: str, **numbers: Unpack[Numbers]) -> Arch:
    """GLM-4 (0414): Llama in a sandwich of norms, half of each head rotated by neighbours.

    `bias_attention` is on queries, keys and values only. Source: THUDM/GLM-4-9B-0414
    config.json.
    """
    plain = llama(name, **numbers)

    def change(layer: Layer) -> Layer:
        position = grouped(layer).position
        assert isinstance(position, Rope)
        turned = attend(layer, position=replace(position, interleaved=True), bias_out=False)
        return replace(turned, wiring=Wiring.SANDWICH)

    return each(plain, change)


def stablelm(
    name: str,
    *,
    bias_qkv: bool = False,
    parallel: bool = False,
    qk_norm: bool = False,
    dropout: float = 0.0,
    **numbers: Unpack[Numbers],
) -> Arch:
    """StableLM 3B and 2: Llama with LayerNorm and a quarter of each head rotated.

    Source: Bellagente 2024 (2402.17834), section 2.3; stabilityai/stablelm-* config.json.
    """
    eps = numbers.get("eps", 1e-5)
    plain = with_norm(llama(name, **numbers), LayerNorm(eps=eps))
    # StableLmLayerNormPerHead keeps its own eps of 1e-5, whatever the config says.
    per_head = QkNorm(LayerNorm(eps=eps, bias=False), per="each_head") if qk_norm else None

    def change(layer: Layer) -> Layer:
        biased = attend(layer, bias_qkv=bias_qkv, qk_norm=per_head)
        wiring = Wiring.PARALLEL if parallel else Wiring.PRE
        return replace(biased, wiring=wiring, dropout=dropout)

    return each(plain, change)


def cohere(
    name: str, *, qk_norm: bool = False, logits_scale: float = 0.0625, **numbers: Unpack[Numbers]
) -> Arch:
    """Command R: Llama in parallel under one LayerNorm without bias, logits scaled, tied.

    Source: CohereForAI/c4ai-command-r-v01 config.json.
    """
    norm = LayerNorm(eps=numbers.get("eps", 1e-5), bias=False)
    plain = with_norm(llama(name, **numbers), norm)
    per_head = QkNorm(norm, per="each_head") if qk_norm else None

    def change(layer: Layer) -> Layer:
        position = grouped(layer).position
        assert isinstance(position, Rope)
        turned = attend(layer, position=replace(position, interleaved=True), qk_norm=per_head)
        return replace(turned, wiring=Wiring.PARALLEL)

    return replace(each(plain, change), head=Head(tied=plain.head.tied, scale=logits_scale))


def starcoder2(
    name: str,
    *,
    bias: bool = True,
    window: int | None = None,
    dropout: float = 0.0,
    dropout_embedding: float = 0.0,
    **numbers: Unpack[Numbers],
) -> Arch:
    """StarCoder2: rotary and grouped like Llama, LayerNorm, biases and GELU like GPT-2.

    Source: Lozhkov 2024 (2402.19173), table 8.
    """
    numbers["activation"] = numbers.get("activation", "gelu_tanh")
    plain = with_norm(llama(name, **numbers), LayerNorm(eps=numbers.get("eps", 1e-5)))

    def change(layer: Layer) -> Layer:
        assert isinstance(layer.feed_forward, Dense)
        dense = replace(layer.feed_forward, gated=False, bias=bias)
        biased = attend(layer, bias_qkv=bias, bias_out=bias)
        return replace(biased, feed_forward=dense, dropout=dropout)

    whole = with_window(each(plain, change), window)
    return replace(whole, embedding=replace(plain.embedding, dropout=dropout_embedding))
