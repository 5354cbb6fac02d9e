"""What of a spec can be built, and what is refused, field by field."""

from __future__ import annotations

from collections.abc import Iterator

from isoflop.arch.spec import (
    Arch,
    Attention,
    Dense,
    Experts,
    FeedForward,
    LatentAttention,
    Layer,
    RelativeBias,
    RelativeProjection,
)
from isoflop.errors import InputError, Problem
from isoflop.model.parts import ACTIVATIONS


def check_supported(arch: Arch) -> None:
    """Refuse a spec that the model cannot follow exactly.

    Raises:
        InputError: each unsupported field, and what is supported there.
    """
    problems = list(_whole(arch))
    for layer in arch.kinds.values():
        problems += _layer(layer)
    if problems:
        raise InputError(arch.name, problems)


def _whole(arch: Arch) -> Iterator[Problem]:
    if arch.encoder is not None:
        yield Problem("encoder", "Encoder", "is None: decoders are built")
    if arch.vision is not None:
        yield Problem("vision", "VisionTower", "is None: text models are built")


def _layer(layer: Layer) -> Iterator[Problem]:
    place = f"layers.{layer.name}"
    if layer.cross is not None:
        yield Problem(f"{place}.cross", "Attention", "is None: decoders are built")
    yield from _feed_forward(f"{place}.feed_forward", layer.feed_forward)
    yield from _attention(f"{place}.attention", layer.attention)


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
    if isinstance(attention.position, RelativeBias):
        rule = "is rope, alibi, relative_projection or None"
        yield Problem(f"{place}.position", attention.position.kind, rule)
    if isinstance(attention.position, RelativeProjection) and attention.logit_softcap is not None:
        # A cap would have to hold the sum of both scores, and fused attention adds one later.
        rule = "is None where distances are scored too"
        yield Problem(f"{place}.logit_softcap", attention.logit_softcap, rule)
