"""Bytes that one accelerator holds in training under a layout: its rank, and the runtime's."""

from __future__ import annotations

from collections.abc import Mapping

from isoflop.count.blocks import Part
from isoflop.count.memory import bytes_runtime
from isoflop.count.memory_rank import Shards, Trained, memory_held, memory_rank, parts_held
from isoflop.count.memory_saved import Recompute
from isoflop.plan.layout import Layout
from isoflop.quantity import Node, branch, leaf

__all__ = ["Recompute", "Trained", "memory_training_held", "memory_training_stage", "shards_of"]


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
    """Bytes that one accelerator of pipeline stage `stage` holds, as a tree."""
    return _with_runtime(memory_rank(job, shards_of(layout), n_micro=n_micro, stage=stage), stack)


def memory_training_held(
    job: Trained,
    root: Part,
    layout: Layout,
    kinds: Mapping[str, int],
    *,
    first: bool,
    last: bool,
    stack: str = "unknown",
) -> Node:
    """The same for any stage that holds so many layers of each kind; `root` describes the job."""
    shards = shards_of(layout)
    parts = list(parts_held(job.arch, root, kinds, first=first, last=last))
    return _with_runtime(
        memory_held(job, shards, parts, shards.in_flight(0, 1), shards.embedded(1)), stack
    )


def _with_runtime(rank: Node, stack: str) -> Node:
    runtime = bytes_runtime(stack)
    overhead = leaf("bytes_overhead", "bytes", runtime, source=runtime.source)
    return branch("bytes_per_accelerator", "bytes", [*rank.children, overhead])
