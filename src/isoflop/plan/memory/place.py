"""Where a training run goes: the smallest layout that fits."""

from __future__ import annotations

from itertools import groupby
from typing import Literal, TypeAlias

from isoflop.errors import Infeasible, InputError
from isoflop.hardware import Chip, Cluster
from isoflop.plan.layout import Layout, broken_rules, legal_layouts
from isoflop.plan.memory.flight import shares_unlike
from isoflop.plan.memory.refusal import Refusal
from isoflop.plan.memory.shard import Trained, host_training_stage, memory_training_stage
from isoflop.quantity import Node, Symbol, branch
from isoflop.quantity.units import format_bytes

#: The layout, what its fullest accelerator holds, the layouts refused, what bound it.
Placed: TypeAlias = tuple[Layout, Node, tuple[Refusal, ...], str]


def place(job: Trained, cluster: Cluster, global_batch: int, wanted: Layout | None) -> Placed:
    """The layout wanted, or the smallest that fits."""
    refused: list[Refusal] = []
    for alike in _candidates(job, cluster, global_batch, wanted):
        if (refusal := weigh(job, alike[-1], cluster, global_batch)[1]) is not None:
            refused.append(refusal)
            continue
        for layout in alike:
            memory, refusal = weigh(job, layout, cluster, global_batch)
            if refusal is None:
                bound = _binding(refused) if wanted is None else "none sought: the layout was given"
                return layout, memory, tuple(refused), bound
            refused.append(refusal)
    where = f"{job.arch.name} on {cluster}"
    if wanted is not None:
        raise Infeasible(f"{where}: the layout given does not fit: {refused[0]}")
    closest = min(refused, key=lambda r: r.bytes_over)
    raise Infeasible(f"{where}: none of {len(refused)} layouts fits; closest {closest}")


def _candidates(
    job: Trained, cluster: Cluster, global_batch: int, wanted: Layout | None
) -> list[list[Layout]]:
    """What to try, least split first, in groups of one tp, pp and cp that hold ever less.

    Only how experts are dealt and the ZeRO stage differ in a group: where its last layout
    does not fit, none does.
    """
    seq_len = job.work.seq_len
    if wanted is not None:
        broken = broken_rules(wanted, job.arch, cluster, global_batch, seq_len)
        if broken:
            raise InputError("layout", broken)
        return [[wanted]]
    legal = legal_layouts(job.arch, cluster, global_batch, job.work.batch, seq_len)
    ordered = sorted(legal, key=lambda layout: (_group(layout, cluster), layout.ep, layout.zero))
    return [list(alike) for _, alike in groupby(ordered, lambda layout: _group(layout, cluster))]


def _group(layout: Layout, cluster: Cluster) -> tuple[int, ...]:
    """Least split first, tensor parallelism before the rest.

    ZeRO 2 and 3 come after all that does without, for they send more (Rajbhandari 2020,
    1910.02054, section 7; for each micro-batch, where there are several); much idleness last.
    """
    wasteful = 8 * (cluster.count - layout.n_accelerators) > cluster.count
    split = layout.tp * layout.pp * layout.cp
    return int(wasteful), int(layout.zero > 1), split, layout.cp, layout.pp


def bytes_per_accelerator(job: Trained, layout: Layout, global_batch: int) -> Node:
    """Memory of the accelerator that holds most."""
    n_micro = layout.n_micro_batches(global_batch)
    ranks = shares_unlike(job.arch, layout)
    trees = [memory_training_stage(job, layout, n_micro, rank) for rank in ranks]
    return max(trees, key=lambda tree: tree.value)


def bytes_per_host(
    job: Trained, layout: Layout, cluster: Cluster, global_batch: int
) -> Node | None:
    """Memory of the host that holds most, its ranks being of one stage; None without offloading."""
    host = cluster.chip.host
    if layout.offload == "none" or host is None:
        return None
    n_micro = layout.n_micro_batches(global_batch)
    ranks = shares_unlike(job.arch, layout)
    trees = [host_training_stage(job, layout, n_micro, rank) for rank in ranks]
    sharing = min(host.chips, layout.n_accelerators)
    most = max(trees, key=lambda tree: tree.value)
    return branch("bytes_per_host", "bytes", most.children,
                  times=Symbol("accelerators_per_host", sharing, meaning="that share a host's memory"))  # fmt: skip


def weigh(
    job: Trained, layout: Layout, cluster: Cluster, global_batch: int
) -> tuple[Node, Refusal | None]:
    """What a layout's fullest accelerator holds, and the refusal where that is too much.

    Or where what it keeps in its host's memory is.
    """
    memory = bytes_per_accelerator(job, layout, global_batch)
    refusal = _refusal(job, layout, memory, cluster.chip.bytes_memory)
    beside = bytes_per_host(job, layout, cluster, global_batch)
    if refusal is None and beside is not None and cluster.chip.host is not None:
        refusal = _refusal(job, layout, beside, cluster.chip.host.bytes_memory, "host")
    return memory, refusal


def _refusal(
    job: Trained,
    layout: Layout,
    memory: Node,
    room: Symbol,
    of: Literal["accelerator", "host"] = "accelerator",
) -> Refusal | None:
    needed, available = int(memory.value), int(room.value)
    if needed <= available:
        return None
    largest = max(memory.children, key=lambda child: child.value)
    share = float(largest.total.value / memory.size.value)
    return Refusal(layout, needed, available, largest.name, share, job.recompute, of)


def barely(memory: Node, chip: Chip) -> tuple[str, ...]:
    """A warning where memory fits at its likeliest, and not at the top of its range.

    >>> from isoflop.hardware import find
    >>> from isoflop.quantity import Basis, Interval, Symbol, leaf
    >>> held = Symbol("bytes_held", 85 * 10**9, Basis.ASSUMED, Interval(84e9, 87e9))
    >>> barely(leaf("memory", "bytes", held), find("h100-sxm"))
    ('fits by 520.8 MB; at the top of its range, 87.09 GB, it does not',)
    """
    room, top = int(chip.bytes_memory.value), memory.interval
    if top is None or not int(memory.value) <= room < top.high:
        return ()
    left, most = format_bytes(room - int(memory.value)), format_bytes(top.high)
    return (f"fits by {left}; at the top of its range, {most}, it does not",)


def _binding(refused: list[Refusal]) -> str:
    """What kept the plan from a smaller layout."""
    if not refused:
        return "compute: the smallest layout fits"
    nearest = min(refused, key=lambda r: r.bytes_over)
    over = format_bytes(nearest.bytes_over)
    return f"memory: {len(refused)} smaller layouts do not fit, the nearest by {over}: {nearest}"
