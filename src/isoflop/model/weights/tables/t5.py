"""T5's names: a block is a list of layers, the feed-forward its last."""

from __future__ import annotations

from isoflop.arch.spec import Arch, Dense
from isoflop.model.weights.table import Names, Stack, Table


def _self_attention() -> Names:
    return _attention("attention", "norm_attention", "layer.0", "SelfAttention")


def _attention(ours: str, norm: str, place: str, theirs: str) -> Names:
    return {
        **{f"{ours}.{x}": f"{place}.{theirs}.{x}" for x in ("q", "k", "v")},
        f"{ours}.out": f"{place}.{theirs}.o",
        norm: f"{place}.layer_norm",
    }


def _feed_forward(place: str, *, gated: bool) -> Names:
    return {
        "feed_forward.gate": f"{place}.DenseReluDense.wi_0",
        "feed_forward.up": f"{place}.DenseReluDense.{'wi_1' if gated else 'wi'}",
        "feed_forward.down": f"{place}.DenseReluDense.wo",
        "norm_feed_forward": f"{place}.layer_norm",
    }


def t5(arch: Arch) -> Table:
    dense = arch.layers[0].feed_forward
    gated = isinstance(dense, Dense) and dense.gated
    whole: Names = {
        "embedding.tokens": "shared",
        "encoder.relative_bias": _bias_in("encoder"),
        "encoder.final_norm": "encoder.final_layer_norm",
        "relative_bias": _bias_in("decoder"),
        "final_norm": "decoder.final_layer_norm",
        "head": "lm_head",
    }
    reads = {**_self_attention(), **_feed_forward("layer.1", gated=gated)}
    writes = {
        **_self_attention(),
        **_attention("cross", "norm_cross", "layer.1", "EncDecAttention"),
        **_feed_forward("layer.2", gated=gated),
    }
    return Table(
        whole,
        (
            Stack("encoder.layers.{}.", "encoder.block.{}.", reads),
            Stack("layers.{}.", "decoder.block.{}.", writes),
        ),
        copies=("encoder.embed_tokens.weight", "decoder.embed_tokens.weight"),
        ignored=(r"decoder\.block\.0\.layer\.1\.EncDecAttention\.relative_attention_bias\.weight",),
    )


def _bias_in(stack: str) -> str:
    return f"{stack}.block.0.layer.0.SelfAttention.relative_attention_bias"


#: model_type -> what makes its table for a spec.
TABLES = {"t5": t5}
