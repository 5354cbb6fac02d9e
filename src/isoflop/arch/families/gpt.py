"""GPT-2 and those built like it: learned or relative positions, two-matrix feed-forwards."""

from __future__ import annotations

from dataclasses import replace

from isoflop.arch.families.common import attend, decoder, each, head_size
from isoflop.arch.spec import (
    Activation,
    Arch,
    Attention,
    Dense,
    Embedding,
    Layer,
    LayerNorm,
    Learned,
    RelativeProjection,
    RmsNorm,
    Wiring,
)


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
    layer = Layer(
        attention=Attention(
            n_heads=n_heads,
            n_kv_heads=n_heads,
            d_head=head_size(name, d_model, n_heads, d_head),
            bias_qkv=True,
            bias_out=True,
            dropout=dropout if dropout_attention is None else dropout_attention,
        ),
        feed_forward=Dense(4 * d_model if d_ff is None else d_ff, activation, bias=True),
        norm=LayerNorm(eps=eps),
        dropout=dropout,
    )
    embedding = Embedding(
        n_rows=vocab_size if n_rows is None else n_rows,
        position=Learned(max_seq_len),
        dropout=dropout if dropout_embedding is None else dropout_embedding,
    )
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


def opt(
    name: str,
    *,
    d_model: int,
    n_layers: int,
    n_heads: int,
    d_ff: int,
    vocab_size: int,
    max_seq_len: int,
    d_embed: int | None = None,
    norm_first: bool = True,
    final_norm: bool = True,
    bias: bool = True,
    norm_weights: bool = True,
    tied: bool = True,
    activation: Activation = "relu",
    dropout: float = 0.0,
    dropout_attention: float = 0.0,
) -> Arch:
    """OPT: GPT-3's shape with ReLU and two unused rows of positions; 350m is post-norm.

    Source: Zhang 2022 (2205.01068), table 1; the two rows from metaseq's padding offset.
    """
    norm = LayerNorm(weight=norm_weights, bias=norm_weights)
    layer = Layer(
        attention=Attention(
            n_heads=n_heads,
            n_kv_heads=n_heads,
            d_head=head_size(name, d_model, n_heads),
            bias_qkv=bias,
            bias_out=bias,
            dropout=dropout_attention,
        ),
        feed_forward=Dense(d_ff, activation, bias=bias),
        norm=norm,
        wiring=Wiring.PRE if norm_first else Wiring.POST,
        dropout=dropout,
    )
    whole = decoder(
        name,
        d_model=d_model,
        n_layers=n_layers,
        vocab_size=vocab_size,
        max_seq_len=max_seq_len,
        layer=layer,
        tied=tied,
        embedding=Embedding(
            n_rows=vocab_size,
            position=Learned(max_seq_len, offset=2),
            d_embed=None if d_embed == d_model else d_embed,
        ),
    )
    return whole if norm_first and final_norm else replace(whole, final_norm=None)


def gopher(
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
    """Gopher and Chinchilla: GPT-2 with RMSNorm and Transformer-XL's relative positions.

    Source: Rae 2021 (2112.11446), section 2.1 and table 1; Hoffmann 2022 (2203.15556), table 4.
    """
    plain = gpt(
        name,
        d_model=d_model,
        n_layers=n_layers,
        n_heads=n_heads,
        d_head=d_head,
        d_ff=d_ff,
        vocab_size=vocab_size,
        max_seq_len=max_seq_len,
    )
    norm = RmsNorm()
    moved = each(
        plain, lambda layer: replace(attend(layer, position=RelativeProjection()), norm=norm)
    )
    return replace(moved, embedding=Embedding(n_rows=vocab_size), final_norm=norm)
