"""Llama's names, and those of the families that took them over."""

from __future__ import annotations

from isoflop.model.weights.table import GATE_UP, QKV, Names, Stack, Table, joined, listed

WHOLE: Names = {
    "embedding.tokens": "model.embed_tokens",
    "final_norm": "model.norm",
    "head": "lm_head",
}
_READS: Names = {
    "attention.q": "self_attn.q_proj",
    "attention.k": "self_attn.k_proj",
    "attention.v": "self_attn.v_proj",
    "attention.q_norm": "self_attn.q_norm",
    "attention.k_norm": "self_attn.k_norm",
}
ATTENTION: Names = {**_READS, "attention.out": "self_attn.o_proj"}
FEED_FORWARD: Names = {
    "feed_forward.gate": "mlp.gate_proj",
    "feed_forward.up": "mlp.up_proj",
    "feed_forward.down": "mlp.down_proj",
}
#: `norm` is the only one of a parallel layer (Cohere, StableLM 2 12B).
NORMS: Names = {
    "norm": "input_layernorm",
    "norm_attention": "input_layernorm",
    "norm_feed_forward": "post_attention_layernorm",
}
#: Gemma 2 and OLMo 2 use "post" for norms on a block's output.
OUTPUT_NORMS: Names = {
    "norm_attention": "input_layernorm",
    "norm_attention_out": "post_attention_layernorm",
    "norm_feed_forward": "pre_feedforward_layernorm",
    "norm_feed_forward_out": "post_feedforward_layernorm",
}
LAYER: Names = {**ATTENTION, **FEED_FORWARD, **NORMS}


def llama_table(layer: Names, whole: Names = WHOLE, ignored: tuple[str, ...] = ()) -> Table:
    """Llama's places with a layer's own names. Its first files keep the rotary frequencies."""
    frequencies = r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq"
    stack = Stack("layers.{}.", "model.layers.{}.", layer)
    return Table(whole, (stack,), prefix="model.", ignored=(frequencies, *ignored))


LLAMA = llama_table(LAYER)
SANDWICH = llama_table({**LAYER, **OUTPUT_NORMS})

_GATE_UP_JOINED: Names = {
    GATE_UP: joined("mlp.gate_up_proj"),
    "feed_forward.down": "mlp.down_proj",
}

PHI3 = llama_table(
    {
        QKV: joined("self_attn.qkv_proj"),
        "attention.out": "self_attn.o_proj",
        **_GATE_UP_JOINED,
        **NORMS,
    }
)
#: Here "post" is the name of norms on an output, but for the one before the feed-forward.
GLM4 = llama_table(
    {
        **ATTENTION,
        **_GATE_UP_JOINED,
        **NORMS,
        "norm_attention_out": "post_self_attn_layernorm",
        "norm_feed_forward_out": "post_mlp_layernorm",
    }
)
STABLELM = llama_table(
    {
        **LAYER,
        "attention.q_norm": listed("self_attn.q_layernorm.norms.{}"),
        "attention.k_norm": listed("self_attn.k_layernorm.norms.{}"),
    }
)
PHI = llama_table(
    {
        **_READS,
        **NORMS,
        "attention.q_norm": "self_attn.q_layernorm",
        "attention.k_norm": "self_attn.k_layernorm",
        "attention.out": "self_attn.dense",
        "feed_forward.up": "mlp.fc1",
        "feed_forward.down": "mlp.fc2",
    },
    {**WHOLE, "final_norm": "model.final_layernorm"},
)
STARCODER2 = llama_table(
    {**ATTENTION, **NORMS, "feed_forward.up": "mlp.c_fc", "feed_forward.down": "mlp.c_proj"}
)

#: model_type -> table.
TABLES = {
    **dict.fromkeys(
        ("llama", "mistral", "qwen2", "qwen3", "olmo", "smollm3", "granite", "cohere", "gemma"),
        LLAMA,
    ),
    **dict.fromkeys(("olmo2", "gemma2", "gemma3_text"), SANDWICH),
    "phi3": PHI3,
    "glm4": GLM4,
    "stablelm": STABLELM,
    "phi": PHI,
    "starcoder2": STARCODER2,
}
