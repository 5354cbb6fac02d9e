"""What a rank of a layout's pipeline holds of the model, and of how many micro-batches.

Every schedule cuts the layers into stages by `count.stages`; a rank holds one, or several
chunks, or two that mirror each other (DualPipe, DualPipeV). How many micro-batches of each are
in flight is the schedule's: for 1F1B the count's own rule, for the others `plan.schedule`'s.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

from isoflop.arch import Arch
from isoflop.count.blocks import Part
from isoflop.count.memory_rank import parts_held
from isoflop.count.memory_split import Shards
from isoflop.count.stages import layers_of_stage
from isoflop.plan.layout import Layout
from isoflop.plan.schedule import (
    DualPipe,
    DualPipeV,
    Interleaved,
    OneFOneB,
    Terms,
    ZeroBubble,
    in_flight_closed,
    n_stages,
    stages_of,
)
from isoflop.quantity import Expr, Symbol, number


@dataclass(frozen=True, slots=True)
class Share:
    """The layers of one rank by kind: of its stage, and of the `mirrored` one that it holds too.

    `first` and `last` say whether it has the model's ends.
    """

    layers: Mapping[str, int]
    mirrored: Mapping[str, int]
    first: bool
    last: bool


def share_of(arch: Arch, layout: Layout, rank: int) -> Share:
    """What rank `rank` of the pipeline holds; two stages are in the order in which work enters.

    >>> from isoflop.arch import gpt
    >>> six = gpt("six", d_model=96, n_layers=6, n_heads=6, vocab_size=64, max_seq_len=8)
    >>> share_of(six, Layout(pp=4, schedule="dualpipe"), 0)
    Share(layers={'layer': 1}, mirrored={'layer': 1}, first=True, last=True)
    """
    schedule = layout.pipeline
    own, count = stages_of(schedule, layout.pp, rank), n_stages(schedule, layout.pp)
    mirrors = isinstance(schedule, DualPipe | DualPipeV)
    return Share(
        _kinds(arch, count, own[:1] if mirrors else own),
        _kinds(arch, count, own[1:] if mirrors else ()),
        first=0 in own,
        last=count - 1 in own,
    )


def _kinds(arch: Arch, n_stages: int, stages: tuple[int, ...]) -> dict[str, int]:
    """The layers of some stages by kind."""
    own = (i for stage in stages for i in layers_of_stage(arch.n_layers, n_stages, stage))
    return dict(Counter(arch.layers[i].name for i in own))


def shares_unlike(arch: Arch, layout: Layout) -> dict[int, Share]:
    """Ranks that may hold most: of those with equal shares the first, which keeps most.

    Where weights' gradients are put off the last may keep more, if what they wait with is more
    than what forward leaves. The second half of DualPipe's ranks mirrors the first.

    >>> from isoflop.arch import gpt
    >>> odd = gpt("odd", d_model=96, n_layers=14, n_heads=6, vocab_size=64, max_seq_len=8)
    >>> [list(shares_unlike(odd, Layout(pp=4, schedule=name))) for name in ("1f1b", "zb-h1")]
    [[0, 1, 3], [0, 1, 2, 3]]
    """
    schedule = layout.pipeline
    count = layout.pp // 2 if isinstance(schedule, DualPipe) else layout.pp
    shares = {rank: share_of(arch, layout, rank) for rank in range(count)}
    alike: dict[object, list[int]] = {}
    for rank, share in shares.items():
        kinds = (frozenset(share.layers.items()), frozenset(share.mirrored.items()))
        alike.setdefault((share.first, share.last, kinds), []).append(rank)
    apart = isinstance(schedule, ZeroBubble | DualPipe | DualPipeV)
    ends = [{ranks[0], ranks[-1]} if apart else {ranks[0]} for ranks in alike.values()]
    return {rank: shares[rank] for rank in sorted(set().union(*ends))}


@dataclass(frozen=True, slots=True)
class Flight:
    """Micro-batches of which a rank's activations are kept at its peak.

    `own` of its stage, `mirrored` of the other that it holds, `embedded` of the embedding;
    `outputs` counts those of all its chunks, each handed on. Weights' gradients are put off
    for `put_off` micro-batches, where they are.
    """

    own: Expr
    mirrored: Expr
    embedded: Expr
    outputs: Expr
    put_off: Expr | None = None


def in_flight(layout: Layout, shards: Shards, rank: int, n_micro: int) -> Flight:
    """What is in flight on rank `rank` of the pipeline when it holds most.

    DualPipe keeps pp + 1 micro-batches of its single stages on each rank (DeepSeek-V3,
    2412.19437, table 2); those of a stage are as many as under 1F1B of as many stages.
    """
    t, at = _terms(layout, n_micro), _rank(layout, rank)
    nothing = number(0)
    match layout.pipeline:
        case OneFOneB() | Interleaved():
            flight = shards.in_flight(rank, n_micro)
            return Flight(flight, nothing, shards.embedded(n_micro), flight)
        case DualPipe() | DualPipeV():
            stages = 2 * t.pp if isinstance(layout.pipeline, DualPipeV) else t.pp
            return Flight(stages - at, at + 1, stages - at, stages + 1, at + 1)
        case ZeroBubble(ahead=ahead) as schedule:
            flight = in_flight_closed(schedule, t, at).activations
            return Flight(flight, nothing, flight, flight, ahead * at)
        case schedule:
            flight = in_flight_closed(schedule, t, at).activations
            return Flight(flight, nothing, flight, flight)


def _terms(layout: Layout, n_micro: int) -> Terms:
    return Terms(
        n_micro=Symbol("n_micro_batches", n_micro, meaning="micro-batches per pipeline and step"),
        pp=Symbol("pp", layout.pp, meaning="pipeline stages"),
    )


def _rank(layout: Layout, rank: int) -> Symbol:
    """The rank, counted from the end of the pipeline at which its first stage's work enters."""
    if isinstance(layout.pipeline, DualPipe):
        rank = min(rank, layout.pp - 1 - rank)
    return Symbol("stage", rank, meaning="the pipeline stage, counted from 0")


def parts_of(
    arch: Arch, root: Part, share: Share, flight: Flight
) -> tuple[list[tuple[Part, Expr]], dict[str, Expr]]:
    """The parts of a rank with how many copies it holds, and how many are kept of each."""
    parts, kept = [], {"embedding": flight.embedded}
    kinds = Counter(share.layers) + Counter(share.mirrored)
    for part, copies in parts_held(arch, root, kinds, first=share.first, last=share.last):
        if not part.is_layer:
            parts.append((part, copies))
            continue
        own, other = layers_held(part.name, share)
        parts.append((part, own + other))
        kept[part.name] = flight.own * own + flight.mirrored * other
    return parts, kept


def layers_held(kind: str, share: Share) -> tuple[Expr, Expr]:
    meaning = f"layers of the kind {kind} in one stage"
    own = Symbol(f"n_{kind}_stage", share.layers.get(kind, 0), meaning=meaning)
    if not share.mirrored:
        return own, number(0)
    meaning = f"layers of the kind {kind} in the stage that mirrors it"
    return own, Symbol(f"n_{kind}_mirror", share.mirrored.get(kind, 0), meaning=meaning)
