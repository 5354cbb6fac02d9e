"""What of a spec can be built, and what is refused, field by field."""

from __future__ import annotations

from collections.abc import Iterator

from isoflop.arch.spec import (
    Arch,
    Attention,
    Dense,
    Full,
    Layer,
    LinearScaling,
    Llama3Scaling,
    RelativeBias,
    Rope,
    Window,
)
from isoflop.errors import InputError, Problem
from isoflop.model.encoder_decoder import encoder_decoder_problems
from isoflop.model.parts import ACTIVATIONS
from isoflop.model.relative_bias import relative_bias_problems
from isoflop.model.vision import vision_problems


def check_supported(arch: Arch) -> None:
    """Refuse a spec that the model cannot follow exactly.

    Raises:
        InputError: each unsupported field, and what is supported there.
    """
    problems = list(_whole(arch))
    for place, layers, both_ways in _stacks(arch):
        for layer in dict.fromkeys(layers):
            problems += _layer(f"{place}.{layer.name}", layer, both_ways=both_ways)
        problems += relative_bias_problems(place, layers, both_ways=both_ways)
    if arch.encoder is not None:
        problems += encoder_decoder_problems(arch, arch.encoder)
    if arch.vision is not None:
        problems += vision_problems(arch, arch.vision)
    if problems:
        raise InputError(arch.name, problems)


def decoder_problems(arch: Arch) -> list[Problem]:
    """What feeds a model beside text, where text alone goes in."""
    towers = {"arch.encoder": arch.encoder, "arch.vision": arch.vision}
    hint = f"{arch.name} has one: name a decoder alone"
    return [
        Problem(field, type(tower).__name__, "is None where text alone goes in", hint)
        for field, tower in towers.items()
        if tower is not None
    ]


def _stacks(arch: Arch) -> Iterator[tuple[str, tuple[Layer, ...], bool]]:
    """Every stack of layers, what it is called, and whether its tokens see later ones."""
    if arch.encoder is not None:
        yield "encoder.layers", arch.encoder.layers, True
    if arch.vision is not None:
        yield "vision.layers", arch.vision.layers, True
    yield "layers", arch.layers, False


def _whole(arch: Arch) -> Iterator[Problem]:
    if arch.vision is not None and arch.encoder is not None:
        yield Problem("vision", "VisionTower", "is None where there is an encoder")
    width = arch.embedding.d_embed
    if arch.head.tied and width not in (None, arch.d_model):
        rule = f"is d_model={arch.d_model} where the head is tied"
        yield Problem("embedding.d_embed", width, rule)


def _layer(place: str, layer: Layer, *, both_ways: bool) -> Iterator[Problem]:
    if layer.cross is not None:
        yield from _attention(f"{place}.cross", layer.cross)
    if not isinstance(layer.feed_forward, Dense):
        yield Problem(f"{place}.feed_forward", layer.feed_forward.kind, "is dense")
    elif layer.feed_forward.activation not in ACTIVATIONS:
        rule = f"is one of {', '.join(ACTIVATIONS)}"
        yield Problem(f"{place}.feed_forward.activation", layer.feed_forward.activation, rule)
    if isinstance(layer.attention, Attention):
        yield from _attention(f"{place}.attention", layer.attention)
        if both_ways and not isinstance(span := layer.attention.span, Full):
            rule = "is full where tokens see later ones"
            yield Problem(f"{place}.attention.span", span.kind, rule)
    else:
        rule = "is attention (multi-head, grouped-query or multi-query)"
        yield Problem(f"{place}.attention", layer.attention.kind, rule)


def _attention(place: str, attention: Attention) -> Iterator[Problem]:
    if not isinstance(attention.position, Rope | RelativeBias | None):
        rule = "is rope, relative_bias or None"
        yield Problem(f"{place}.position", attention.position.kind, rule)
    elif isinstance(attention.position, Rope):
        scaling = attention.position.scaling
        if not isinstance(scaling, LinearScaling | Llama3Scaling | None):
            rule = "is linear, llama3 or None"
            yield Problem(f"{place}.position.scaling", scaling.kind, rule)
    if not isinstance(attention.span, Full | Window):
        yield Problem(f"{place}.span", attention.span.kind, "is full or window")
    if attention.qk_norm is not None and attention.qk_norm.per == "each_head":
        yield Problem(f"{place}.qk_norm.per", "each_head", "is head or all_heads")
    if attention.sinks:
        yield Problem(f"{place}.sinks", attention.sinks, "is False")
