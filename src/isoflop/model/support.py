"""What of a spec can be built, and what is refused, field by field."""

from __future__ import annotations

from collections.abc import Iterator

from isoflop.arch.spec import (
    Arch,
    Attention,
    Dense,
    Experts,
    FeedForward,
    Full,
    Layer,
    LinearScaling,
    Llama3Scaling,
    Rope,
    Window,
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
    width = arch.embedding.d_embed
    if arch.head.tied and width not in (None, arch.d_model):
        rule = f"is d_model={arch.d_model} where the head is tied"
        yield Problem("embedding.d_embed", width, rule)


def _layer(layer: Layer) -> Iterator[Problem]:
    place = f"layers.{layer.name}"
    if layer.cross is not None:
        yield Problem(f"{place}.cross", "Attention", "is None: decoders are built")
    yield from _feed_forward(f"{place}.feed_forward", layer.feed_forward)
    if isinstance(layer.attention, Attention):
        yield from _attention(f"{place}.attention", layer.attention)
    else:
        rule = "is attention (multi-head, grouped-query or multi-query)"
        yield Problem(f"{place}.attention", layer.attention.kind, rule)


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


def _attention(place: str, attention: Attention) -> Iterator[Problem]:
    if not isinstance(attention.position, Rope | None):
        yield Problem(f"{place}.position", attention.position.kind, "is rope or None")
    elif attention.position is not None:
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
