"""Language models that read images."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Unpack

from isoflop.arch.families.common import head_size, repeat
from isoflop.arch.families.gemma import gemma3
from isoflop.arch.families.llama import Numbers, llama, qwen2
from isoflop.arch.spec import (
    Activation,
    Arch,
    Attention,
    Chunked,
    Dense,
    Layer,
    LayerNorm,
    Norm,
    Projector,
    RmsNorm,
    Rope,
    Rope2d,
    VisionTower,
)

#: Values, not calls: a frozen default may be shared.
_LAYER_NORM = LayerNorm(eps=1e-6)


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
    projector_bias: bool = True,
    feature_layer: int | None = None,
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
        projector=Projector(bias=projector_bias),
        feature_layer=feature_layer,
    )


def siglip(
    name: str,
    *,
    d_model: int,
    n_layers: int,
    n_heads: int,
    d_ff: int,
    image: int,
    patch: int,
    channels: int = 3,
    activation: Activation = "gelu_tanh",
    eps: float = 1e-6,
    dropout_attention: float = 0.0,
    merge: int = 1,
) -> VisionTower:
    """SigLIP's tower without its pooling head, with Gemma 3's projector behind it.

    `merge` x `merge` patches are averaged, normed and mapped once, and an image's tokens see each
    other. Source: Zhai 2023 (2303.15343); Kamath 2025 (2503.19786), section 2.1.
    """
    plain = clip(name, d_model=d_model, n_layers=n_layers, n_heads=n_heads, d_ff=d_ff, image=image,
                 patch=patch, channels=channels, activation=activation, eps=eps,
                 dropout_attention=dropout_attention)  # fmt: skip
    norm = RmsNorm(eps, unit_offset=True)
    projector = Projector(1, bias=False, norm=norm, merge=merge, averaged=True)
    return replace(plain, class_token=False, patch_bias=True, pre_norm=None, projector=projector,
                   both_ways=True)  # fmt: skip


def qwen_vision(
    name: str,
    *,
    d_model: int,
    n_layers: int,
    n_heads: int,
    d_ff: int,
    image: int,
    patch: int = 14,
    channels: int = 3,
    frames: int = 2,
    merge: int = 2,
    activation: Activation = "gelu_quick",
    gated: bool = False,
    norm: Norm = _LAYER_NORM,
    chunk: int | None = None,
    full: Sequence[int] = (),
) -> VisionTower:
    """The tower of Qwen2-VL and, gated, with RMS norms and windows, of Qwen2.5-VL.

    A patch spans `frames` frames; positions are rotated, in two dimensions. Layers see a
    window of `chunk` patches, but for those listed in `full`; None: all see all. Source:
    Wang 2024 (2409.12191), section 2.1; Bai 2025 (2502.13923), section 2.1.1.
    """
    heads = head_size(name, d_model, n_heads)
    attention = Attention(n_heads, n_heads, heads, position=Rope2d(), bias_qkv=True, bias_out=True)
    layer = Layer(attention, Dense(d_ff, activation, gated=gated, bias=True), norm)
    layers = repeat(name, layer, n_layers)
    if chunk is not None:
        near = replace(layer, attention=replace(attention, span=Chunked(chunk)), name="local")
        layers = tuple(
            replace(layer, name="global") if i in full else near for i in range(n_layers)
        )
    projector = Projector(2, norm=norm, merge=merge, d_hidden=merge**2 * d_model)
    return VisionTower(d_model, layers, image, patch, channels, class_token=False,
                       positions=False, projector=projector, frames=frames)  # fmt: skip


def in_sections(arch: Arch, sections: tuple[int, ...]) -> Arch:
    """The same, its tokens turned by time, row and column (Qwen2-VL's M-RoPE)."""

    def turned(layer: Layer) -> Layer:
        attention = layer.attention
        if not isinstance(attention, Attention) or not isinstance(attention.position, Rope):
            return layer
        rope = replace(attention.position, sections=sections)
        return replace(layer, attention=replace(attention, position=rope))

    kinds = {name: turned(layer) for name, layer in arch.kinds.items()}
    return replace(arch, layers=tuple(kinds[layer.name] for layer in arch.layers))


#: Pairs of a head of 128 that go by time, row and column.
SECTIONS = (16, 24, 24)


def gemma3_vision(name: str, **numbers: Any) -> Arch:
    """Gemma 3 that reads SigLIP So400m at 896 pixels, 16 patches to a token.

    Source: Kamath 2025 (2503.19786), section 2.1; google/gemma-3-4b-pt config.json.
    """
    tower = siglip(name, d_model=1152, n_layers=27, n_heads=16, d_ff=4304, image=896, patch=14,
                   merge=4)  # fmt: skip
    return replace(gemma3(name, **numbers), vision=tower)


def qwen2_vl(name: str, **numbers: Any) -> Arch:
    """Qwen2 that reads images of any size, counted at 448 pixels.

    Source: Wang 2024 (2409.12191), section 2.1; Qwen/Qwen2-VL-7B-Instruct config.json.
    """
    tower = qwen_vision(name, d_model=1280, n_layers=32, n_heads=16, d_ff=5120, image=448)
    return replace(in_sections(qwen2(name, **numbers), SECTIONS), vision=tower)


def qwen2_5_vl(name: str, *, d_ff_vision: int = 3420, **numbers: Any) -> Arch:
    """The same with Qwen2.5-VL's tower: gated, in windows of 112 pixels but for four layers.

    Source: Bai 2025 (2502.13923), section 2.1.1; Qwen/Qwen2.5-VL-7B-Instruct config.json.
    """
    tower = qwen_vision(name, d_model=1280, n_layers=32, n_heads=16, d_ff=d_ff_vision, image=448,
                        activation="silu", gated=True, norm=RmsNorm(1e-6), chunk=64,
                        full=(7, 15, 23, 31))  # fmt: skip
    return replace(in_sections(qwen2(name, **numbers), SECTIONS), vision=tower)


def llava(name: str, **numbers: Unpack[Numbers]) -> Arch:
    """LLaVA 1.5: Llama (Vicuna) that reads CLIP ViT-L/14 at 336 pixels, less its last layer.

    Source: Liu 2023 (2310.03744), section 3.3; llava-hf/llava-1.5-7b-hf config.json.
    """
    tower = clip(name, d_model=1024, n_layers=24, n_heads=16, d_ff=4096, image=336, patch=14,
                 feature_layer=23)  # fmt: skip
    return replace(llama(name, **numbers), vision=tower)
