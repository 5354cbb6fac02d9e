"""What waits for weights' gradients where a schedule puts them off."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

from isoflop.count.blocks import Part
from isoflop.count.memory_rank import Trained
from isoflop.count.memory_saved import layers_in
from isoflop.count.memory_split import Shards, split_of, ways_of
from isoflop.count.operators import Core, Matmul
from isoflop.plan.memory.flight import Flight, Share, layers_held
from isoflop.quantity import Basis, Expr, Node, leaf, maximum, number, total, where


def for_weights_gradients(
    active: Node, job: Trained, root: Part, shards: Shards, share: Share, flight: Flight
) -> list[Node]:
    """What a schedule keeps for weights' gradients that it puts off, beside `active`.

    That counts as far as it exceeds what forward left and backward has freed by then (Qi 2023,
    2401.10241, section 2.3; there it is always less, with layers made again it is more).
    """
    if flight.put_off is None:
        return []
    kept = _Kept.of(active, job, root, shards, share)
    size = _mirrored(kept, flight) if share.mirrored else _alone(kept, flight.put_off)
    source = "Qi 2023 (2401.10241), section 2.3"
    return [leaf("for_weights_gradients", "bytes", size, basis=Basis.MODELLED, source=source)]


@dataclass(frozen=True, slots=True)
class _Kept:
    """Bytes of one micro-batch through a stage and its mirror: what forward leaves, and what
    the weights' gradients need. `again` is the layer that is made again, once.
    """

    own: Expr
    mirrored: Expr
    own_waits: Expr
    mirrored_waits: Expr
    again: Expr

    @classmethod
    def of(cls, active: Node, job: Trained, root: Part, shards: Shards, share: Share) -> _Kept:
        sizes = {child.name: child.size for child in active.children}
        kinds = {name: sizes[name] for name in job.arch.kinds if name in sizes}
        waits = {p.name: bytes_for_weights(job, shards, p) for p in root.parts if p.name in kinds}

        def of_stage(sizes: Mapping[str, Expr], which: int) -> Expr:
            return total(layers_held(k, share)[which] * size for k, size in sizes.items())

        embedding = sizes.get("embedding", number(0)) if share.first else number(0)
        return cls(
            of_stage(kinds, 0) + embedding,
            of_stage(kinds, 1),
            of_stage(waits, 0),
            of_stage(waits, 1),
            sizes.get("layer_going_backward", number(0)),
        )


def _alone(kept: _Kept, put_off: Expr) -> Expr:
    """Zero bubble: so many micro-batches, and one more between its two gradients."""
    between = maximum(0, kept.own_waits - kept.own - kept.again)
    return put_off * kept.own_waits + between


def _mirrored(kept: _Kept, flight: Flight) -> Expr:
    """DualPipe: one in the first backwards, or those of the last, whichever is more; these are
    taken to be all of the larger of the rank's two stages.
    """
    assert flight.put_off is not None
    most = flight.own * kept.own + flight.mirrored * kept.mirrored + kept.again
    to_turn = (flight.own - flight.mirrored - 1) / 2
    early = kept.mirrored_waits - kept.own - kept.mirrored - kept.again
    waits = maximum(kept.own_waits, kept.mirrored_waits)
    last = maximum(waits, kept.own + kept.again)
    late = to_turn * kept.own + (flight.put_off - 1) * waits + last
    return maximum(0, where(to_turn, early, 0), late - most)


def bytes_for_weights(job: Trained, shards: Shards, part: Part) -> Expr:
    """What the weights' gradients of a layer need: matrices' inputs, and their outputs'
    gradients (Qi 2023, 2401.10241, section 2.3: 32 s b h for GPT).
    """
    split = ways_of(split_of(job.arch, part.name, shards), shards)
    found = total(size for _, layer in layers_in([part]) for size in _of_matrices(layer, split))
    return found * job.state.activation.bytes_each


def _of_matrices(part: Part, split: Callable[[str], Expr], times: Expr | int = 1) -> Iterator[Expr]:
    if isinstance(part.operator, Matmul) and part.weights:
        axis, _ = part.weights[0].axes[-1]
        yield times * (part.operator.rows * part.operator.cols / split(axis))
        yield from (times * (s.size / split(s.axis)) for s in part.saved if s.name == "input")
        if part.name == "down" and not part.saved:  # relu has kept it
            yield times * (part.operator.rows * part.operator.inner / split("ff"))
    if isinstance(part.operator, Core):  # its output is what the next matrix reads
        core = part.operator
        yield times * (core.batch * core.heads * core.queries * core.d_value / split("heads"))
    for below in part.parts:
        yield from _of_matrices(below, split, times * below.times)
