"""Gemma 1 to 3."""

from __future__ import annotations

from typing import Any

from isoflop.arch.families import gemma, gemma2, gemma3
from isoflop.arch.families.common import every
from isoflop.arch.hf.config import Config
from isoflop.arch.hf.family import Facts, Family, flag, llama_keys, real, real_or_none, size
from isoflop.arch.hf.llama import read_local, write_local
from isoflop.arch.hf.rope import RopeKeys, read_scaling, write_scaling
from isoflop.arch.spec import Arch, Rope

ONE_WAY = {"use_bidirectional_attention": (False, "the spec is causal")}
_ACT = ("hidden_activation", "gelu_pytorch_tanh")

GEMMA = Family(
    "gemma",
    "GemmaForCausalLM",
    gemma,
    llama_keys(
        *(3072, 28, 16, 16, 24576, 256000, 8192),
        d_head=256,
        act=("hidden_act", "gelu_pytorch_tanh"),
        tied=True,
    )
    | {"attention_bias": flag("bias_attention", False)},
    rope=RopeKeys(),
    fixed=ONE_WAY,
    ignored=frozenset({"hidden_activation"}),
)


def _finish_gemma2(keys: Config, numbers: Facts) -> None:
    read_local(keys, numbers, every(numbers["n_layers"], 2))


def _more_local(arch: Arch, _facts: Facts) -> dict[str, Any]:
    return {"layer_types": write_local(arch)}


_GEMMA2_KEYS = {
    **llama_keys(2304, 26, 8, 4, 9216, 256000, 8192, d_head=256, act=_ACT, tied=True),
    "attention_bias": flag("bias_attention", False),
    "query_pre_attn_scalar": real("query_scalar", 256),
    "sliding_window": size("window", 4096),
    "final_logit_softcapping": real_or_none("softcap_logits", 30.0),
    "attn_logit_softcapping": real_or_none("softcap_scores", 50.0),
}

GEMMA2 = Family(
    "gemma2",
    "Gemma2ForCausalLM",
    gemma2,
    _GEMMA2_KEYS,
    rope=RopeKeys(),
    fixed=ONE_WAY,
    ignored=frozenset({"hidden_act", "cache_implementation"}),
    finish=_finish_gemma2,
    more=_more_local,
    square=True,
)


def _finish_gemma3(keys: Config, numbers: Facts) -> None:
    """Two rotations: of the global layers, perhaps scaled, and of the local ones."""
    period = keys.size("sliding_window_pattern", 6) if keys.has("sliding_window_pattern") else 6
    keys.has("_sliding_window_pattern")
    read_local(keys, numbers, every(numbers["n_layers"], period))
    table = keys.inner("rope_parameters")
    wide, near = table.table("full_attention"), table.table("sliding_attention")
    older = keys.table("rope_scaling")
    for key in ("rope_theta", "rope_local_base_freq"):
        keys.has(key)
    inside = wide is not None and wide.has("rope_theta")
    numbers["theta"] = (wide if wide is not None and inside else keys).real("rope_theta", 1e6)
    if near is not None:
        near.only("rope_type", "default", "the spec does not scale local layers")
    numbers["theta_local"] = (
        near.real("rope_theta", 1e4)
        if near is not None and near.has("rope_theta")
        else keys.real("rope_local_base_freq", 1e4)
    )
    scaled = older or wide
    numbers["scaling"] = None if scaled is None else read_scaling(scaled, numbers["max_seq_len"])


def _more_gemma3(arch: Arch, facts: Facts) -> dict[str, Any]:
    local = write_local(arch)
    ropes = {
        kind: attention.position
        for kind, attention in zip(local, arch.attentions(), strict=True)
        if isinstance(attention.position, Rope)
    }
    wide = ropes.get("full_attention", Rope(1e6))
    near = ropes.get("sliding_attention", Rope(1e4))
    return {
        "layer_types": local,
        "sliding_window": facts["window"] or 4096,
        "rope_theta": float(wide.theta),
        "rope_local_base_freq": float(near.theta),
        "rope_scaling": write_scaling(wide.scaling),
    }


GEMMA3_TEXT = Family(
    "gemma3_text",
    "Gemma3ForCausalLM",
    gemma3,
    {
        **_GEMMA2_KEYS,
        **llama_keys(2304, 26, 8, 4, 9216, 262208, 131072, d_head=256, act=_ACT, tied=True),
        "final_logit_softcapping": real_or_none("softcap_logits"),
        "attn_logit_softcapping": real_or_none("softcap_scores"),
    },
    fixed=ONE_WAY,
    ignored=frozenset({"hidden_act", "cache_implementation"}),
    finish=_finish_gemma3,
    more=_more_gemma3,
    square=True,
)

FAMILIES = (GEMMA, GEMMA2, GEMMA3_TEXT)
