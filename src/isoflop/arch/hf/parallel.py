"""Attention and feed-forward side by side: GPT-NeoX, GPT-J, Phi, Falcon."""

from __future__ import annotations

from typing import Any

from isoflop.arch.families import falcon, gpt_neox, gptj, phi
from isoflop.arch.hf.config import Config
from isoflop.arch.hf.family import (
    Facts,
    Family,
    flag,
    layers,
    real,
    size,
    size_or_none,
    word,
)
from isoflop.arch.hf.rope import RopeKeys, read_rope, write_rope
from isoflop.arch.spec import Alibi, Arch, Rope, Wiring


def _more_gpt_neox(_arch: Arch, facts: Facts) -> dict[str, Any]:
    return {"use_parallel_residual": facts["wiring"] is Wiring.PARALLEL_TWO_NORMS}


GPT_NEOX = Family(
    "gpt_neox",
    "GPTNeoXForCausalLM",
    gpt_neox,
    {
        "hidden_size": size("d_model", 6144),
        "num_hidden_layers": layers(44),
        "num_attention_heads": size("n_heads", 64),
        "intermediate_size": size("d_ff", 24576),
        "vocab_size": size("vocab_size", 50432),
        "max_position_embeddings": size("max_seq_len", 2048),
        "hidden_act": word("activation", "gelu"),
        "layer_norm_eps": real("eps", 1e-5),
        "tie_word_embeddings": flag("tied", False),
        "attention_bias": flag("bias_attention", True),
        "hidden_dropout": real("dropout", 0.0),
        "attention_dropout": real("dropout_attention", 0.0),
    },
    rope=RopeKeys(theta_key="rotary_emb_base", share=0.25, share_key="rotary_pct"),
    finish=lambda keys, numbers: numbers.update(parallel=keys.flag("use_parallel_residual", True)),
    more=_more_gpt_neox,
)

GPTJ = Family(
    "gptj",
    "GPTJForCausalLM",
    gptj,
    {
        "n_embd": size("d_model", 4096),
        "n_layer": layers(28),
        "n_head": size("n_heads", 16),
        "n_inner": size_or_none("d_ff"),
        "rotary_dim": size_or_none("d_rotary", 64),
        "vocab_size": size("vocab_size", 50400),
        "n_positions": size("max_seq_len", 2048),
        "activation_function": word("activation", "gelu_new"),
        "layer_norm_epsilon": real("eps", 1e-5),
        "tie_word_embeddings": flag("tied", False),
        "resid_pdrop": real("dropout", 0.0),
        "attn_pdrop": real("dropout_attention", 0.0),
        "embd_pdrop": real("dropout_embedding", 0.0),
    },
    second_names={
        "hidden_size": "n_embd",
        "max_position_embeddings": "n_positions",
        "num_attention_heads": "n_head",
        "num_hidden_layers": "n_layer",
    },
    fixed={"scale_attn_weights": (True, "the spec scales scores by 1 / sqrt(d_head)")},
    ignored=frozenset({"rotary"}),
)

PHI = Family(
    "phi",
    "PhiForCausalLM",
    phi,
    {
        "hidden_size": size("d_model", 2048),
        "num_hidden_layers": layers(24),
        "num_attention_heads": size("n_heads", 32),
        "num_key_value_heads": size_or_none("n_kv_heads"),
        "intermediate_size": size("d_ff", 8192),
        "vocab_size": size("vocab_size", 51200),
        "max_position_embeddings": size("max_seq_len", 2048),
        "hidden_act": word("activation", "gelu_new"),
        "layer_norm_eps": real("eps", 1e-5),
        "tie_word_embeddings": flag("tied", False),
        "qk_layernorm": flag("qk_norm", False),
        "resid_pdrop": real("dropout", 0.0),
        "attention_dropout": real("dropout_attention", 0.0),
        "embd_pdrop": real("dropout_embedding", 0.0),
    },
    rope=RopeKeys(share=0.5),
)


_FALCON_ROPE = RopeKeys()


def _finish_falcon(keys: Config, numbers: Facts) -> None:
    """The old blocks share one key-value head or none, the new ones share it in groups."""
    new = keys.flag("new_decoder_architecture", False)
    shared = keys.flag("multi_query", True)
    parallel = keys.flag("parallel_attn", True)
    n_norms = keys.size_or_none("num_ln_in_parallel_attn")
    groups = keys.size_or_none("num_kv_heads")
    if new:
        numbers["n_kv_heads"] = groups or numbers["n_heads"]
    else:
        numbers["n_kv_heads"] = 1 if shared else numbers["n_heads"]
    two = n_norms == 2 or (n_norms is None and new)
    beside = Wiring.PARALLEL_TWO_NORMS if two else Wiring.PARALLEL
    numbers["wiring"] = beside if parallel else Wiring.PRE
    numbers |= read_rope(keys, _FALCON_ROPE, numbers)


def _more_falcon(arch: Arch, facts: Facts) -> dict[str, Any]:
    wiring, n_kv = facts["wiring"], facts["n_kv_heads"]
    new = wiring is Wiring.PARALLEL_TWO_NORMS or n_kv not in (1, facts["n_heads"])
    rope = write_rope(facts.get("rope", Rope()), _FALCON_ROPE, facts["d_head"])
    return rope | {
        "alibi": any(isinstance(a.position, Alibi) for a in arch.attentions()),
        "multi_query": n_kv == 1,
        "new_decoder_architecture": new,
        "num_kv_heads": n_kv,
        "num_ln_in_parallel_attn": (2 if wiring is Wiring.PARALLEL_TWO_NORMS else 1)
        if new
        else None,
        "parallel_attn": wiring is not Wiring.PRE,
    }


FALCON = Family(
    "falcon",
    "FalconForCausalLM",
    falcon,
    {
        "hidden_size": size("d_model", 4544),
        "num_hidden_layers": layers(32),
        "num_attention_heads": size("n_heads", 71),
        "ffn_hidden_size": size_or_none("d_ff"),
        "vocab_size": size("vocab_size", 65024),
        "max_position_embeddings": size("max_seq_len", 2048),
        "activation": word("activation", "gelu"),
        "layer_norm_epsilon": real("eps", 1e-5),
        "tie_word_embeddings": flag("tied", True),
        "bias": flag("bias", False),
        "alibi": flag("alibi", False),
        "hidden_dropout": real("dropout", 0.0),
        "attention_dropout": real("dropout_attention", 0.0),
    },
    second_names={
        "n_embed": "hidden_size",
        "n_head": "num_attention_heads",
        "n_head_kv": "num_kv_heads",
        "n_layer": "num_hidden_layers",
    },
    fixed={"apply_residual_connection_post_layernorm": (False, "the spec adds to what came in")},
    finish=_finish_falcon,
    more=_more_falcon,
)

FAMILIES = (GPT_NEOX, GPTJ, PHI, FALCON)
