"""What feeds a decoder from beside: a text encoder, a vision tower with its projector."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from isoflop.arch.spec import Arch, Attention, Encoder, Layer, RelativeBias, VisionTower
from isoflop.count.blocks.attention import bias_table
from isoflop.count.blocks.layer import Source, layer_part
from isoflop.count.blocks.norms import norm_part
from isoflop.count.blocks.part import Ground, Part, Saved, Scope, Weight, dropped, linear
from isoflop.count.operators import Gather, Pointwise
from isoflop.errors import Problem
from isoflop.quantity import Expr, number


def beside(arch: Arch, rule: str) -> list[Problem]:
    """A problem for each tower beside the decoder, for what can only speak of decoders."""
    towers = {"arch.encoder": arch.encoder, "arch.vision": arch.vision}
    return [
        Problem(field, type(tower).__name__, rule, f"{arch.name} has one: name a decoder alone")
        for field, tower in towers.items()
        if tower is not None
    ]


def stack_parts(
    ground: Ground, layers: tuple[Layer, ...], source: Source | None = None
) -> Iterator[Part]:
    """The biases that a stack's layers share, then its kinds of layer."""
    yield from _shared_biases(ground, layers)
    yield from _layer_parts(ground, layers, source)


def _layer_parts(
    ground: Ground, layers: tuple[Layer, ...], source: Source | None = None
) -> Iterator[Part]:
    kinds = {layer.name: layer for layer in layers}
    for name, layer in kinds.items():
        times = sum(other.name == name for other in layers)
        yield layer_part(ground, layer, times, source, alone=len(kinds) == 1)


def _shared_biases(ground: Ground, layers: tuple[Layer, ...]) -> Iterator[Part]:
    """T5's table, stored once: the first layer's serves all that have the same shape."""
    for place, blocks in (
        ("relative_bias", [layer.attention for layer in layers]),
        ("relative_bias_cross", [layer.cross for layer in layers]),
    ):
        tables: dict[tuple[RelativeBias, int], None] = {}
        for block in blocks:
            if isinstance(block, Attention) and isinstance(block.position, RelativeBias):
                tables[block.position, block.n_heads] = None
        shared = [(position, heads) for position, heads in tables if position.shared]
        for i, (position, heads) in enumerate(shared):
            N = ground.scope("n_heads", heads, "query heads")
            yield bias_table(ground, place if not i else f"{place}_{i + 1}", position, N)


def encoder_part(
    ground: Ground, encoder: Encoder, source: Source, dropout: float, table: Expr
) -> Part:
    """The encoder reads `source`, every token every other; it has read it where it is cached.

    `dropout` is that of the embedding, a table of so many rows, which it shares with the decoder; T5 drops as much of
    what a stack gives as of what it takes (Raffel 2020, 1910.10683, section 2.1).
    """
    read = number(0) if source.cached else source.tokens
    inside = replace(ground.within("encoder"), T=read, S=source.tokens, causal_skip=False)
    size = inside.tokens * ground.D
    ids, masks = Saved("token ids", inside.tokens, "index"), dropped(dropout, size)
    rows = Gather(inside.tokens, ground.D, table)
    parts = [Part("tokens", (), rows, (ids,), kept_by_some=masks)]
    parts += stack_parts(inside, encoder.layers)
    if encoder.final_norm is not None:
        parts.append(norm_part(inside, "final_norm", encoder.final_norm))
    # Every decoder layer reads it, and one copy is kept.
    parts.append(Part("output", saved=(Saved("output", size),), kept_by_some=masks))
    return Part("encoder", parts=tuple(parts))


def pairs_ahead(scope: Scope, tower: VisionTower, images: Expr) -> Expr | None:
    """A sequence's pairs of an image's token and a later one, where they see each other."""
    if not tower.both_ways:
        return None
    n = scope.within("vision")(*_tokens_of_image(tower))
    return images * n * (n - 1) / 2


