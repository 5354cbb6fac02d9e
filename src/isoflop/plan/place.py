"""Where a training run goes: the smallest layout that fits."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TypeAlias

from isoflop.arch import Arch
from isoflop.errors import Infeasible, InputError
from isoflop.hardware import Chip, Cluster
from isoflop.plan.layout import Layout, Refusal, broken_rules, legal_layouts
from isoflop.plan.shard import Trained, memory_training_stage
from isoflop.quantity import Node
from isoflop.quantity.units import format_bytes

#: The layout, what its fullest accelerator holds, the layouts refused, what bound it.
Placed: TypeAlias = tuple[Layout, Node, tuple[Refusal, ...], str]


def place(job: Trained, cluster: Cluster, global_batch: int, wanted: Layout | None) -> Placed:
    """The layout wanted, or the smallest that fits."""
    if wanted is not None:
        broken = broken_rules(wanted, job.arch, cluster, global_batch)
        if broken:
            raise InputError("layout", broken)
        candidates = [wanted]
    else:
        legal = legal_layouts(job.arch, cluster, global_batch, job.work.batch)
        candidates = sorted(legal, key=lambda layout: _order(layout, cluster))
    refused: list[Refusal] = []
    for layout in candidates:
        memory = bytes_per_accelerator(job, layout, global_batch)
        refusal = _refusal(layout, memory, cluster.chip)
        if refusal is None:
            return layout, memory, tuple(refused), _binding(refused)
        refused.append(refusal)
    closest = min(refused, key=lambda r: r.bytes_over)
    raise Infeasible(
        f"{job.arch.name} on {cluster}: none of {len(refused)} layouts fits; closest {closest}"
    )


def _order(layout: Layout, cluster: Cluster) -> tuple[int, ...]:
    """Least split first, a pipeline after tensor parallelism; much idleness last of all."""
    wasteful = 8 * (cluster.count - layout.n_accelerators) > cluster.count
    return int(wasteful), layout.tp * layout.pp, layout.pp, layout.zero


def bytes_per_accelerator(job: Trained, layout: Layout, global_batch: int) -> Node:
    """Memory of the accelerator that holds most."""
    n_micro = layout.n_micro_batches(global_batch)
    stages = _stages(job.arch, layout.pp)
    trees = [memory_training_stage(job, layout, n_micro, stage) for stage in stages]
    return max(trees, key=lambda tree: tree.value)


def _stages(arch: Arch, pp: int) -> Iterator[int]:
    """Stages that may hold most: the ends, and all of them where layers differ."""
    return iter(range(pp) if len(arch.kinds) > 1 else sorted({0, pp - 1}))


def _refusal(layout: Layout, memory: Node, chip: Chip) -> Refusal | None:
    needed, available = int(memory.value), int(chip.bytes_memory.value)
    if needed <= available:
        return None
    largest = max(memory.children, key=lambda child: child.value)
    return Refusal(layout, needed, available, largest.name, float(largest.value / memory.value))


def _binding(refused: list[Refusal]) -> str:
    """What kept the plan from a smaller layout."""
    if not refused:
        return "compute: the smallest layout fits"
    nearest = min(refused, key=lambda r: r.bytes_over)
    over = format_bytes(nearest.bytes_over)
    return f"memory: {len(refused)} smaller layouts do not fit, the nearest by {over}: {nearest}"
