"""Positions told by ALiBi: BLOOM and MPT."""

from __future__ import annotations

from isoflop.arch.families.common import decoder, head_size
from isoflop.arch.spec import Alibi, Arch, Attention, Dense, Embedding, Layer, LayerNorm


def bloom(
    name: str,
    *,
    d_model: int,
    n_layers: int,
    n_heads: int,
    vocab_size: int,
    max_seq_len: int,
    eps: float = 1e-5,
    dropout: float = 0.0,
    dropout_attention: float = 0.0,
    tied: bool = True,
) -> Arch:
    """BLOOM: ALiBi, a norm on the embeddings, biases, GELU.

    Source: BigScience 2022 (2211.05100), section 3.2 and table 3.
    """
    layer = Layer(
        attention=Attention(
            n_heads=n_heads,
            n_kv_heads=n_heads,
            d_head=head_size(name, d_model, n_heads),
            position=Alibi(),
            bias_qkv=True,
            bias_out=True,
            dropout=dropout_attention,
        ),
        feed_forward=Dense(4 * d_model, "gelu_tanh", bias=True),
        norm=LayerNorm(eps=eps),
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
        embedding=Embedding(n_rows=vocab_size, norm=LayerNorm(eps=eps)),
    )


def mpt(
    name: str,
    *,
    d_model: int,
    n_layers: int,
    n_heads: int,
    vocab_size: int,
    max_seq_len: int,
    d_ff: int | None = None,
    eps: float = 1e-5,
    scale: float | None = None,
    dropout_attention: float = 0.0,
    tied: bool = True,
) -> Arch:
    """MPT: ALiBi, no bias anywhere, GELU, tied.

    Source: MosaicML 2023 (mosaicml/mpt-7b model card and config.json).
    """
    layer = Layer(
        attention=Attention(
            n_heads=n_heads,
            n_kv_heads=n_heads,
            d_head=head_size(name, d_model, n_heads),
            position=Alibi(),
            scale=scale,
            dropout=dropout_attention,
        ),
        feed_forward=Dense(4 * d_model if d_ff is None else d_ff, "gelu"),
        norm=LayerNorm(eps=eps, bias=False),
        dropout=dropout_attention,
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
