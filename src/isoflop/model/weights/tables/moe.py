"""Mixtures of experts: Mixtral, Qwen, DeepSeek, GPT-OSS.

With us the experts of a layer are one tensor [E, out, in]; files hold an expert's apart, but
for GPT-OSS's.
"""

from __future__ import annotations

from isoflop.model.weights.change import Interleaved, Transposed
from isoflop.model.weights.table import Names, Stored, listed
from isoflop.model.weights.tables.llama import ATTENTION, FEED_FORWARD, LAYER, NORMS, llama_table

MIXTRAL = llama_table(
    {
        **ATTENTION,
        **NORMS,
        "feed_forward.router": "block_sparse_moe.gate",
        "feed_forward.experts.gate": listed("block_sparse_moe.experts.{}.w1"),
        "feed_forward.experts.up": listed("block_sparse_moe.experts.{}.w3"),
        "feed_forward.experts.down": listed("block_sparse_moe.experts.{}.w2"),
    }
)

_EXPERTS: Names = {
    "feed_forward.router": "mlp.gate",
    "feed_forward.experts.gate": listed("mlp.experts.{}.gate_proj"),
    "feed_forward.experts.up": listed("mlp.experts.{}.up_proj"),
    "feed_forward.experts.down": listed("mlp.experts.{}.down_proj"),
}


def _shared(place: str) -> Names:
    return {
        "feed_forward.shared.gate": f"{place}.gate_proj",
        "feed_forward.shared.up": f"{place}.up_proj",
        "feed_forward.shared.down": f"{place}.down_proj",
    }


QWEN_MOE = llama_table(
    {
        **LAYER,
        **_EXPERTS,
        **_shared("mlp.shared_expert"),
        "feed_forward.shared_gate": "mlp.shared_expert_gate",
    }
)

DEEPSEEK = llama_table(
    {
        **FEED_FORWARD,
        **NORMS,
        **_EXPERTS,
        **_shared("mlp.shared_experts"),
        "feed_forward.router.correction": "mlp.gate.e_score_correction_bias",
        "attention.q": "self_attn.q_proj",
        "attention.q_down": "self_attn.q_a_proj",
        "attention.q_norm": "self_attn.q_a_layernorm",
        "attention.q_up": "self_attn.q_b_proj",
        "attention.kv_down": "self_attn.kv_a_proj_with_mqa",
        "attention.kv_norm": "self_attn.kv_a_layernorm",
        "attention.kv_up": "self_attn.kv_b_proj",
        "attention.out": "self_attn.o_proj",
    },
    # The layer after V3's last predicts the token after the next; the spec leaves it out.
    ignored=(r"model\.layers\.61\..+",),
)

_GATE_UP = ("feed_forward.experts.gate", "feed_forward.experts.up")

GPT_OSS = llama_table(
    {
        **ATTENTION,
        **NORMS,
        "attention.sinks.weight": "self_attn.sinks",
        "feed_forward.router": "mlp.router",
        tuple(f"{name}.weight" for name in _GATE_UP): Stored(
            "mlp.experts.gate_up_proj", Transposed(Interleaved())
        ),
        tuple(f"{name}.bias" for name in _GATE_UP): Stored(
            "mlp.experts.gate_up_proj_bias", Interleaved()
        ),
        "feed_forward.experts.down.weight": Stored("mlp.experts.down_proj", Transposed()),
        "feed_forward.experts.down.bias": "mlp.experts.down_proj_bias",
    }
)

#: model_type -> table.
TABLES = {
    "mixtral": MIXTRAL,
    "qwen2_moe": QWEN_MOE,
    "qwen3_moe": QWEN_MOE,
    "deepseek_v2": DEEPSEEK,
    "deepseek_v3": DEEPSEEK,
    "gpt_oss": GPT_OSS,
}
