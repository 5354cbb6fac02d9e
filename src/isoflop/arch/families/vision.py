"""Language models that read images."""

from __future__ import annotations

from dataclasses import replace
from typing import Unpack

from isoflop.arch.families.common import head_size, repeat
from isoflop.arch.families.llama import Numbers, llama
from isoflop.arch.spec import Activation, Arch, Attention, Dense, Layer, LayerNorm, VisionTower


def clip(
    name: str,
    *,
    d_model: int,
    n_layers: int,
    n_heads: int,
    d_ff: int,
    image: int,
    patch: int,
    channels: int = 3,
    activation: Activation = "gelu_quick",
    eps: float = 1e-5,
    dropout_attention: float = 0.0,
    projector: int = 2,
    projector_bias: bool = True,
) -> VisionTower:
    """CLIP's vision transformer, with LLaVA's projector behind it.

    Source: Radford 2021 (2103.00020), section 2.4; Liu 2023 (2310.03744), section 3.3.
    """
    norm = LayerNorm(eps=eps)
    layer = Layer(
        attention=Attention(
            n_heads,
            n_heads,
            head_size(name, d_model, n_heads),
            bias_qkv=True,
            bias_out=True,
            dropout=dropout_attention,
        ),
        feed_forward=Dense(d_ff, activation, bias=True),
        norm=norm,
    )
    return VisionTower(
        d_model=d_model,
        layers=repeat(name, layer, n_layers),
        image=image,
        patch=patch,
        channels=channels,
        pre_norm=norm,
        final_norm=norm,
        projector=projector,
        projector_bias=projector_bias,
    )


def llava(name: str, **numbers: Unpack[Numbers]) -> Arch:
    """LLaVA 1.5: Llama (Vicuna) that reads CLIP ViT-L/14 at 336 pixels.

    Source: Liu 2023 (2310.03744), section 3.3; llava-hf/llava-1.5-7b-hf config.json.
    """
    tower = clip(name, d_model=1024, n_layers=24, n_heads=16, d_ff=4096, image=336, patch=14)
    return replace(llama(name, **numbers), vision=tower)
