"""Bytes that one accelerator holds in training under a layout: its rank, and the runtime's."""

from __future__ import annotations

from isoflop.count.memory import bytes_runtime
from isoflop.count.memory_rank import Shards, Trained, memory_rank
from isoflop.count.memory_saved import Recompute
from isoflop.plan.layout import Layout
from isoflop.quantity import Node, branch, leaf

__all__ = ["Recompute", "Trained", "memory_training_stage", "shards_of"]


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
    rank = memory_rank(job, shards_of(layout), n_micro=n_micro, stage=stage)
    runtime = bytes_runtime(stack)
    overhead = leaf("bytes_overhead", "bytes", runtime, source=runtime.source)
    return branch("bytes_per_accelerator", "bytes", [*rank.children, overhead])
