"""A model cut down until it fits: every kind of layer and every kind of block stays.

First fewer layers, then fewer experts, then a smaller vocabulary, then everything narrower by
halves. Heads keep their size and what shares them, experts the number that works on a token:
what a kernel is given stays what it is.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields, is_dataclass, replace
from typing import Any

from isoflop.arch import Arch
from isoflop.arch.spec import (
    Attention,
    Dense,
    Encoder,
    Experts,
    FeedForward,
    LatentAttention,
    Layer,
    VisionTower,
)
from isoflop.errors import Infeasible

#: No vocabulary is cut below this, no width below that.
FEWEST_TOKENS, NARROWEST = 8192, 32
#: Widths stay a multiple of it.
MULTIPLE = 4


@dataclass(frozen=True, slots=True)
class Change:
    """One number of a spec, and what it was cut to."""

    field: str
    whole: int
    cut: int


def cut_down(arch: Arch, fits: Callable[[Arch], bool]) -> Arch:
    """The model, cut as little as makes it fit.

    Raises:
        Infeasible: not even the least of it fits.
    """
    for shrink in (_fewer_layers, _fewer_experts, _fewer_tokens, _narrower):
        while not fits(arch):
            smaller = shrink(arch)
            if smaller == arch:
                break
            arch = smaller
    if not fits(arch):
        raise Infeasible(f"{arch.name} does not fit this machine, however far it is cut down")
    return arch


def changes(whole: Arch, cut: Arch) -> tuple[Change, ...]:
    """Every number that differs; layers are counted by kind."""
    before, after = dict(_numbers(whole)), dict(_numbers(cut))
    return tuple(Change(f, n, after[f]) for f, n in before.items() if after[f] != n)


def _numbers(arch: Arch) -> Iterator[tuple[str, int]]:
    """The whole numbers of a spec by field; a stack's layers once for each kind."""
    stacks = {"layers": arch.layers}
    if arch.encoder is not None:
        stacks["encoder.layers"] = arch.encoder.layers
    if arch.vision is not None:
        stacks["vision.layers"] = arch.vision.layers
    for place, layers in stacks.items():
        yield place, len(layers)
        kinds = {layer.name: layer for layer in layers}
        if len(kinds) > 1:
            there = Counter(layer.name for layer in layers)
            yield from ((f"{place}.{name}", times) for name, times in there.items())
        yield from _inside(kinds, place)
    yield from _inside(arch, "")


def _inside(value: Any, place: str) -> Iterator[tuple[str, int]]:
    inner: dict[str, Any] = value if isinstance(value, dict) else {}
    if is_dataclass(value):
        inner = {f.name: getattr(value, f.name) for f in fields(value)}
    for name, below in inner.items():
        path = f"{place}.{name}".removeprefix(".")
        if isinstance(below, int) and not isinstance(below, bool):
            yield path, below
        yield from _inside(below, path)


def _fewer_layers(arch: Arch) -> Arch:
    """Half of each kind, rounded up, in every stack."""
    encoder, vision = arch.encoder, arch.vision
    return replace(
        arch,
        layers=_half(arch.layers),
        encoder=None if encoder is None else replace(encoder, layers=_half(encoder.layers)),
        vision=None if vision is None else _shallower(vision),
    )


