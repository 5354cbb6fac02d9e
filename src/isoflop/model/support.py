"""What of a spec can be built, and what is refused, field by field."""

from __future__ import annotations

from collections.abc import Iterator

from isoflop.arch.spec import (
    Alibi,
    Arch,
    Attention,
    Chunked,
    Dense,
    Experts,
    FeedForward,
    Full,
    LatentAttention,
    Layer,
    RelativeProjection,
    Rope2d,
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


def _layer(place: str, layer: Layer, *, both_ways: bool) -> Iterator[Problem]:
    if layer.cross is not None:
        yield from _attention(f"{place}.cross", layer.cross)
    yield from _feed_forward(f"{place}.feed_forward", layer.feed_forward)
    yield from _attention(f"{place}.attention", layer.attention)
    if both_ways:
        yield from _both_ways(f"{place}.attention", layer.attention)


def _both_ways(place: str, attention: Attention | LatentAttention) -> Iterator[Problem]:
    """What is built for tokens that see earlier ones alone."""
    if isinstance(attention, LatentAttention):
        yield Problem(place, attention.kind, "is attention where tokens see later ones")
        return
    if not isinstance(attention.span, Full | Chunked if place.startswith("vision") else Full):
        yield Problem(f"{place}.span", attention.span.kind, "is full where tokens see later ones")
    if isinstance(position := attention.position, Alibi | RelativeProjection):
        rule = "is rope, relative_bias or None where tokens see later ones"
        yield Problem(f"{place}.position", position.kind, rule)


def _feed_forward(place: str, feed_forward: FeedForward) -> Iterator[Problem]:
    match feed_forward:
        case Dense():
            yield from _dense(place, feed_forward)
        case Experts():
            yield from _dense(f"{place}.expert", feed_forward.expert)
            if feed_forward.shared is not None:
                yield from _dense(f"{place}.shared", feed_forward.shared)


def _dense(place: str, dense: Dense) -> Iterator[Problem]:
    built = [*ACTIVATIONS, "silu_clamped"] if dense.gated else [*ACTIVATIONS]
    if dense.activation not in built:
        rule = f"is one of {', '.join(built)}{'' if dense.gated else ' where nothing is gated'}"
        yield Problem(f"{place}.activation", dense.activation, rule)


def _attention(place: str, attention: Attention | LatentAttention) -> Iterator[Problem]:
    if isinstance(attention.position, Rope2d) and not place.startswith("vision"):
        yield Problem(f"{place}.position", "rope_2d", "is for patches of images alone")
    if isinstance(attention.position, RelativeProjection) and attention.logit_softcap is not None:
        # A cap would have to hold the sum of both scores, and fused attention adds one later.
        rule = "is None where distances are scored too"
        yield Problem(f"{place}.logit_softcap", attention.logit_softcap, rule)
