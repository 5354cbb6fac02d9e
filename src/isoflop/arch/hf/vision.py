"""Language models of other families behind a vision tower: LLaVA, Gemma 3, Qwen2-VL, Qwen2.5-VL."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from isoflop.arch.families import clip, in_sections, qwen2, qwen_vision, siglip
from isoflop.arch.families.vision import SECTIONS
from isoflop.arch.hf.config import Config
from isoflop.arch.hf.family import Facts, Family, Key, flag, layers, llama_keys, real, size, word
from isoflop.arch.hf.gemma import GEMMA3_TEXT
from isoflop.arch.hf.llama import finish_qwen, more_windows
from isoflop.arch.hf.rope import RopeKeys
from isoflop.arch.spec import Arch, Attention, Chunked, Dense, Full, RmsNorm, VisionTower
from isoflop.errors import InputError, Problem

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
    for harmless in ("image_seq_length", "image_token_index", "image_token_id"):
        keys.has(harmless)
    keys.only("vision_feature_select_strategy", "default", "the class token is not projected")
    keys.only("projector_hidden_act", "gelu", "a GELU stands between the projector's maps")
    inner = keys.inner("text_config")
    family = languages[inner.choice("model_type", {m: m for m in languages}, "llama")]
    inner.has("architectures")
    numbers["text"] = family.read(name, inner)


def _tower(name: str, keys: Config, bias: bool) -> VisionTower:
    table = keys.table("vision_config")
    if table is None:
        keys.defaulted.append("vision_config=CLIP ViT-L/14 at 336 pixels")
        return _with_feature_layer(clip(name, **_LARGE, projector_bias=bias), keys)
    table.only("model_type", "clip_vision_model", "the spec has CLIP's tower")
    for unused in ("projection_dim", "vocab_size"):
        table.has(unused)
    said = {key.says: key.read(table, named) for named, key in _CLIP.items()}
    return _with_feature_layer(clip(name, **said, projector_bias=bias), keys)


def _with_feature_layer(tower: VisionTower, keys: Config) -> VisionTower:
    """Their index counts what the first layer reads as 0; the final norm is not among them."""
    known, most = keys.has("vision_feature_layer"), len(tower.layers)
    index = keys.keys["vision_feature_layer"] if known else -2
    if not isinstance(index, int) or isinstance(index, bool) or not -most - 1 <= index <= most:
        rule = f"is one whole number from {-most - 1} to {most}: the projector reads one layer"
        raise InputError(keys.where, [Problem("vision_feature_layer", index, rule)])
    return replace(tower, feature_layer=index % (most + 1))


def _tower_in(arch: Arch) -> VisionTower:
    """The spec's tower.

    Raises:
        KeyError: it has none.
    """
    if arch.vision is None:
        raise KeyError("vision")
    return arch.vision


def _write_tower(tower: VisionTower, keys: Mapping[str, Key], **more: int) -> Facts:
    """What these keys say of a tower, by its first layer, and `more`."""
    layer = tower.layers[0]
    dense = layer.feed_forward
    if not isinstance(layer.attention, Attention) or not isinstance(dense, Dense):
        raise KeyError("n_heads")
    said: Facts = {
        "d_model": tower.d_model,
        "n_layers": len(tower.layers),
        "n_heads": layer.attention.n_heads,
        "d_ff": dense.d_ff,
        "activation": dense.activation,
        "eps": layer.norm.eps,
        "dropout_attention": layer.attention.dropout,
        "image": tower.image,
        "patch": tower.patch,
        "channels": tower.channels,
        "frames": tower.frames,
        "merge": tower.projector.merge,
        **more,
    }
    return {name: key.write(said) for name, key in keys.items()}


def _more_llava(arch: Arch, facts: Facts) -> Facts:
    tower = _tower_in(arch)
    return {
        "vision_config": {"model_type": "clip_vision_model"} | _write_tower(tower, _CLIP),
        "text_config": facts["text_config"],
        "vision_feature_layer": tower.n_run - len(tower.layers) - 1,
        "image_seq_length": tower.tokens_of_image,
        "multimodal_projector_bias": tower.projector.bias,
        "tie_word_embeddings": arch.head.tied,
    }


def llava_family(languages: Mapping[str, Family]) -> Family:
    """LLaVA over any of the families of language models."""
    return Family(
        "llava",
        "LlavaForConditionalGeneration",
        _join,
        {
            "multimodal_projector_bias": flag("bias", True),
            "tie_word_embeddings": flag("tied", False),
        },
        finish=lambda keys, numbers: _finish(languages, keys, numbers),
        more=_more_llava,
    )


# --- Gemma 3 ----------------------------------------------------------------------------

_SIGLIP: dict[str, Key] = _CLIP | {
    "patch_size": size("patch", 16),
    "hidden_act": word("activation", "gelu_pytorch_tanh"),
    "layer_norm_eps": real("eps", 1e-6),
}


def _join_as_said(name: str, *, text: Arch, vision: VisionTower, tied: bool) -> Arch:
    """Here the outer key alone says whether the head is tied."""
    return replace(text, name=name, head=replace(text.head, tied=tied), vision=vision)


def _finish_gemma3(keys: Config, numbers: Facts) -> None:
    for token in ("boi_token_index", "eoi_token_index", "image_token_index"):
        keys.has(token)
    tokens = keys.size("mm_tokens_per_image", 256)
    table = keys.inner("vision_config")
    table.only("model_type", "siglip_vision_model", "the spec has SigLIP's tower")
    said = {key.says: key.read(table, named) for named, key in _SIGLIP.items()}
    if table.flag("vision_use_head", True):
        rule = "is false: the tower is read without its pooling head"
        raise InputError(keys.where, [Problem("vision_config.vision_use_head", True, rule)])
    merge = max(said["image"] // said["patch"] // max(math.isqrt(tokens), 1), 1)
    numbers["vision"] = siglip(keys.where, **said, merge=merge)
    inner = keys.inner("text_config")
    inner.only("model_type", "gemma3_text", "its language model is Gemma 3's")
    inner.has("architectures")
    numbers["text"] = GEMMA3_TEXT.read(keys.where, inner)


def _more_gemma3(arch: Arch, facts: Facts) -> Facts:
    tower = _tower_in(arch)
    text = GEMMA3_TEXT.write(arch, facts)
    if text is None or arch.d_model % text["num_attention_heads"]:
        raise KeyError("text_config")
    written = {"model_type": "siglip_vision_model", "vision_use_head": False}
    return {
        "vision_config": written | _write_tower(tower, _SIGLIP),
        "text_config": text,
        "mm_tokens_per_image": tower.tokens_of_image,
        "tie_word_embeddings": arch.head.tied,
    }


GEMMA3 = Family(
    "gemma3",
    "Gemma3ForConditionalGeneration",
    _join_as_said,
    {"tie_word_embeddings": flag("tied", True)},
    finish=_finish_gemma3,
    more=_more_gemma3,
)

# --- Qwen2-VL and Qwen2.5-VL ------------------------------------------------------------

#: Their towers read images of any size, so a config names none; FLOPs are counted for this one.
_IMAGE = 448
#: The class divides the width by the heads, whatever `head_dim` says.
_QWEN_TEXT_KEYS = {
    name: key
    for name, key in llama_keys(
        8192, 80, 64, 8, 29568, 152064, 32768, eps=("rms_norm_eps", 1e-5)
    ).items()
    if name != "head_dim"
}
_QWEN_TEXT = Family(
    "qwen2_vl_text",
    "Qwen2VLTextModel",
    qwen2,
    _QWEN_TEXT_KEYS,
    rope=RopeKeys(theta=1_000_000.0),
    finish=lambda keys, numbers: finish_qwen(keys, numbers, usual=80),
    more=more_windows,
    square=True,
)
#: What both towers have.
_QWEN_TOWER: dict[str, Key] = {
    "depth": layers(32),
    "num_heads": size("n_heads", 16),
    "in_channels": size("channels", 3),
    "patch_size": size("patch", 14),
    "spatial_merge_size": size("merge", 2),
    "temporal_patch_size": size("frames", 2),
}
_TOWER_2: dict[str, Key] = _QWEN_TOWER | {
    "embed_dim": size("d_model", 1280),
    "mlp_ratio": size("d_ff", 4),  # times the width
    "hidden_act": word("activation", "quick_gelu"),
    "hidden_size": size("d_out", 3584),
}
_TOWER_2_5: dict[str, Key] = _QWEN_TOWER | {
    "hidden_size": size("d_model", 3584),
    "intermediate_size": size("d_ff", 3420),
    "hidden_act": word("activation", "silu"),
    "out_hidden_size": size("d_out", 3584),
    "window_size": size("window", 112),
}


#: Layers of Qwen2.5-VL's tower that see all, where the config does not say.
_FULL = (7, 15, 23, 31)


def _read_tower(keys: Config, tower: Mapping[str, Key]) -> tuple[Config, Facts]:
    """The tower's table, and what it says; the image is a whole number of windows, or of tokens."""
    table = keys.inner("vision_config")
    for unused in (
        "model_type",
        "in_chans",
        "spatial_patch_size",
        "rope_parameters",
        "tokens_per_second",
    ):
        table.has(unused)
    said = {key.says: key.read(table, named) for named, key in tower.items()}
    if "window" in said:  # in tokens, of which a side has a whole number
        said["window"] = max(said["window"] // said["merge"] // said["patch"], 1) * said["merge"]
    side = said["patch"] * said.get("window", said["merge"])
    said["image"] = max(_IMAGE // side, 1) * side
    keys.defaulted.append(f"image={said['image']} pixels a side (any size is read)")
    return table, said


def _read_text(keys: Config, numbers: Facts, d_out: int) -> None:
    """The language model: a table of its own, or the top level, where the hub's configs have it."""
    for token in ("image_token_id", "video_token_id", "vision_token_id", "vision_start_token_id",
                  "vision_end_token_id"):  # fmt: skip
        keys.has(token)
    inner = keys.table("text_config") or keys
    for unused in ("model_type", "architectures"):
        inner.has(unused)
    text = _QWEN_TEXT.read(keys.where, inner)
    sections = _read_sections(inner)
    keys.close()
    numbers["text"] = in_sections(text, sections)
    if text.d_model != d_out:
        rule = f"is the language model's width, {text.d_model}"
        raise InputError(keys.where, [Problem("vision_config: width out", d_out, rule)])


def _read_sections(keys: Config) -> tuple[int, ...]:
    """How many pairs go by time, by row and by column."""
    table = keys.table("rope_scaling") or keys.table("rope_parameters")
    if table is not None and table.has("mrope_section"):
        return table.wholes("mrope_section")
    keys.defaulted.append(f"mrope_section={list(SECTIONS)}")
    return SECTIONS


def _finish_qwen2_vl(keys: Config, numbers: Facts) -> None:
    _, said = _read_tower(keys, _TOWER_2)
    d_out = said.pop("d_out")
    said["d_ff"] *= said["d_model"]
    keys.close()
    numbers["vision"] = qwen_vision(keys.where, **said)
    _read_text(keys, numbers, d_out)


def _finish_qwen2_5_vl(keys: Config, numbers: Facts) -> None:
    table, said = _read_tower(keys, _TOWER_2_5)
    d_out = said.pop("d_out")
    full = table.wholes("fullatt_block_indexes") if table.has("fullatt_block_indexes") else _FULL
    chunk = said.pop("window") ** 2
    keys.close()
    numbers["vision"] = qwen_vision(keys.where, **said, gated=True, norm=RmsNorm(1e-6),
                                    chunk=chunk, full=full)  # fmt: skip
    _read_text(keys, numbers, d_out)


def _more_qwen(arch: Arch, facts: Facts, model_type: str, tower: Facts) -> Facts:
    """The config of a tower, and the language model's."""
    text, sections = _QWEN_TEXT.write(arch, facts), facts["rope"].sections
    if text is None or sections is None or arch.d_model % text["num_attention_heads"]:
        raise KeyError("text_config")
    scaling = text["rope_scaling"] or {"rope_type": "default"}
    text["rope_scaling"] = scaling | {"mrope_section": list(sections)}
    del text["architectures"]
    return {
        "vision_config": {"model_type": model_type} | tower,
        "text_config": text | {"model_type": f"{model_type}_text"},
        "tie_word_embeddings": arch.head.tied,
    }


def _more_qwen2_vl(arch: Arch, facts: Facts) -> Facts:
    tower = _tower_in(arch)
    written = _write_tower(tower, _TOWER_2, d_out=arch.d_model)
    written["mlp_ratio"] = max(written["mlp_ratio"] // tower.d_model, 1)
    return _more_qwen(arch, facts, "qwen2_vl", written)


def _more_qwen2_5_vl(arch: Arch, facts: Facts) -> Facts:
    tower = _tower_in(arch)
    spans = [
        layer.attention.span for layer in tower.layers if isinstance(layer.attention, Attention)
    ]
    chunks = {span.chunk for span in spans if isinstance(span, Chunked)} or {
        tower.projector.merge**2
    }
    window = math.isqrt(max(chunks)) * tower.patch
    written = _write_tower(tower, _TOWER_2_5, d_out=arch.d_model, window=window)
    full = [i for i, span in enumerate(spans) if isinstance(span, Full)]
    return _more_qwen(arch, facts, "qwen2_5_vl", written | {"fullatt_block_indexes": full})


def _qwen_family(
    model_type: str,
    model_class: str,
    finish: Callable[[Config, Facts], None],
    more: Callable[[Arch, Facts], Facts],
) -> Family:
    tied = {"tie_word_embeddings": flag("tied", False)}
    return Family(model_type, model_class, _join, tied, finish=finish, more=more)


QWEN2_VL = _qwen_family(
    "qwen2_vl", "Qwen2VLForConditionalGeneration", _finish_qwen2_vl, _more_qwen2_vl
)
QWEN2_5_VL = _qwen_family(
    "qwen2_5_vl", "Qwen2_5_VLForConditionalGeneration", _finish_qwen2_5_vl, _more_qwen2_5_vl
)

FAMILIES = (GEMMA3, QWEN2_VL, QWEN2_5_VL)
