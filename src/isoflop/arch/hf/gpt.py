"""GPT-2, OPT, and those with ALiBi: BLOOM and MPT."""

from __future__ import annotations

from typing import Any

from isoflop.arch.families import bloom, gpt, mpt, opt
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
from isoflop.arch.spec import Arch, Attention, Wiring

GPT2 = Family(
    "gpt2",
    "GPT2LMHeadModel",
    gpt,
    {
        "n_embd": size("d_model", 768),
        "n_layer": layers(12),
        "n_head": size("n_heads", 12),
        "n_inner": size_or_none("d_ff"),
        "vocab_size": size("vocab_size", 50257),
        "n_positions": size("max_seq_len", 1024),
        "activation_function": word("activation", "gelu_new"),
        "layer_norm_epsilon": real("eps", 1e-5),
        "tie_word_embeddings": flag("tied", True),
        "resid_pdrop": real("dropout", 0.1),
        "attn_pdrop": real("dropout_attention", 0.1),
        "embd_pdrop": real("dropout_embedding", 0.1),
    },
    second_names={
        "hidden_size": "n_embd",
        "max_position_embeddings": "n_positions",
        "num_attention_heads": "n_head",
        "num_hidden_layers": "n_layer",
    },
    fixed={
        "scale_attn_weights": (True, "the spec scales scores by 1 / sqrt(d_head)"),
        "scale_attn_by_inverse_layer_idx": (False, "the spec has no scale per layer"),
        "add_cross_attention": (False, "a gpt2 spec has no encoder"),
    },
)


def _finish_opt(keys: Config, numbers: Facts) -> None:
    numbers["final_norm"] = not numbers.pop("norm_removed")
    if numbers["d_embed"] not in (None, numbers["d_model"]):
        keys.only("tie_word_embeddings", True, "an embedding of another width is the head too")


def _more_opt(arch: Arch, facts: Facts) -> dict[str, Any]:
    before = facts["wiring"] is not Wiring.POST
    removed = before and arch.final_norm is None
    width = arch.embedding.d_embed or arch.d_model
    return {
        "do_layer_norm_before": before,
        "_remove_final_layer_norm": removed,
        "word_embed_proj_dim": width,
        "layer_norm_elementwise_affine": facts["norm_weights"],
    }


OPT = Family(
    "opt",
    "OPTForCausalLM",
    opt,
    {
        "hidden_size": size("d_model", 768),
        "num_hidden_layers": layers(12),
        "num_attention_heads": size("n_heads", 12),
        "ffn_dim": size("d_ff", 3072),
        "vocab_size": size("vocab_size", 50272),
        "max_position_embeddings": size("max_seq_len", 2048),
        "word_embed_proj_dim": size_or_none("d_embed"),
        "do_layer_norm_before": flag("norm_first", True),
        "_remove_final_layer_norm": flag("norm_removed", False),
        "enable_bias": flag("bias", True),
        "layer_norm_elementwise_affine": flag("norm_weights", True),
        "activation_function": word("activation", "relu"),
        "tie_word_embeddings": flag("tied", True),
        "dropout": real("dropout", 0.1),
        "attention_dropout": real("dropout_attention", 0.0),
    },
    finish=_finish_opt,
    more=_more_opt,
    ignored=frozenset({"activation_dropout"}),
)

BLOOM = Family(
    "bloom",
    "BloomForCausalLM",
    bloom,
    {
        "hidden_size": size("d_model", 64),
        "n_layer": layers(2),
        "n_head": size("n_heads", 8),
        "vocab_size": size("vocab_size", 250880),
        "seq_length": size("max_seq_len", 2048),
        "layer_norm_epsilon": real("eps", 1e-5),
        "hidden_dropout": real("dropout", 0.0),
        "attention_dropout": real("dropout_attention", 0.0),
        "tie_word_embeddings": flag("tied", True),
    },
    second_names={
        "n_embed": "hidden_size",
        "num_attention_heads": "n_head",
        "num_hidden_layers": "n_layer",
    },
    fixed={
        "apply_residual_connection_post_layernorm": (False, "the spec adds to what came in"),
    },
)


def _finish_mpt(keys: Config, numbers: Facts) -> None:
    inner = keys.inner("attn_config")
    inner.only("attn_type", "multihead_attention", "transformers builds no other")
    inner.only("alibi", True, "transformers builds no other positions")
    inner.only("qk_ln", False, "transformers builds no such norms")
    inner.only("prefix_lm", False, "the spec is causal")
    inner.only("alibi_bias_max", 8, "the spec has Press's slopes")
    for harmless in ("attn_impl", "attn_uses_sequence_id", "clip_qkv", "model_type"):
        inner.has(harmless)
    numbers["dropout_attention"] = inner.real("attn_pdrop", 0.0)
    numbers["scale"] = inner.real_or_none("softmax_scale")


def _more_mpt(arch: Arch, facts: Facts) -> dict[str, Any]:
    attention = arch.layers[0].attention
    scale = attention.scale if isinstance(attention, Attention) else None
    dropout = facts["dropout_attention"] or 0  # their class takes a whole 0 only
    inner = {"alibi": True, "attn_pdrop": dropout, "softmax_scale": scale}
    return {"attn_config": inner}


MPT = Family(
    "mpt",
    "MptForCausalLM",
    mpt,
    {
        "d_model": size("d_model", 2048),
        "n_layers": layers(24),
        "n_heads": size("n_heads", 16),
        "vocab_size": size("vocab_size", 50368),
        "max_seq_len": size("max_seq_len", 2048),
        "layer_norm_epsilon": real("eps", 1e-5),
        "tie_word_embeddings": flag("tied", True),
    },
    second_names={
        "hidden_size": "d_model",
        "num_attention_heads": "n_heads",
        "num_hidden_layers": "n_layers",
    },
    fixed={
        "expansion_ratio": (4, "transformers builds four times the width, whatever it says"),
        "no_bias": (True, "transformers builds no biases"),
        "logit_scale": (None, "transformers does not scale the logits"),
    },
    # transformers' class drops out by attn_config.attn_pdrop alone, and has no learned positions.
    ignored=frozenset(
        {"resid_pdrop", "emb_pdrop", "learned_pos_emb", "norm_type", "embedding_fraction"}
    ),
    finish=_finish_mpt,
    more=_more_mpt,
)

FAMILIES = (GPT2, OPT, BLOOM, MPT)