def _tokens_of_image(tower: VisionTower) -> tuple[str, int, str]:
    """How many of an image's tokens the decoder reads, and what that is called."""
    name = "n_patches" if tower.projector.merge == 1 else "n_merged"
    return name, tower.tokens_of_image, "tokens of an image that the decoder reads"


def vision_part(ground: Ground, tower: VisionTower, images: Expr) -> Part:
    """Patches to tokens, a transformer over them, and the projector into the decoder's width."""
    scope = ground.scope.within("vision")
    width = scope("d_model_vision", tower.d_model, "width of the vision tower")
    numbers = tower.patch**2 * tower.channels * tower.frames
    pixels = scope("d_patch", numbers, "numbers in a patch")
    patches = scope("n_patches", (tower.image // tower.patch) ** 2, "patches of an image")
    length = patches + 1 if tower.class_token else patches
    inside = Ground(scope, ground.B * images, length, length, width)
    rows = inside.B * patches
    parts = [
        linear(
            inside,
            "patches",
            ("patch", pixels),
            ("model", width),
            bias=tower.patch_bias,
            rows=rows,
            input_fixed=True,
        ),
        *_token_parts(inside, tower, length),
        *([] if tower.pre_norm is None else [norm_part(inside, "pre_norm", tower.pre_norm)]),
        *_shared_biases(inside, tower.layers),
        *_layer_parts(inside, tower.layers[: tower.n_run]),
        *_tower_end(inside, tower),
        _projector(inside, tower, ground.D),
    ]
    return Part("vision", parts=tuple(parts))


def _tower_end(ground: Ground, tower: VisionTower) -> Iterator[Part]:
    """The final norm; where the projector reads an earlier layer, what is stored behind that."""
    norm = () if tower.final_norm is None else (norm_part(ground, "final_norm", tower.final_norm),)
    if tower.feature_layer is None:
        yield from norm
        return
    behind = _layer_parts(ground.within("vision_unread"), tower.layers[tower.n_run :])
    stored = tuple(_stored(part) for part in (*behind, *norm))
    if stored:
        yield Part("unread", parts=stored)


def _stored(part: Part) -> Part:
    """The weights of a part that never runs."""
    parts = tuple(_stored(inner) for inner in part.parts)
    kept = tuple(inner for inner in parts if inner.weights or inner.parts)
    return replace(part, operator=None, saved=(), kept_by_some=(), parts=kept)


def _token_parts(ground: Ground, tower: VisionTower, length: Expr) -> Iterator[Part]:
    """The class token and a trained position for each token."""
    if tower.class_token:
        yield Part("class_token", (Weight("weight", (("embed", ground.D),)),))
    if tower.positions:
        size = ground.tokens * ground.D
        table = Weight("weight", (("position", length), ("embed", ground.D)))
        yield Part("positions", (table,), Pointwise("add", reads=2 * size, writes=size))


def _projector(ground: Ground, tower: VisionTower, out: Expr) -> Part:
    """The maps, with an activation between two; only patches go through, merged ones together."""
    how = tower.projector
    rows = ground.B * ground.scope(*_tokens_of_image(tower))
    width = ground.D
    if how.merge > 1 and not how.averaged:
        merged = how.merge**2 * tower.d_model
        width = ground.scope("d_merged", merged, "width of the patches merged into one token")
    hidden = out if how.d_hidden is None else ground.scope("d_projector", how.d_hidden, "width between the maps")  # fmt: skip
    widths = [width, *[hidden] * (how.n_maps - 1), out]
    normed = rows if how.averaged else rows * how.merge**2
    parts = [] if how.norm is None else [norm_part(ground, "norm", how.norm, rows=normed)]
    for i in range(how.n_maps):
        if i:
            size = rows * widths[i]
            kept = (Saved("input", size),)
            parts.append(Part(f"activation_{i}", (), Pointwise("gelu", size, size), kept))
        into, model = ("embed", widths[i]), ("model", widths[i + 1])
        parts.append(linear(ground, f"linear_{i + 1}", into, model, bias=how.bias, rows=rows))
    return Part("projector", parts=tuple(parts))
