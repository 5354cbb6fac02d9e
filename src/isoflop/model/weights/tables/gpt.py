"""The names of GPT-2, GPT-J, GPT-NeoX, OPT, BLOOM, MPT and Falcon."""

from __future__ import annotations

from isoflop.arch.spec import Arch, Attention, Wiring
from isoflop.errors import Fault
from isoflop.model.weights.change import Change, Grouped, Joined, Transposed
from isoflop.model.weights.table import QKV, Names, Stack, Stored, Table, joined

GPT2 = Table(
    {
        "embedding.tokens": "transformer.wte",
        "embedding.positions": "transformer.wpe",
        "final_norm": "transformer.ln_f",
        "head": "lm_head",
    },
    (
        Stack(
            "layers.{}.",
            "transformer.h.{}.",
            {
                QKV: Stored("attn.c_attn", Transposed(Joined())),
                "attention.out": Stored("attn.c_proj", Transposed()),
                "norm_attention": "ln_1",
                "norm_feed_forward": "ln_2",
                "feed_forward.up": Stored("mlp.c_fc", Transposed()),
                "feed_forward.down": Stored("mlp.c_proj", Transposed()),
            },
        ),
    ),
    prefix="transformer.",
    ignored=(r"transformer\.h\.\d+\.attn\.(masked_)?bias",),
)

GPTJ = Table(
    {
        "embedding.tokens": "transformer.wte",
        "final_norm": "transformer.ln_f",
        "head": "lm_head",
    },
    (
        Stack(
            "layers.{}.",
            "transformer.h.{}.",
            {
                "attention.q": "attn.q_proj",
                "attention.k": "attn.k_proj",
                "attention.v": "attn.v_proj",
                "attention.out": "attn.out_proj",
                "norm": "ln_1",
                "feed_forward.up": "mlp.fc_in",
                "feed_forward.down": "mlp.fc_out",
            },
        ),
    ),
    prefix="transformer.",
    ignored=(r"transformer\.h\.\d+\.attn\.(masked_)?bias",),
)

OPT = Table(
    {
        "embedding.tokens": "model.decoder.embed_tokens",
        "embedding.positions": "model.decoder.embed_positions",
        "embedding.project": "model.decoder.project_in",
        "final_norm": "model.decoder.final_layer_norm",
        "head.project": "model.decoder.project_out",
        "head": "lm_head",
    },
    (
        Stack(
            "layers.{}.",
            "model.decoder.layers.{}.",
            {
                "attention.q": "self_attn.q_proj",
                "attention.k": "self_attn.k_proj",
                "attention.v": "self_attn.v_proj",
                "attention.out": "self_attn.out_proj",
                "norm_attention": "self_attn_layer_norm",
                "norm_feed_forward": "final_layer_norm",
                "feed_forward.up": "fc1",
                "feed_forward.down": "fc2",
            },
        ),
    ),
    prefix="model.",
)

MPT = Table(
    {
        "embedding.tokens": "transformer.wte",
        "final_norm": "transformer.norm_f",
        "head": "lm_head",
    },
    (
        Stack(
            "layers.{}.",
            "transformer.blocks.{}.",
            {
                QKV: joined("attn.Wqkv"),
                "attention.out": "attn.out_proj",
                "norm_attention": "norm_1",
                "norm_feed_forward": "norm_2",
                "feed_forward.up": "ffn.up_proj",
                "feed_forward.down": "ffn.down_proj",
            },
        ),
    ),
    prefix="transformer.",
)


# --- a kv head's queries, key and value together ----------------------------------------

_NORMS: Names = {
    "norm": "input_layernorm",
    "norm_attention": "input_layernorm",
    "norm_feed_forward": "post_attention_layernorm",
}
_WIDENED: Names = {
    "feed_forward.up": "mlp.dense_h_to_4h",
    "feed_forward.down": "mlp.dense_4h_to_h",
}
_BLOOM_WHOLE: Names = {
    "embedding.tokens": "transformer.word_embeddings",
    "embedding.norm": "transformer.word_embeddings_layernorm",
    "final_norm": "transformer.ln_f",
    "head": "lm_head",
}


def _per_kv_head(arch: Arch) -> Change:
    attention = arch.layers[0].attention
    if not isinstance(attention, Attention):
        raise Fault(f"{arch.name} has no kv heads")
    return Grouped(attention.n_kv_heads)


def gpt_neox(arch: Arch) -> Table:
    layer: Names = {
        QKV: Stored("attention.query_key_value", _per_kv_head(arch)),
        "attention.out": "attention.dense",
        **_NORMS,
        **_WIDENED,
    }
    whole: Names = {
        "embedding.tokens": "gpt_neox.embed_in",
        "final_norm": "gpt_neox.final_layer_norm",
        "head": "embed_out",
    }
    masks = r"gpt_neox\.layers\.\d+\.attention\.(bias|masked_bias|rotary_emb\.inv_freq)"
    stack = Stack("layers.{}.", "gpt_neox.layers.{}.", layer)
    return Table(whole, (stack,), prefix="gpt_neox.", ignored=(masks,))


def bloom(arch: Arch) -> Table:
    return _bloom(arch, _NORMS)


def falcon(arch: Arch) -> Table:
    """BLOOM's names; the larger ones call the norms of their two blocks after them."""
    two = arch.layers[0].wiring is Wiring.PARALLEL_TWO_NORMS
    return _bloom(
        arch, {"norm_attention": "ln_attn", "norm_feed_forward": "ln_mlp"} if two else _NORMS
    )


def _bloom(arch: Arch, norms: Names) -> Table:
    layer: Names = {
        QKV: Stored("self_attention.query_key_value", _per_kv_head(arch)),
        "attention.out": "self_attention.dense",
        **norms,
        **_WIDENED,
    }
    stack = Stack("layers.{}.", "transformer.h.{}.", layer)
    return Table(_BLOOM_WHOLE, (stack,), prefix="transformer.")


#: model_type -> table, or what makes it for a spec.
TABLES = {
    "gpt2": GPT2,
    "gptj": GPTJ,
    "opt": OPT,
    "mpt": MPT,
    "gpt_neox": gpt_neox,
    "bloom": bloom,
    "falcon": falcon,
}
