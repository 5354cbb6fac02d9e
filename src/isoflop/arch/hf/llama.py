"""Llama and those built like it."""

from __future__ import annotations

from typing import Any

from isoflop.arch.families import (
    cohere,
    glm4,
    granite,
    llama,
    mistral,
    olmo,
    olmo2,
    qwen2,
    qwen3,
    smollm3,
    stablelm,
    starcoder2,
)
from isoflop.arch.hf.config import Config
from isoflop.arch.hf.family import Facts, Family, flag, llama_keys, real, size_or_none
from isoflop.arch.hf.rope import RopeKeys
from isoflop.arch.spec import Arch, Attention, Window, Wiring

LAYER_TYPES = {"full_attention": False, "sliding_attention": True}

LLAMA = Family(
    "llama",
    "LlamaForCausalLM",
    llama,
    llama_keys(4096, 32, 32, None, 11008, 32000, 2048)
    | {
        "attention_bias": flag("bias_attention", False),
        "mlp_bias": flag("bias_feed_forward", False),
    },
    rope=RopeKeys(),
    square=True,
    fixed={"rope_interleaved": (False, "its class turns halves")},
)

MISTRAL = Family(
    "mistral",
    "MistralForCausalLM",
    mistral,
    llama_keys(4096, 32, 32, 8, 14336, 32000, 131072)
    | {"sliding_window": size_or_none("window", 4096)},
    rope=RopeKeys(),
)

PHI3 = Family(
    "phi3",
    "Phi3ForCausalLM",
    mistral,
    {
        name: key
        for name, key in llama_keys(
            3072, 32, 32, None, 8192, 32064, 4096, eps=("rms_norm_eps", 1e-5)
        ).items()
        if name != "head_dim"
    }
    | {
        "sliding_window": size_or_none("window"),
        "resid_pdrop": real("dropout", 0.0),
        "embd_pdrop": real("dropout_embedding", 0.0),
    },
    rope=RopeKeys(share=1.0, original=4096),
    fixed={"attention_bias": (False, "its class has no such biases")},
)


# --- sliding windows in some layers -----------------------------------------------------


def read_local(keys: Config, numbers: Facts, usual: tuple[bool, ...]) -> None:
    """Which layers are local: `layer_types`, or else the class's `usual` ones."""
    said = keys.choices("layer_types", LAYER_TYPES)
    numbers["local"] = usual if said is None else said


def write_local(arch: Arch) -> list[str]:
    """The spec's `layer_types`."""
    words = {local: name for name, local in LAYER_TYPES.items()}
    spans = [isinstance(a, Attention) and isinstance(a.span, Window) for a in arch.attentions()]
    return [words[local] for local in spans]


def read_window(keys: Config) -> int | None:
    """Qwen's window, where it is used at all; 4,096 where it is not said."""
    used = keys.flag("use_sliding_window", False)
    said = keys.has("sliding_window") or (used and "sliding_window" not in keys.keys)
    window = keys.count("sliding_window", 4096) if said else None
    return window if used else None


def finish_qwen(keys: Config, numbers: Facts, usual: int = 28) -> None:
    """Windows are in the layers from `max_window_layers` on, if they are used at all."""
    numbers["window"] = read_window(keys)
    first = keys.count("max_window_layers", usual)
    read_local(keys, numbers, tuple(i >= first for i in range(numbers["n_layers"])))


def more_windows(arch: Arch, facts: Facts) -> dict[str, Any]:
    """Qwen's keys of windows."""
    window = facts["window"]
    used = {"use_sliding_window": window is not None, "sliding_window": window}
    return used if window is None else used | {"layer_types": write_local(arch)}


QWEN2 = Family(
    "qwen2",
    "Qwen2ForCausalLM",
    qwen2,
    llama_keys(4096, 32, 32, 32, 22016, 151936, 32768),
    rope=RopeKeys(),
    finish=finish_qwen,
    more=more_windows,
    fixed={"use_mrope": (False, "text has turns of one kind")},
)

QWEN3 = Family(
    "qwen3",
    "Qwen3ForCausalLM",
    qwen3,
    llama_keys(4096, 32, 32, 32, 22016, 151936, 32768, d_head=128)
    | {"attention_bias": flag("bias_attention", False)},
    rope=RopeKeys(),
    finish=finish_qwen,
    more=more_windows,
)


# --- other differences ------------------------------------------------------------------

GRANITE = Family(
    "granite",
    "GraniteForCausalLM",
    granite,
    llama_keys(4096, 32, 32, None, 11008, 32000, 2048)
    | {
        "attention_bias": flag("bias_attention", False),
        "mlp_bias": flag("bias_feed_forward", False),
        "embedding_multiplier": real("embedding_scale", 1.0),
        "logits_scaling": real("logits_divisor", 1.0),
        "residual_multiplier": real("residual_scale", 1.0),
        "attention_multiplier": real("scale", 1.0),
    },
    rope=RopeKeys(),
)


