"""Bytes that one accelerator holds in training under a layout: its rank, and the software's."""

from __future__ import annotations

from isoflop.count.blocks import Part, describe
from isoflop.count.memory_rank import Trained, check_stage, memory_held
from isoflop.count.memory_saved import Recompute
from isoflop.count.memory_split import Shards
from isoflop.count.memory_stack import overhead, stack_of
from isoflop.plan.layout import Layout
from isoflop.plan.memory.flight import Share, in_flight, parts_of, share_of
from isoflop.plan.memory.put_off import with_put_off
from isoflop.quantity import Expr, Node, Symbol, branch, where
from isoflop.quantity.expr import product

__all__ = [
    "Recompute",
    "Trained",
    "bytes_boundary",
    "memory_training_held",
    "memory_training_stage",
    "shards_of",
    "with_overhead",
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
    check_stage(job.arch, shards_of(layout), stage)
    root, share = describe(job.arch, job.work), share_of(job.arch, layout, stage)
    return memory_training_held(job, root, layout, share, n_micro=n_micro, stage=stage, stack=stack)


def memory_training_held(
    job: Trained,
    root: Part,
    layout: Layout,
    share: Share,
    *,
    n_micro: int = 1,
    stage: int = 0,
    stack: str = "unknown",
) -> Node:
    """The same for a rank that holds `share` of the model; `root` describes the job."""
    shards = shards_of(layout)
    flight = in_flight(layout, shards, stage, n_micro)
    parts, kept = parts_of(job.arch, root, share, flight)
    held = memory_held(job, shards, parts, kept)
    held = with_put_off(held, job, root, layout, shards, share, stage)
    return with_overhead(held, job, shards, flight.outputs, stack)


def with_overhead(
    rank: Node, job: Trained, shards: Shards, flight: Expr, stack: str = "unknown"
) -> Node:
    """A rank's tree with what the software holds, `flight` micro-batches being under way."""
    outputs = where(Symbol("pp", shards.pp) - 1, flight, 0) * bytes_boundary(job, shards)
    beside = overhead(stack_of(stack), rank, shards, outputs)
    return branch("bytes_per_accelerator", "bytes", [*rank.children, beside])


def bytes_boundary(job: Trained, shards: Shards) -> Expr:
    """What one micro-batch hands from stage to stage, the piece of one rank."""
    width = Symbol("d_model", job.arch.d_model, meaning="width of the residual stream")
    split: list[Expr] = [Symbol("cp", shards.cp)]
    if shards.sequence_parallel:
        split.append(Symbol("tp", shards.tp))
    return job.work.tokens * width * job.state.activation.bytes_each / product(split)
