"""Models that read images: a tower's names beside those of the language model behind it.

Names are those that transformers 5 writes; `older` has those of the hub and of transformers 4.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from isoflop.arch.spec import Arch, VisionTower
from isoflop.errors import Fault
from isoflop.model.weights.change import Kernel, Transposed
from isoflop.model.weights.table import QKV, Names, Stack, Stored, Table, joined

_FREQUENCIES = r"language_model\.model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq"
#: Numbers of positions, which transformers 4 stored.
_NUMBERED = r"vision_tower\.embeddings\.position_ids"


#: The table of each one's language model; a LLaVA's may be of any family.
_LANGUAGES = {"gemma3": "gemma3_text", "qwen2_vl": "qwen2", "qwen2_5_vl": "qwen2"}


def language_of(config: Mapping[str, Any]) -> str:
    """The `model_type` whose table the language model inside has."""
    if (model_type := str(config.get("model_type"))) in _LANGUAGES:
        return _LANGUAGES[model_type]
    inner = config.get("text_config")
    return str(inner.get("model_type", "llama")) if isinstance(inner, Mapping) else "llama"


def _tower_of(arch: Arch) -> VisionTower:
    if arch.vision is None:
        raise Fault(f"{arch.name} has no vision tower")
    return arch.vision


def _moved(names: Names, prefix: str, place: str) -> Names:
    """Names of a language model that stand at `place`, without the prefix of their own."""
    stored = {x: Stored(y) if isinstance(y, str) else y for x, y in names.items()}
    return {x: Stored(place + y.name.removeprefix(prefix), y.change) for x, y in stored.items()}


# --- CLIP and SigLIP --------------------------------------------------------------------

_CLIP_LAYER: Names = {
    "attention.q": "self_attn.q_proj",
    "attention.k": "self_attn.k_proj",
    "attention.v": "self_attn.v_proj",
    "attention.out": "self_attn.out_proj",
    "norm_attention": "layer_norm1",
    "norm_feed_forward": "layer_norm2",
    "feed_forward.up": "mlp.fc1",
    "feed_forward.down": "mlp.fc2",
}


def _clip(tower: VisionTower) -> Names:
    kernel = Kernel((tower.channels, tower.patch, tower.patch))
    embeddings = "vision_tower.embeddings"
    return {
        "vision.class_token.weight": f"{embeddings}.class_embedding",
        "vision.patches.weight": Stored(f"{embeddings}.patch_embedding.weight", kernel),
        "vision.patches.bias": f"{embeddings}.patch_embedding.bias",
        "vision.positions": f"{embeddings}.position_embedding",
        "vision.pre_norm": "vision_tower.pre_layrnorm",
        "vision.final_norm": "vision_tower.post_layernorm",
    }


def _beside_clip(language: Table, arch: Arch, projector: Names) -> Table:
    """A language model, CLIP's tower or one like it, and what stands between."""
    place = "language_model.model."
    whole = _moved(language.whole, language.prefix, place)
    names = {**_clip(_tower_of(arch)), **projector, **whole, "head": "language_model.lm_head"}
    stacks = tuple(
        Stack(x.ours, place + x.theirs.removeprefix(language.prefix), x.names)
        for x in language.stacks
    )
    older = (
        (r"^model\.language_model\.", place),
        (r"^lm_head\.", "language_model.lm_head."),
        (r"^model\.(vision_tower|multi_modal_projector)\.", r"\1."),
        (r"^vision_tower\.vision_model\.", "vision_tower."),
    )
    tower = Stack("vision.layers.{}.", "vision_tower.encoder.layers.{}.", _CLIP_LAYER)
    return Table(names, (tower, *stacks), older=older, ignored=(_NUMBERED, _FREQUENCIES))


def llava(language: Table, arch: Arch) -> Table:
    projector: Names = {
        f"vision.projector.linear_{i}": f"multi_modal_projector.linear_{i}" for i in (1, 2)
    }
    return _beside_clip(language, arch, projector)


def gemma3(language: Table, arch: Arch) -> Table:
    weight = Stored("multi_modal_projector.mm_input_projection_weight", Transposed())
    projector: Names = {
        "vision.projector.norm": "multi_modal_projector.mm_soft_emb_norm",
        "vision.projector.linear_1.weight": weight,
    }
    return _beside_clip(language, arch, projector)


# --- Qwen2-VL and Qwen2.5-VL ------------------------------------------------------------

_QWEN_LAYER: Names = {
    QKV: joined("attn.qkv"),
    "attention.out": "attn.proj",
    "norm_attention": "norm1",
    "norm_feed_forward": "norm2",
}


def qwen2_vl(language: Table, arch: Arch) -> Table:
    return _beside_qwen(
        language, arch, {"feed_forward.up": "mlp.fc1", "feed_forward.down": "mlp.fc2"}
    )


def qwen2_5_vl(language: Table, arch: Arch) -> Table:
    gated: Names = {f"feed_forward.{x}": f"mlp.{x}_proj" for x in ("gate", "up", "down")}
    return _beside_qwen(language, arch, gated)


def _beside_qwen(language: Table, arch: Arch, feed_forward: Names) -> Table:
    tower = _tower_of(arch)
    kernel = Kernel((tower.channels, tower.frames, tower.patch, tower.patch))
    names: Names = {
        "vision.patches.weight": Stored("visual.patch_embed.proj.weight", kernel),
        "vision.projector.norm": "visual.merger.ln_q",
        "vision.projector.linear_1": "visual.merger.mlp.0",
        "vision.projector.linear_2": "visual.merger.mlp.2",
    }
    stack = Stack("vision.layers.{}.", "visual.blocks.{}.", {**_QWEN_LAYER, **feed_forward})
    older = ((r"^model\.language_model\.", "model."), (r"^model\.visual\.", "visual."))
    return replace(
        language,
        whole={**names, **language.whole},
        stacks=(stack, *language.stacks),
        older=older,
    )


#: model_type -> what makes its table from the language model's, for a spec.
TABLES: Mapping[str, Callable[[Table, Arch], Table]] = {
    "llava": llava,
    "gemma3": gemma3,
    "qwen2_vl": qwen2_vl,
    "qwen2_5_vl": qwen2_5_vl,
}
