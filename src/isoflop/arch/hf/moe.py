"""Mixtures of experts: Mixtral, Qwen, DeepSeek, GPT-OSS."""

from __future__ import annotations

from typing import Any

from isoflop.arch.families import deepseek, gpt_oss, mixtral, qwen2_moe, qwen3_moe
from isoflop.arch.families.common import every
from isoflop.arch.hf.config import Config
from isoflop.arch.hf.family import (
    Facts,
    Family,
    Key,
    count,
    flag,
    llama_keys,
    real,
    size,
    size_or_none,
)
from isoflop.arch.hf.llama import more_windows, read_local, read_window, write_local
from isoflop.arch.hf.rope import RopeKeys
from isoflop.arch.spec import Arch, Experts, LatentAttention, YarnScaling

MIXTRAL = Family(
    "mixtral",
    "MixtralForCausalLM",
    mixtral,
    llama_keys(4096, 32, 32, 8, 14336, 32000, 131072, eps=("rms_norm_eps", 1e-5))
    | {
        "sliding_window": size_or_none("window"),
        "num_local_experts": size("n_experts", 8),
        "num_experts_per_tok": size("n_active", 2),
    },
    rope=RopeKeys(theta=1_000_000.0),
    second_names={"num_experts": "num_local_experts"},
)


# --- Qwen -------------------------------------------------------------------------------


def _read_sparse(keys: Config, numbers: Facts) -> None:
    """Experts are in each `decoder_sparse_step`-th layer that is not listed as dense."""
    step, dense = keys.size("decoder_sparse_step", 1), keys.wholes("mlp_only_layers")
    numbers["sparse"] = tuple(
        (i + 1) % step == 0 and i not in dense for i in range(numbers["n_layers"])
    )


def _finish_qwen2_moe(keys: Config, numbers: Facts) -> None:
    _read_sparse(keys, numbers)
    numbers["window"] = read_window(keys)
    most = keys.count("max_window_layers", 28)
    usual = tuple(i % 2 == 0 and i < most for i in range(numbers["n_layers"]))
    read_local(keys, numbers, usual)


def _finish_qwen3_moe(keys: Config, numbers: Facts) -> None:
    _read_sparse(keys, numbers)
    keys.has("max_window_layers")
    numbers["window"] = read_window(keys)


def _more_sparse(arch: Arch, facts: Facts) -> dict[str, Any]:
    dense = [i for i, x in enumerate(arch.layers) if not isinstance(x.feed_forward, Experts)]
    said = {"decoder_sparse_step": 1, "mlp_only_layers": dense}
    return said | more_windows(arch, facts)


def _more_qwen3_moe(arch: Arch, facts: Facts) -> dict[str, Any]:
    said = _more_sparse(arch, facts)
    said.pop("layer_types", None)
    return said


_MOE_KEYS = {
    "moe_intermediate_size": size("d_ff_expert", 1408),
    "norm_topk_prob": flag("normalize", False),
}

QWEN2_MOE = Family(
    "qwen2_moe",
    "Qwen2MoeForCausalLM",
    qwen2_moe,
    llama_keys(2048, 24, 16, 16, 5632, 151936, 32768)
    | _MOE_KEYS
    | {
        "shared_expert_intermediate_size": size("d_ff_shared", 5632),
        "num_experts": size("n_experts", 60),
        "num_experts_per_tok": size("n_active", 4),
        "qkv_bias": flag("bias_qkv", True),
    },
    rope=RopeKeys(),
    finish=_finish_qwen2_moe,
    more=_more_sparse,
)

QWEN3_MOE = Family(
    "qwen3_moe",
    "Qwen3MoeForCausalLM",
    qwen3_moe,
    llama_keys(2048, 24, 32, 4, 6144, 151936, 32768)
    | _MOE_KEYS
    | {
        "moe_intermediate_size": size("d_ff_expert", 768),
        "num_local_experts": size("n_experts", 128),
        "num_experts_per_tok": size("n_active", 8),
        "attention_bias": flag("bias_attention", False),
    },
    rope=RopeKeys(),
    second_names={"num_experts": "num_local_experts"},
    finish=_finish_qwen3_moe,
    more=_more_qwen3_moe,
)


# --- DeepSeek ---------------------------------------------------------------------------


def _deepseek_keys(
    d_model: int,
    n_layers: int,
    n_heads: int,
    d_ff: int,
    d_ff_expert: int,
    vocab_size: int,
    max_seq_len: int,
) -> dict[str, Key]:
    usual = llama_keys(d_model, n_layers, n_heads, None, d_ff, vocab_size, max_seq_len)
    kept = {k: v for k, v in usual.items() if k not in ("num_key_value_heads", "head_dim")}
    return kept | {
        "attention_bias": flag("bias_attention", False),
        "kv_lora_rank": size("d_kv_latent", 512),
        "q_lora_rank": size_or_none("d_q_latent", 1536),
        "qk_nope_head_dim": size("d_head_nope", 128),
        "qk_rope_head_dim": size("d_head_rope", 64),
        "v_head_dim": size("d_head_value", 128),
        "moe_intermediate_size": size("d_ff_expert", d_ff_expert),
    }


#: The latent is shared by all heads, so these say nothing (transformers does not read them).
_UNREAD = frozenset({"num_key_value_heads", "head_dim", "qk_head_dim"})


def _finish_deepseek_v2(keys: Config, numbers: Facts) -> None:
    methods = {"greedy": False, "group_limited_greedy": True}
    grouped = keys.choice("topk_method", methods, "greedy")
    groups, active = keys.size_or_none("n_group"), keys.size_or_none("topk_group")
    if grouped:
        numbers |= {"n_groups": groups or 1, "n_active_groups": active or 1}


