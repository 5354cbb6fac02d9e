"""Attention and feed-forward side by side: GPT-NeoX, GPT-J, Phi, Falcon, PaLM."""

from __future__ import annotations

from isoflop.arch.families.common import decoder, head_size
from isoflop.arch.spec import (
    Activation,
    Alibi,
    Arch,
    Attention,
    Dense,
    Embedding,
    Head,
    Layer,
    LayerNorm,
    QkNorm,
    Rope,
    RopeScaling,
    Wiring,
)


def gpt_neox(
    name: str,
    *,
    d_model: int,
    n_layers: int,
    n_heads: int,
    d_ff: int,
    vocab_size: int,
    max_seq_len: int,
    n_rows: int | None = None,
    d_rotary: int | None = None,
    theta: float = 10_000.0,
    scaling: RopeScaling | None = None,
    activation: Activation = "gelu",
    eps: float = 1e-5,
    tied: bool = False,
    parallel: bool = True,
    bias_attention: bool = True,
    dropout: float = 0.0,
    dropout_attention: float = 0.0,
) -> Arch:
    """GPT-NeoX and Pythia: rotary on a part of each head, attention and feed-forward in parallel.

    Source: Black 2022 (2204.06745), section 2.1; Biderman 2023 (2304.01373), section 2.2.
    """
    layer = Layer(
        attention=Attention(
            n_heads=n_heads,
            n_kv_heads=n_heads,
            d_head=head_size(name, d_model, n_heads),
            position=Rope(theta, d_rotary, scaling=scaling),
            bias_qkv=bias_attention,
            bias_out=bias_attention,
            dropout=dropout_attention,
        ),
        feed_forward=Dense(d_ff, activation, bias=True),
        norm=LayerNorm(eps=eps),
        wiring=Wiring.PARALLEL_TWO_NORMS if parallel else Wiring.PRE,
        dropout=dropout,
    )
    embedding = Embedding(n_rows=vocab_size if n_rows is None else n_rows, dropout=dropout)
    return decoder(
        name,
        d_model=d_model,
        n_layers=n_layers,
        vocab_size=vocab_size,
        max_seq_len=max_seq_len,
        layer=layer,
        tied=tied,
        embedding=embedding,
    )


def gptj(
    name: str,
    *,
    d_model: int,
    n_layers: int,
    n_heads: int,
    vocab_size: int,
    max_seq_len: int,
    d_ff: int | None = None,
    d_rotary: int | None = 64,
    activation: Activation = "gelu_tanh",
    eps: float = 1e-5,
    tied: bool = False,
    dropout: float = 0.0,
    dropout_attention: float = 0.0,
    dropout_embedding: float = 0.0,
) -> Arch:
    """GPT-J: one norm read by attention and feed-forward, neighbours rotated, a biased head.

    Source: github.com/kingoflolz/mesh-transformer-jax (Wang and Komatsuzaki 2021).
    """
    layer = Layer(
        attention=Attention(
            n_heads=n_heads,
            n_kv_heads=n_heads,
            d_head=head_size(name, d_model, n_heads),
            position=Rope(d_rotary=d_rotary, interleaved=True),
            dropout=dropout_attention,
        ),
        feed_forward=Dense(4 * d_model if d_ff is None else d_ff, activation, bias=True),
        norm=LayerNorm(eps=eps),
        wiring=Wiring.PARALLEL,
        dropout=dropout,
    )
    return decoder(
        name,
        d_model=d_model,
        n_layers=n_layers,
        vocab_size=vocab_size,
        max_seq_len=max_seq_len,
        layer=layer,
        tied=tied,
        embedding=Embedding(n_rows=vocab_size, dropout=dropout_embedding),
        head=Head(tied=tied, bias=True),
    )


def phi(
    name: str,
    *,
    d_model: int,
    n_layers: int,
    n_heads: int,
    d_ff: int,
    vocab_size: int,
    max_seq_len: int,
    n_kv_heads: int | None = None,
    d_rotary: int | None = None,
    theta: float = 10_000.0,
    scaling: RopeScaling | None = None,
    activation: Activation = "gelu_tanh",
    eps: float = 1e-5,
    tied: bool = False,
    qk_norm: bool = False,
    dropout: float = 0.0,
    dropout_attention: float = 0.0,
    dropout_embedding: float = 0.0,
) -> Arch:
    """Phi-1, 1.5 and 2: parallel, rotary on a part of each head, biases up to the head.

    Source: Li 2023 (2309.05463), section 2.1; microsoft/phi-2 config.json.
    """
    norm = LayerNorm(eps=eps)
    layer = Layer(
        attention=Attention(
            n_heads=n_heads,
            n_kv_heads=n_heads if n_kv_heads is None else n_kv_heads,
            d_head=head_size(name, d_model, n_heads),
            position=Rope(theta, d_rotary, scaling=scaling),
            bias_qkv=True,
            bias_out=True,
            qk_norm=QkNorm(norm) if qk_norm else None,
            dropout=dropout_attention,
        ),
        feed_forward=Dense(d_ff, activation, bias=True),
        norm=norm,
        wiring=Wiring.PARALLEL,
        dropout=dropout,
    )
    return decoder(
        name,
        d_model=d_model,
        n_layers=n_layers,
        vocab_size=vocab_size,
        max_seq_len=max_seq_len,
        layer=layer,
        tied=tied,
        embedding=Embedding(n_rows=vocab_size, dropout=dropout_embedding),
        head=Head(tied=tied, bias=True),
    )


def falcon(
    name: str,
    *,
    d_model: int,
    n_layers: int,
    n_heads: int,
    vocab_size: int,
    max_seq_len: int,
    n_kv_heads: int = 1,
    d_ff: int | None = None,
    wiring: Wiring = Wiring.PARALLEL,
    alibi: bool = False,
    theta: float = 10_000.0,
    scaling: RopeScaling | None = None,
    bias: bool = False,
    activation: Activation = "gelu",
    eps: float = 1e-5,
    tied: bool = True,
    dropout: float = 0.0,
    dropout_attention: float = 0.0,
) -> Arch:
    """Falcon: 7B is multi-query under one norm, 40B and 180B are grouped under two.

    Source: Almazrouei 2023 (2311.16867), section 4; tiiuae/falcon-* config.json.
    """
    d_head = head_size(name, d_model, n_heads)
    layer = Layer(
        attention=Attention(
            n_heads=n_heads,
            n_kv_heads=n_kv_heads,
            d_head=d_head,
            position=Alibi(scale=d_head**-0.5) if alibi else Rope(theta, scaling=scaling),
            bias_qkv=bias,
            bias_out=bias,
            dropout=dropout_attention,
        ),
        feed_forward=Dense(4 * d_model if d_ff is None else d_ff, activation, bias=bias),
        norm=LayerNorm(eps=eps),
        wiring=Wiring(wiring),
        dropout=dropout,
    )
    return decoder(
        name,
        d_model=d_model,
        n_layers=n_layers,
        vocab_size=vocab_size,
        max_seq_len=max_seq_len,
        layer=layer,
        tied=tied,
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
    layer = Layer(
        attention=Attention(n_heads, n_kv_heads=1, d_head=d_head, position=Rope()),
        feed_forward=Dense(d_ff, "silu", gated=True),
        norm=LayerNorm(bias=False),
        wiring=Wiring.PARALLEL,
    )
    return decoder(
        name,
        d_model=d_model,
        n_layers=n_layers,
        vocab_size=vocab_size,
        max_seq_len=max_seq_len,
        layer=layer,
        tied=True,
    )
