"""Bytes that one accelerator holds in training under a layout: its rank, and the software's."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Literal

from isoflop.count.blocks import Part, describe
from isoflop.count.memory_rank import Trained, activations_held, check_stage, state_held
from isoflop.count.memory_saved import Recompute
from isoflop.count.memory_split import Shards
from isoflop.count.memory_stack import overhead, stack_of
from isoflop.plan.layout import Layout
from isoflop.plan.memory.flight import Flight, Share, in_flight, parts_of, share_of
from isoflop.plan.memory.put_off import for_weights_gradients
from isoflop.quantity import Expr, Node, Symbol, branch, where
from isoflop.quantity.expr import product

__all__ = [
    "Recompute",
    "Trained",
    "bytes_boundary",
    "memory_training_stage",
    "memory_training_varied",
    "shards_of",
]


def shards_of(layout: Layout) -> Shards:
    """A layout as the ways in which it splits memory."""
    return Shards(
        tp=layout.tp,
        pp=layout.pp,
        dp=layout.dp,
        cp=layout.cp,
        ep=layout.ep,
        zero=layout.zero,
        sequence_parallel=layout.sequence_parallel,
        virtual=layout.virtual,
    )


def memory_training_stage(
    job: Trained, layout: Layout, n_micro: int, stage: int, stack: str = "unknown"
) -> Node:
    """Bytes that one accelerator of pipeline rank `stage` holds at its peak, as a tree.

    `stack` names the trainer's software; what it holds beside the model is `bytes_overhead`.

    Raises:
        InputError: the model cannot be cut so, or the pipeline has no such rank.
    """
    shards = shards_of(layout)
    check_stage(job.arch, shards, stage)
    root, share = describe(job.arch, job.work), share_of(job.arch, layout, stage)
    flight = in_flight(layout, shards, stage, n_micro)
    varied = [(layout.zero, job.recompute)]
    return memory_training_varied(job, root, layout, share, flight, varied, stack)[0]


def memory_training_varied(
    job: Trained,
    root: Part,
    layout: Layout,
    share: Share,
    flight: Flight,
    varied: Sequence[tuple[Literal[0, 1, 2, 3], Recompute]],
    stack: str = "unknown",
) -> list[Node]:
    """The same for a rank that holds `share` of the model, by ZeRO stage and recomputation.

    `root` describes the job; what the trees share is built once.
    """
    shards = shards_of(layout)
    parts, kept = parts_of(job.arch, root, share, flight)
    by_zero = {zero: replace(shards, zero=zero) for zero, _ in varied}
    state = {zero: state_held(job, own, parts) for zero, own in by_zero.items()}
    active = {}
    for recompute in {recompute for _, recompute in varied}:
        own = replace(job, recompute=recompute)
        held = activations_held(own, shards, parts, kept)
        waits = for_weights_gradients(held, own, root, shards, share, flight)
        active[recompute] = branch(held.name, held.unit, [*held.children, *waits])
    return [
        _with_overhead([*state[zero], active[recompute]], job, by_zero[zero], flight, stack)
        for zero, recompute in varied
    ]


def _with_overhead(
    held: list[Node], job: Trained, shards: Shards, flight: Flight, stack: str
) -> Node:
    """A rank's tree with what the software holds."""
    outputs = where(Symbol("pp", shards.pp) - 1, flight.outputs, 0) * bytes_boundary(job, shards)
    beside = overhead(stack_of(stack), branch("rank", "bytes", held), shards, outputs)
    return branch("bytes_per_accelerator", "bytes", [*held, beside])


def bytes_boundary(job: Trained, shards: Shards) -> Expr:
    """What one micro-batch hands from stage to stage, the piece of one rank."""
    width = Symbol("d_model", job.arch.d_model, meaning="width of the residual stream")
    split: list[Expr] = [Symbol("cp", shards.cp)]
    if shards.sequence_parallel:
        split.append(Symbol("tp", shards.tp))
    return job.work.tokens * width * job.state.activation.bytes_each / product(split)
