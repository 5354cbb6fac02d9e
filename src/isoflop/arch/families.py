"""The families: an `Arch` from the few numbers that vary within each.

The zoo and the Hugging Face reader both build through here, so a family's
structure is written once.
"""

from __future__ import annotations

from isoflop.arch.rules import LARGEST_SIZE
from isoflop.arch.spec import (
    Activation,
    Arch,
    Attention,
    Dense,
    Embedding,
    Head,
    Layer,
    LayerNorm,
    Learned,
    RmsNorm,
    Rope,
    RopeScaling,
    Wiring,
)
from isoflop.errors import InputError, Problem


def gpt(
    name: str,
    *,
    d_model: int,
    n_layers: int,
    n_heads: int,
    vocab_size: int,
    max_seq_len: int,
    d_head: int | None = None,
    d_ff: int | None = None,
    n_rows: int | None = None,
    activation: Activation = "gelu_tanh",
    eps: float = 1e-5,
    tied: bool = True,
    dropout: float = 0.0,
    dropout_attention: float | None = None,
    dropout_embedding: float | None = None,
) -> Arch:
    """GPT-2 and GPT-3: learned positions, pre-norm LayerNorm, biases, GELU, tied head.

    Source: Radford 2019, section 2.3; Brown 2020 (2005.14165), table 2.1.

    >>> gpt("gpt2", d_model=768, n_layers=12, n_heads=12, vocab_size=50257,
    ...     max_seq_len=1024).layers[0].feed_forward.d_ff
    3072
    """
    norm = LayerNorm(eps=eps)
    layer = Layer(
        attention=Attention(
            n_heads=n_heads,
            n_kv_heads=n_heads,
            d_head=_head_size(name, d_model, n_heads, d_head),
            bias_qkv=True,
            bias_out=True,
            dropout=dropout if dropout_attention is None else dropout_attention,
        ),
        feed_forward=Dense(4 * d_model if d_ff is None else d_ff, activation, bias=True),
        norm=norm,
        dropout=dropout,
    )
    embedding = Embedding(
        n_rows=vocab_size if n_rows is None else n_rows,
        position=Learned(max_seq_len),
        dropout=dropout if dropout_embedding is None else dropout_embedding,
    )
    return Arch(
        name=name,
        d_model=d_model,
        vocab_size=vocab_size,
        max_seq_len=max_seq_len,
        embedding=embedding,
        layers=_repeat(name, layer, n_layers),
        head=Head(tied=tied),
        final_norm=norm,
    )


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
    norm = RmsNorm(eps=eps)
    layer = Layer(
        attention=Attention(
            n_heads=n_heads,
            n_kv_heads=n_heads if n_kv_heads is None else n_kv_heads,
            d_head=_head_size(name, d_model, n_heads, d_head),
            position=Rope(theta=theta, scaling=scaling),
            bias_qkv=bias_attention,
            bias_out=bias_attention,
            dropout=dropout_attention,
        ),
        feed_forward=Dense(d_ff, activation, gated=True, bias=bias_feed_forward),
        norm=norm,
    )
    return Arch(
        name=name,
        d_model=d_model,
        vocab_size=vocab_size,
        max_seq_len=max_seq_len,
        embedding=Embedding(n_rows=vocab_size if n_rows is None else n_rows),
        layers=_repeat(name, layer, n_layers),
        head=Head(tied=tied),
        final_norm=norm,
    )


def palm(
    name: str,
    *,
    d_model: int,
    n_layers: int,
    n_heads: int,
    d_head: int,
    d_ff: int,
    vocab_size: int,
    max_seq_len: int,
) -> Arch:
    """PaLM: parallel attention and SwiGLU, multi-query attention, rotary, no biases, tied.

    Source: Chowdhery 2022 (2204.02311), section 2 and table 1.
    """
    norm = LayerNorm(bias=False)
    layer = Layer(
        attention=Attention(n_heads, n_kv_heads=1, d_head=d_head, position=Rope()),
        feed_forward=Dense(d_ff, "silu", gated=True),
        norm=norm,
        wiring=Wiring.PARALLEL,
    )
    return Arch(
        name=name,
        d_model=d_model,
        vocab_size=vocab_size,
        max_seq_len=max_seq_len,
        embedding=Embedding(n_rows=vocab_size),
        layers=_repeat(name, layer, n_layers),
        head=Head(tied=True),
        final_norm=norm,
    )


def _repeat(name: str, layer: Layer, n_layers: int) -> tuple[Layer, ...]:
    whole = isinstance(n_layers, int) and not isinstance(n_layers, bool)
    if not whole or not 1 <= n_layers <= Arch.MAX_LAYERS:
        rule = f"is a whole number from 1 to {Arch.MAX_LAYERS:,}"
        raise InputError(name, [Problem("n_layers", n_layers, rule)])
    return (layer,) * n_layers


def _head_size(name: str, d_model: int, n_heads: int, d_head: int | None) -> int:
    """The head size given, or d_model / n_heads where that is whole."""
    if d_head is not None:
        return d_head
    sizes = {"d_model": d_model, "n_heads": n_heads}
    bad = [
        Problem(field, value, f"is a whole number from 1 to {LARGEST_SIZE:,}")
        for field, value in sizes.items()
        if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= LARGEST_SIZE
    ]
    if not bad and d_model % n_heads:
        rule = f"divides d_model={d_model} when no head size is given"
        bad = [Problem("n_heads", n_heads, rule, "set d_head")]
    if bad:
        raise InputError(name, bad)
    return d_model // n_heads
