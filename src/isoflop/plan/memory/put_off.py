"""What waits for weights' gradients where a schedule puts them off."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

from isoflop.count.blocks import Part
from isoflop.count.memory_rank import Trained
from isoflop.count.memory_saved import layers_in
from isoflop.count.memory_split import Shards, split_of, ways_of
from isoflop.count.operators import Core, Matmul
from isoflop.plan.layout import Layout
from isoflop.plan.memory.flight import Share, layers_held, stages_passed, symbol_of, terms_of
from isoflop.plan.schedule import DualPipe, DualPipeV, ZeroBubble
from isoflop.quantity import Basis, Expr, Node, branch, leaf, maximum, number, total, where


def with_put_off(
    held: Node, job: Trained, root: Part, layout: Layout, shards: Shards, share: Share, rank: int
) -> Node:
    """A rank's tree with what its schedule keeps for weights' gradients that are put off.

    That counts as far as it exceeds what forward left and backward has freed by then (Qi 2023,
    2401.10241, section 2.3; there it is always less, with layers made again it is more).
    """
    if not isinstance(layout.pipeline, ZeroBubble | DualPipe | DualPipeV):
        return held
    waits = leaf(
        "for_weights_gradients",
        "bytes",
        _put_off(_Kept.of(held, job, root, shards, share), layout, rank),
        basis=Basis.MODELLED,
        source="Qi 2023 (2401.10241), section 2.3",
    )
    children = [
        branch(child.name, child.unit, [*child.children, waits])
        if child.name == "bytes_activations"
        else child
        for child in held.children
    ]
    return branch(held.name, held.unit, children)


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
    def of(cls, held: Node, job: Trained, root: Part, shards: Shards, share: Share) -> _Kept:
        sizes = {child.name: child.size for child in held.find("bytes_activations").children}
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


def _put_off(kept: _Kept, layout: Layout, rank: int) -> Expr:
    """What waits at the moment of the most, beyond what the tree has.

    Zero bubble: so many micro-batches as the rank is behind the first, and one more between
    its two gradients. DualPipe: one in the first backwards, and those of the last, all as large
    as the larger of the rank's two stages.
    """
    t, at = terms_of(layout, 1), symbol_of(layout, rank)
    match layout.pipeline:
        case ZeroBubble(ahead=ahead):
            between = maximum(0, kept.own_waits - kept.own - kept.again)
            return ahead * at * kept.own_waits + between
        case _:
            stages = stages_passed(layout, t)
            most = (stages - at) * kept.own + (at + 1) * kept.mirrored + kept.again
            to_turn = stages / 2 - 1 - at
            early = kept.mirrored_waits - kept.own - kept.mirrored - kept.again
            early = where(to_turn, early, 0)
            waits = maximum(kept.own_waits, kept.mirrored_waits)
            late = to_turn * kept.own + at * waits
            late += maximum(waits, kept.own + kept.again)
            return maximum(0, early, late - most)


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
    if isinstance(part.operator, Core):  # its output is what the next matrix reads
        core = part.operator
        yield times * (core.batch * core.heads * core.queries * core.d_value / split("heads"))
    for below in part.parts:
        yield from _of_matrices(below, split, times * below.times)
