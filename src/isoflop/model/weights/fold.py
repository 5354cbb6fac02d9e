"""What a config cannot say, put into weights, where it comes to the same."""

from __future__ import annotations

from dataclasses import replace

import torch

from isoflop.model.decoder import Decoder
from isoflop.model.parts import LayerNormModule, ProjectedHead, RmsNormModule


@torch.no_grad()
def fold_head_scale(model: Decoder) -> bool:
    """Let the final norm give what the head's scale made of it, in place; False if it cannot.

    Logits stay as they are but for rounding, of which there is none where the scale is a power
    of 2. What else the final norm feeds, in a decoder, is nothing.
    """
    norm, scale = model.final_norm, model.arch.head.scale
    head = model.head.logits if isinstance(model.head, ProjectedHead) else model.head
    if not isinstance(norm, LayerNormModule | RmsNormModule) or norm.weight is None:
        return False
    offset = 1.0 if getattr(norm, "unit_offset", False) else 0.0
    norm.weight.copy_((norm.weight + offset) * scale - offset)
    for bias in (getattr(norm, "bias", None), head.bias):
        if bias is not None:
            bias.mul_(scale)
    head.scale = 1.0
    model.arch = replace(model.arch, head=replace(model.arch.head, scale=1.0))
    return True
