"""LLaVA: a language model of another family, CLIP's vision tower, a projector."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from isoflop.arch.families import clip
from isoflop.arch.hf.config import Config
from isoflop.arch.hf.family import Facts, Family, Key, flag, layers, real, size, word
from isoflop.arch.spec import Arch, VisionTower

#: CLIP ViT-L/14 at 336 pixels, which LLaVA takes where nothing is said.
_LARGE: dict[str, Any] = {
    "d_model": 1024,
    "n_layers": 24,
    "n_heads": 16,
    "d_ff": 4096,
    "image": 336,
    "patch": 14,
}
_CLIP: dict[str, Key] = {
    "hidden_size": size("d_model", 768),
    "num_hidden_layers": layers(12),
    "num_attention_heads": size("n_heads", 12),
    "intermediate_size": size("d_ff", 3072),
    "image_size": size("image", 224),
    "patch_size": size("patch", 32),
    "num_channels": size("channels", 3),
    "hidden_act": word("activation", "quick_gelu"),
    "layer_norm_eps": real("eps", 1e-5),
    "attention_dropout": real("dropout_attention", 0.0),
}


def _join(name: str, *, text: Arch, vision: VisionTower, tied: bool) -> Arch:
    head = replace(text.head, tied=text.head.tied or tied)
    return replace(text, name=name, head=head, vision=vision)


def _finish(languages: Mapping[str, Family], keys: Config, numbers: Facts) -> None:
    name = keys.where
    numbers["vision"] = _tower(name, keys, numbers.pop("bias"))
    for harmless in ("image_seq_length", "image_token_index", "image_token_id",
                     "vision_feature_select_strategy", "projector_hidden_act"):  # fmt: skip
        keys.has(harmless)
    if keys.has("vision_feature_layer") and isinstance(keys.keys["vision_feature_layer"], list):
        keys.only("vision_feature_layer", -2, "the projector reads one layer")
    inner = keys.inner("text_config")
    family = languages[inner.choice("model_type", {m: m for m in languages}, "llama")]
    inner.has("architectures")
    numbers["text"] = family.read(name, inner)


def _tower(name: str, keys: Config, bias: bool) -> VisionTower:
    table = keys.table("vision_config")
    if table is None:
        keys.defaulted.append("vision_config=CLIP ViT-L/14 at 336 pixels")
        return clip(name, **_LARGE, projector_bias=bias)
    table.only("model_type", "clip_vision_model", "the spec has CLIP's tower")
    for unused in ("projection_dim", "vocab_size"):
        table.has(unused)
    said = {key.says: key.read(table, named) for named, key in _CLIP.items()}
    return clip(name, **said, projector_bias=bias)


def llava_family(languages: Mapping[str, Family]) -> Family:
    """LLaVA over any of the families of language models. It is read, not written."""
    return Family(
        "llava",
        "LlavaForConditionalGeneration",
        _join,
        {
            "multimodal_projector_bias": flag("bias", True),
            "tie_word_embeddings": flag("tied", False),
        },
        finish=lambda keys, numbers: _finish(languages, keys, numbers),
        more=None,
    )
