"""Bytes that one accelerator holds in training under a layout: its rank, and the software's."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from typing import Literal, TypeAlias

from isoflop.count.blocks import Part, describe
from isoflop.count.memory_rank import (
    Trained,
    activations_held,
    check_stage,
    host_held,
    state_held,
)
from isoflop.count.memory_saved import Recompute
from isoflop.count.memory_split import Offload, Shards
from isoflop.count.memory_stack import ERROR_OF_MEMORY, overhead, stack_of
from isoflop.plan.layout import Layout
from isoflop.plan.memory.flight import Flight, Share, in_flight, parts_of, share_of
from isoflop.plan.memory.put_off import for_weights_gradients
from isoflop.quantity import Expr, Node, Symbol, branch, where
from isoflop.quantity.expr import product

__all__ = [
    "Recompute",
    "Trained",
    "bytes_boundary",
    "host_training_stage",
    "host_training_varied",
    "memory_training_stage",
    "memory_training_varied",
    "shards_of",
]

Zero: TypeAlias = Literal[0, 1, 2, 3]
#: What changes what a rank holds of the same share of a model.
State: TypeAlias = tuple[Zero, Recompute, Offload]


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
        shard=layout.shard,
        offload=layout.offload,
        cp_by=layout.cp_by,
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
    varied: list[State] = [(layout.zero, job.recompute, layout.offload)]
    return memory_training_varied(job, root, layout, share, flight, varied, stack)[0]


def memory_training_varied(
    job: Trained,
    root: Part,
    layout: Layout,
    share: Share,
    flight: Flight,
    varied: Sequence[State],
    stack: str = "unknown",
) -> list[Node]:
    """The same for a rank that holds `share` of the model, by `varied`.

    `root` describes the job; what the trees share is built once.
    """
    shards = shards_of(layout)
    parts, kept = parts_of(job.arch, root, share, flight)

    @cache
    def state(zero: Zero, offload: Offload) -> list[Node]:
        return state_held(job, replace(shards, zero=zero, offload=offload), parts)

    @cache
    def active(recompute: Recompute, offload: Offload) -> Node:
        own, away = replace(job, recompute=recompute), replace(shards, offload=offload)
        held = activations_held(own, away, parts, kept)
        waits = for_weights_gradients(held, own, root, shards, share, flight)
        return branch(held.name, held.unit, [*held.children, *waits])

    trees = []
    for zero, recompute, offload in varied:
        optimizer, activations = _apart(offload)
        held = [*state(zero, optimizer), active(recompute, activations)]
        trees.append(_with_overhead(held, job, replace(shards, zero=zero), flight, stack))
    return trees


def host_training_stage(job: Trained, layout: Layout, n_micro: int, stage: int) -> Node:
    """Bytes that a rank of pipeline rank `stage` keeps in its host's memory, as a tree."""
    shards = shards_of(layout)
    check_stage(job.arch, shards, stage)
    root, share = describe(job.arch, job.work), share_of(job.arch, layout, stage)
    flight = in_flight(layout, shards, stage, n_micro)
    varied: list[State] = [(layout.zero, job.recompute, layout.offload)]
    return host_training_varied(job, root, layout, share, flight, varied)[0]


def host_training_varied(
    job: Trained,
    root: Part,
    layout: Layout,
    share: Share,
    flight: Flight,
    varied: Sequence[State],
) -> list[Node]:
    """The same for a rank that holds `share` of the model, by `varied`."""
    parts, kept = parts_of(job.arch, root, share, flight)
    shards = shards_of(layout)
    return [
        host_held(
            replace(job, recompute=recompute),
            replace(shards, zero=zero, offload=offload),
            parts,
            kept,
        )
        for zero, recompute, offload in varied
    ]


def _apart(offload: Offload) -> tuple[Offload, Offload]:
    """What offloads the optimizer alone, and activations alone."""
    return (
        "optimizer" if "optimizer" in offload else "none",
        "activations" if "activations" in offload else "none",
    )


def _with_overhead(
    held: list[Node], job: Trained, shards: Shards, flight: Flight, stack: str
) -> Node:
    """A rank's tree with what the software holds."""
    outputs = where(Symbol("pp", shards.pp) - 1, flight.outputs, 0) * bytes_boundary(job, shards)
    beside = overhead(stack_of(stack), branch("rank", "bytes", held), shards, outputs)
    return branch("bytes_per_accelerator", "bytes", [*held, beside], times=ERROR_OF_MEMORY)


def bytes_boundary(job: Trained, shards: Shards) -> Expr:
    """What one micro-batch hands from stage to stage, the piece of one rank."""
    width = Symbol("d_model", job.arch.d_model, meaning="width of the residual stream")
    split: list[Expr] = [Symbol("cp", shards.cp)]
    if shards.sequence_parallel:
        split.append(Symbol("tp", shards.tp))
    return job.work.tokens * width * job.state.activation.bytes_each / product(split)
