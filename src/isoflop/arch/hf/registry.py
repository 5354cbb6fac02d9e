"""Every `model_type` that is read, in the order in which a spec is offered to them."""

from __future__ import annotations

from isoflop.arch.hf import gemma, gpt, llama, moe, parallel, t5, vision
from isoflop.arch.hf.family import Family

_LANGUAGES = {
    family.model_type: family
    for module in (gpt, llama, parallel, gemma, moe, t5)
    for family in module.FAMILIES
}

_WITH_VISION = (vision.llava_family(_LANGUAGES), *vision.FAMILIES)

FAMILIES: dict[str, Family] = _LANGUAGES | {family.model_type: family for family in _WITH_VISION}
