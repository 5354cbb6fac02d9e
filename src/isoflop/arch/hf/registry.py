"""Every `model_type` that is read, in the order in which a spec is offered to them."""

from __future__ import annotations

from isoflop.arch.hf import gemma, gpt, llama, moe, parallel, t5
from isoflop.arch.hf.family import Family
from isoflop.arch.hf.vision import llava_family

_LANGUAGES = {
    family.model_type: family
    for module in (gpt, llama, parallel, gemma, moe, t5)
    for family in module.FAMILIES
}

FAMILIES: dict[str, Family] = {**_LANGUAGES, "llava": llava_family(_LANGUAGES)}