def _finish_smollm3(keys: Config, numbers: Facts) -> None:
    """1 in `no_rope_layers` means, whatever the name says, that the layer is rotated."""
    said = keys.wholes("no_rope_layers")
    period = keys.size("no_rope_layer_interval", 4) if not said else 0
    keys.has("no_rope_layer_interval")
    keys.only("use_sliding_window", False, "windows only where a layer is not rotated")
    for unused in ("layer_types", "sliding_window"):
        keys.has(unused)
    rotated = said or [(i + 1) % period for i in range(numbers["n_layers"])]
    numbers["rotated"] = tuple(bool(turn) for turn in rotated)


def _more_smollm3(arch: Arch, _facts: Facts) -> dict[str, Any]:
    return {"no_rope_layers": [int(a.position is not None) for a in arch.attentions()]}


SMOLLM3 = Family(
    "smollm3",
    "SmolLM3ForCausalLM",
    smollm3,
    llama_keys(2048, 36, 16, 4, 11008, 128256, 32768, tied=True)
    | {
        "attention_bias": flag("bias_attention", False),
        "mlp_bias": flag("bias_feed_forward", False),
    },
    rope=RopeKeys(theta=2_000_000.0),
    finish=_finish_smollm3,
    more=_more_smollm3,
)

_OLMO_KEYS = llama_keys(4096, 32, 32, None, 11008, 50304, 2048, eps=("rms_norm_eps", 1e-5))

OLMO = Family(
    "olmo",
    "OlmoForCausalLM",
    olmo,
    {name: key for name, key in _OLMO_KEYS.items() if name != "rms_norm_eps"}
    | {"attention_bias": flag("bias_attention", False)},
    rope=RopeKeys(),
    ignored=frozenset({"clip_qkv"}),
)

OLMO2 = Family(
    "olmo2",
    "Olmo2ForCausalLM",
    olmo2,
    _OLMO_KEYS | {"attention_bias": flag("bias_attention", False)},
    rope=RopeKeys(),
)

GLM4 = Family(
    "glm4",
    "Glm4ForCausalLM",
    glm4,
    llama_keys(4096, 40, 32, 2, 13696, 151552, 131072, d_head=128, eps=("rms_norm_eps", 1.5625e-07))
    | {"attention_bias": flag("bias_attention", True)},
    rope=RopeKeys(share=0.5),
)


def _more_stablelm(_arch: Arch, facts: Facts) -> dict[str, Any]:
    return {"use_parallel_residual": facts["wiring"] is Wiring.PARALLEL}


STABLELM = Family(
    "stablelm",
    "StableLmForCausalLM",
    stablelm,
    {
        name: key
        for name, key in llama_keys(
            2560, 32, 32, 32, 6912, 50304, 4096, eps=("layer_norm_eps", 1e-5)
        ).items()
        if name != "head_dim"
    }
    | {
        "use_qkv_bias": flag("bias_qkv", False),
        "qk_layernorm": flag("qk_norm", False),
        "hidden_dropout": real("dropout", 0.0),
    },
    rope=RopeKeys(share=0.25),
    finish=lambda keys, numbers: numbers.update(parallel=keys.flag("use_parallel_residual", False)),
    more=_more_stablelm,
)

COHERE = Family(
    "cohere",
    "CohereForCausalLM",
    cohere,
    llama_keys(8192, 40, 64, None, 22528, 256000, 8192, eps=("layer_norm_eps", 1e-5), tied=True)
    | {
        "logit_scale": real("logits_scale", 0.0625),
        "use_qk_norm": flag("qk_norm", False),
        "attention_bias": flag("bias_attention", False),
    },
    rope=RopeKeys(theta=500_000.0),
)

STARCODER2 = Family(
    "starcoder2",
    "Starcoder2ForCausalLM",
    starcoder2,
    llama_keys(
        *(3072, 30, 24, 2, 12288, 49152, 4096),
        act=("hidden_act", "gelu_pytorch_tanh"),
        eps=("norm_epsilon", 1e-5),
        tied=True,
    )
    | {
        "use_bias": flag("bias", True),
        "sliding_window": size_or_none("window"),
        "residual_dropout": real("dropout", 0.0),
        "embedding_dropout": real("dropout_embedding", 0.0),
    },
    rope=RopeKeys(),
    ignored=frozenset({"norm_type", "mlp_type"}),
)

FAMILIES = (
    *(LLAMA, MISTRAL, QWEN2, QWEN3, PHI3, OLMO, OLMO2, GLM4, STABLELM, SMOLLM3),
    *(GRANITE, COHERE, STARCODER2),
)