def _half(layers: tuple[Layer, ...]) -> tuple[Layer, ...]:
    room = {name: -(-n // 2) for name, n in Counter(layer.name for layer in layers).items()}
    kept = []
    for layer in layers:
        if room[layer.name]:
            room[layer.name] -= 1
            kept.append(layer)
    return tuple(kept)


def _shallower(tower: VisionTower) -> VisionTower:
    """As many layers as before behind the one that the projector reads."""
    run = _half(tower.layers[: tower.n_run])
    feature_layer = None if tower.feature_layer is None else len(run)
    return replace(tower, layers=(*run, *tower.layers[tower.n_run :]), feature_layer=feature_layer)


def _fewer_experts(arch: Arch) -> Arch:
    """Half of the experts, while twice those that work on a token stay and groups are even."""
    return replace(arch, layers=tuple(_with_fewer_experts(layer) for layer in arch.layers))


def _with_fewer_experts(layer: Layer) -> Layer:
    experts = layer.feed_forward
    if not isinstance(experts, Experts):
        return layer
    half = experts.n_experts // 2
    per_token = -(-experts.n_active // experts.n_active_groups) * experts.n_groups
    if half < max(2 * experts.n_active, per_token) or half % experts.n_groups:
        return layer
    return replace(layer, feed_forward=replace(experts, n_experts=half))


def _fewer_tokens(arch: Arch) -> Arch:
    """Half of the vocabulary; rows of padding stay."""
    fewer = min(max(arch.vocab_size // 2, FEWEST_TOKENS), arch.vocab_size)
    padding = arch.embedding.n_rows - arch.vocab_size
    embedding = replace(arch.embedding, n_rows=fewer + padding)
    return replace(arch, vocab_size=fewer, embedding=embedding)


def _narrower(arch: Arch) -> Arch:
    """Half of every width and of the heads."""
    if arch.d_model <= NARROWEST:
        return arch
    width = arch.embedding.d_embed
    embedding = replace(arch.embedding, d_embed=None if width is None else _half_of(width))
    return replace(
        arch,
        d_model=_half_of(arch.d_model),
        embedding=embedding,
        layers=_narrow_all(arch.layers),
        encoder=None if arch.encoder is None else _narrow_encoder(arch.encoder),
        vision=None if arch.vision is None else _narrow_tower(arch.vision),
    )


def _half_of(width: int) -> int:
    return max(width // 2 // MULTIPLE, 1) * MULTIPLE


def _narrow_encoder(encoder: Encoder) -> Encoder:
    return replace(encoder, layers=_narrow_all(encoder.layers))


def _narrow_tower(tower: VisionTower) -> VisionTower:
    hidden = tower.projector.d_hidden
    projector = replace(tower.projector, d_hidden=None if hidden is None else _half_of(hidden))
    layers = _narrow_all(tower.layers)
    return replace(tower, d_model=_half_of(tower.d_model), layers=layers, projector=projector)


def _narrow_all(layers: tuple[Layer, ...]) -> tuple[Layer, ...]:
    narrow = {layer.name: _narrow(layer) for layer in layers}
    return tuple(narrow[layer.name] for layer in layers)


def _narrow(layer: Layer) -> Layer:
    return replace(
        layer,
        attention=(
            _fewer_latent_heads(layer.attention)
            if isinstance(layer.attention, LatentAttention)
            else _fewer_heads(layer.attention)
        ),
        cross=None if layer.cross is None else _fewer_heads(layer.cross),
        feed_forward=_thinner(layer.feed_forward),
    )


def _fewer_heads(spec: Attention) -> Attention:
    """Half of the heads; as many share a key-value head as before, while there are several."""
    if spec.n_kv_heads == 1:
        return replace(spec, n_heads=max(spec.n_heads // 2, 1))
    group, n_kv_heads = spec.n_heads // spec.n_kv_heads, spec.n_kv_heads // 2
    return replace(spec, n_heads=group * n_kv_heads, n_kv_heads=n_kv_heads)


def _fewer_latent_heads(spec: LatentAttention) -> LatentAttention:
    d_q = spec.d_q_latent
    return replace(
        spec,
        n_heads=max(spec.n_heads // 2, 1),
        d_kv_latent=_half_of(spec.d_kv_latent),
        d_q_latent=None if d_q is None else _half_of(d_q),
    )


def _thinner(spec: FeedForward) -> FeedForward:
    if isinstance(spec, Dense):
        return replace(spec, d_ff=_half_of(spec.d_ff))
    expert = replace(spec.expert, d_ff=_half_of(spec.expert.d_ff))
    shared = spec.shared
    if shared is not None:
        shared = replace(shared, d_ff=_half_of(shared.d_ff))
    return replace(spec, expert=expert, shared=shared)
