"""T5: an encoder and a decoder that share their embedding."""

from __future__ import annotations

from dataclasses import replace

from isoflop.arch.families.common import repeat
from isoflop.arch.spec import (
    Activation,
    Arch,
    Attention,
    Dense,
    Embedding,
    Encoder,
    Head,
    Layer,
    RelativeBias,
    RmsNorm,
)


def t5(
    name: str,
    *,
    d_model: int,
    n_layers: int,
    n_heads: int,
    d_ff: int,
    d_head: int = 64,
    n_decoder_layers: int | None = None,
    vocab_size: int = 32128,
    max_seq_len: int = 512,
    activation: Activation = "relu",
    gated: bool = False,
    tied: bool = True,
    eps: float = 1e-6,
    dropout: float = 0.0,
    n_buckets: int = 32,
    max_distance: int = 128,
) -> Arch:
    """T5 1.0 (ReLU, tied) and, with `gated` GELU and untied, 1.1.

    A bias per head and distance bucket is learned once per stack, scores are not scaled,
    and a tied head scales its input by d_model ** -0.5. `n_layers` are the encoder's.
    Source: Raffel 2020 (1910.10683), section 2.1; github.com/google-research/
    text-to-text-transfer-transformer, released_checkpoints.md (1.1).
    """
    norm = RmsNorm(eps)

    def attention(position: RelativeBias | None) -> Attention:
        return Attention(n_heads, n_heads, d_head, position, scale=1.0, dropout=dropout)

    layer = Layer(
        attention=attention(RelativeBias(n_buckets, max_distance)),
        feed_forward=Dense(d_ff, activation, gated=gated, dropout=dropout),
        norm=norm,
        cross=attention(None),
        dropout=dropout,
    )
    both_ways = RelativeBias(n_buckets, max_distance, bidirectional=True)
    encoder_layer = replace(layer, attention=attention(both_ways), cross=None)
    n_decoder_layers = n_layers if n_decoder_layers is None else n_decoder_layers
    return Arch(
        name=name,
        d_model=d_model,
        vocab_size=vocab_size,
        max_seq_len=max_seq_len,
        embedding=Embedding(n_rows=vocab_size, dropout=dropout),
        layers=repeat(name, layer, n_decoder_layers),
        head=Head(tied=tied, scale=d_model**-0.5 if tied and d_model > 0 else 1.0),
        final_norm=norm,
        encoder=Encoder(repeat(name, encoder_layer, n_layers), norm, max_seq_len),
    )
