"""One layer: its blocks and norms in the order in which they run."""

from __future__ import annotations

from dataclasses import dataclass

from isoflop.arch.spec import Layer, Wiring
from isoflop.count.blocks.attention import attention_part, cross_part
from isoflop.count.blocks.feed_forward import feed_forward_part
from isoflop.count.blocks.norms import norm_part
from isoflop.count.blocks.part import Ground, Part, dropped
from isoflop.count.operators import Pointwise
from isoflop.quantity import Expr, number


@dataclass(frozen=True, slots=True)
class Source:
    """What an encoder gives a decoder: `tokens` per sequence, or what is cached of them."""

    tokens: Expr
    cached: bool


def layer_part(
    ground: Ground, layer: Layer, times: int, source: Source | None = None, *, alone: bool
) -> Part:
    """One kind of layer, `times` over; `alone` is the only kind of its stack."""
    label = ground.scope.label
    names = ["n_layers", label, "" if alone else layer.name]
    inside = ground.within("_".join(filter(None, (label, layer.name))))
    count = ground.scope("_".join(filter(None, names)), times, f"layers of the kind {layer.name}")
    return Part(layer.name, parts=tuple(_wire(inside, layer, source)), times=count)


def _wire(ground: Ground, layer: Layer, source: Source | None) -> list[Part]:
    """The layer's parts in the order in which they run."""
    # In a parallel layer all blocks read one norm's output, kept once.
    shares_input = layer.wiring is Wiring.PARALLEL
    blocks = {"attention": attention_part(ground, layer.attention)}
    if layer.cross is not None and source is not None:
        across = ground.within(f"{ground.scope.label}_cross")
        blocks["cross"] = cross_part(across, layer.cross, source.tokens, cached=source.cached)
    blocks["feed_forward"] = feed_forward_part(
        ground, layer.feed_forward, keep_input=not shares_input
    )
    order = [norm_part(ground, "norm", layer.norm)] if shares_input else []
    for name, block in blocks.items():
        order += _normed(ground, layer, name, block)
    return [*order, residual(ground, layer.dropout, times=len(blocks))]


def _normed(ground: Ground, layer: Layer, name: str, block: Part) -> list[Part]:
    """A block and the norms that stand at it; two norms of one input keep it once."""
    keeps = layer.wiring is not Wiring.PARALLEL_TWO_NORMS or name == "feed_forward"

    def norm(place: str) -> Part:
        return norm_part(ground, f"norm_{place}", layer.norm, keep_input=keeps)

    match layer.wiring:
        case Wiring.PRE | Wiring.PARALLEL_TWO_NORMS:
            return [norm(name), block]
        case Wiring.POST:
            return [block, norm(name)]
        case Wiring.OUTPUT:
            return [block, norm(f"{name}_out")]
        case Wiring.SANDWICH:
            return [norm(name), block, norm(f"{name}_out")]
        case Wiring.PARALLEL:
            return [block]


def residual(ground: Ground, dropout: float, times: int) -> Part:
    """The adding of each block's output to the stream."""
    size = ground.tokens * ground.D
    return Part(
        "residual",
        (),
        Pointwise("add", reads=2 * size, writes=size),
        times=number(times),
        kept_by_some=dropped(dropout, size),
    )
