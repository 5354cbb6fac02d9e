"""The families: an `Arch` from the few numbers that vary within each.

The zoo and the Hugging Face reader both build through here, so a family's
structure is written once. `FAMILIES` has the builders by name.
"""

from collections.abc import Callable

from isoflop.arch.families.alibi import bloom, mpt
from isoflop.arch.families.gemma import gemma, gemma2, gemma3
from isoflop.arch.families.gpt import gopher, gpt, opt
from isoflop.arch.families.llama import (
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
from isoflop.arch.families.moe import deepseek, gpt_moe, gpt_oss, mixtral, qwen2_moe, qwen3_moe
from isoflop.arch.families.parallel import falcon, gpt_neox, gptj, palm, phi
from isoflop.arch.families.t5 import t5
from isoflop.arch.families.vision import (
    clip,
    gemma3_vision,
    in_sections,
    llava,
    qwen2_5_vl,
    qwen2_vl,
    qwen_vision,
    siglip,
)
from isoflop.arch.spec import Arch

#: The builders of whole models.
FAMILIES: dict[str, Callable[..., Arch]] = {
    build.__name__: build
    for build in (
        *(gpt, gpt_neox, gptj, opt, bloom, mpt, falcon, phi, palm, gopher),
        *(llama, mistral, qwen2, qwen3, granite, smollm3, olmo, olmo2, glm4, stablelm),
        *(cohere, starcoder2, gemma, gemma2, gemma3),
        *(mixtral, qwen2_moe, qwen3_moe, deepseek, gpt_moe, gpt_oss, t5),
        *(llava, gemma3_vision, qwen2_vl, qwen2_5_vl),
    )
}

__all__ = [
    "FAMILIES",
    "bloom",
    "clip",
    "cohere",
    "deepseek",
    "falcon",
    "gemma",
    "gemma2",
    "gemma3",
    "gemma3_vision",
    "glm4",
    "gopher",
    "gpt",
    "gpt_moe",
    "gpt_neox",
    "gpt_oss",
    "gptj",
    "granite",
    "in_sections",
    "llama",
    "llava",
    "mistral",
    "mixtral",
    "mpt",
    "olmo",
    "olmo2",
    "opt",
    "palm",
    "phi",
    "qwen2",
    "qwen2_5_vl",
    "qwen2_moe",
    "qwen2_vl",
    "qwen3",
    "qwen3_moe",
    "qwen_vision",
    "siglip",
    "smollm3",
    "stablelm",
    "starcoder2",
    "t5",
]