def _more_deepseek(arch: Arch, facts: Facts) -> dict[str, Any]:
    n_dense = sum(not isinstance(layer.feed_forward, Experts) for layer in arch.layers)
    shared = facts["d_ff_shared"] // facts["d_ff_expert"]
    if not isinstance(arch.layers[0].attention, LatentAttention):
        raise KeyError("d_kv_latent")
    # Said for transformers' V3 alone: its class divides the heads by it, and takes 128 of its own.
    unread = {"num_key_value_heads": facts["n_heads"]}
    return {"first_k_dense_replace": n_dense, "n_shared_experts": shared} | unread


def _more_deepseek_v2(arch: Arch, facts: Facts) -> dict[str, Any]:
    groups = {"n_group": facts["n_groups"], "topk_group": facts["n_active_groups"]}
    method = "greedy" if facts["n_groups"] == 1 else "group_limited_greedy"
    return _more_deepseek(arch, facts) | groups | {"topk_method": method}


DEEPSEEK_V2 = Family(
    "deepseek_v2",
    "DeepseekV2ForCausalLM",
    deepseek,
    _deepseek_keys(4096, 32, 32, 11008, 1407, 102400, 2048)
    | {
        "n_routed_experts": size("n_experts", 64),
        "num_experts_per_tok": size("n_active", 1),
        "n_shared_experts": count("n_shared", 2),
        "first_k_dense_replace": count("n_dense", 0),
        "norm_topk_prob": flag("normalize", False),
        "routed_scaling_factor": real("routed_scale", 1.0),
        "mlp_bias": flag("bias_dense", False),
    },
    rope=RopeKeys(),
    second_names={"num_experts": "n_routed_experts"},
    fixed={
        "moe_layer_freq": (1, "transformers puts experts in every later layer"),
        "scoring_func": ("softmax", "transformers scores by softmax"),
    },
    ignored=_UNREAD,
    finish=_finish_deepseek_v2,
    more=_more_deepseek_v2,
    square=True,
)


def _finish_deepseek_v3(keys: Config, numbers: Facts) -> None:
    numbers["corrected"] = True
    numbers["interleaved"] = keys.flag("rope_interleave", True)


def _more_deepseek_v3(arch: Arch, facts: Facts) -> dict[str, Any]:
    return _more_deepseek(arch, facts) | {"rope_interleave": facts["interleaved"]}


DEEPSEEK_V3 = Family(
    "deepseek_v3",
    "DeepseekV3ForCausalLM",
    deepseek,
    _deepseek_keys(7168, 61, 128, 18432, 2048, 129280, 4096)
    | {
        "n_routed_experts": size("n_experts", 256),
        "num_experts_per_tok": size("n_active", 8),
        "n_shared_experts": count("n_shared", 1),
        "first_k_dense_replace": count("n_dense", 3),
        "n_group": size("n_groups", 8),
        "topk_group": size("n_active_groups", 4),
        "norm_topk_prob": flag("normalize", True),
        "routed_scaling_factor": real("routed_scale", 2.5),
    },
    rope=RopeKeys(),
    second_names={"num_local_experts": "n_routed_experts"},
    fixed={
        "moe_layer_freq": (1, "transformers puts experts in every later layer"),
        "scoring_func": ("sigmoid", "transformers scores by sigmoid"),
        "topk_method": ("noaux_tc", "transformers corrects the scores without a loss"),
    },
    ignored=_UNREAD,
    finish=_finish_deepseek_v3,
    more=_more_deepseek_v3,
)


# --- GPT-OSS ----------------------------------------------------------------------------


def _finish_gpt_oss(keys: Config, numbers: Facts) -> None:
    keys.only("hidden_act", "silu", "its gated unit is made of no other")
    keys.only("swiglu_alpha", 1.702, "the spec has the published gated unit")
    keys.only("swiglu_limit", 7.0, "the spec has the published gated unit")
    read_local(keys, numbers, every(numbers["n_layers"], 2))
    if not keys.has("rope_scaling") and not keys.has("rope_parameters"):
        numbers["scaling"] = YarnScaling(32.0, 4096, truncate=False)


def _more_gpt_oss(arch: Arch, facts: Facts) -> dict[str, Any]:
    if facts["expert_activation"] != "silu_clamped":
        raise KeyError("silu_clamped")
    scaled = facts["rope"].scaling is not None
    # Without a scaling the class takes its own; "default" says that there is none.
    table = {} if scaled else {"rope_scaling": {"rope_type": "default"}}
    return {"layer_types": write_local(arch)} | table


GPT_OSS = Family(
    "gpt_oss",
    "GptOssForCausalLM",
    gpt_oss,
    {
        name: key
        for name, key in llama_keys(
            *(2880, 36, 64, 8, 2880, 201088, 131072),
            d_head=64,
            eps=("rms_norm_eps", 1e-5),
        ).items()
        if name != "hidden_act"
    }
    | {
        "attention_bias": flag("bias_attention", True),
        "sliding_window": size("window", 128),
        "num_local_experts": size("n_experts", 128),
        "num_experts_per_tok": size("n_active", 4),
    },
    rope=RopeKeys(theta=150_000.0),
    second_names={"num_experts": "num_local_experts"},
    ignored=frozenset({"experts_per_token", "initial_context_length"}),
    finish=_finish_gpt_oss,
    more=_more_gpt_oss,
)

FAMILIES = (MIXTRAL, QWEN2_MOE, QWEN3_MOE, DEEPSEEK_V2, DEEPSEEK_V3, GPT_OSS)
