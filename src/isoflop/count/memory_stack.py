"""What a trainer's software holds on each accelerator beside the model's own bytes, by part.

A stack is a few constants, none of them of one model or one run: the process itself, what a
communicator of a group takes, buckets that gradients and weights are sent in, copies that the
optimizer's step makes, and blocks that the allocator keeps and cannot use again.
"""

from __future__ import annotations

from dataclasses import dataclass

from isoflop.count.memory_split import Shards
from isoflop.errors import UnknownName
from isoflop.quantity import (
    Basis,
    Expr,
    Interval,
    Node,
    Symbol,
    branch,
    leaf,
    maximum,
    minimum,
    number,
    total,
    where,
)
from isoflop.quantity.expr import product

BYTES_CONTEXT = Symbol(
    "bytes_context",
    8 * 10**8,
    Basis.ASSUMED,
    Interval(3 * 10**8, 17 * 10**8),
    meaning="memory of a process outside its allocator: CUDA's context, kernels, libraries",
    source=(
        "0.3 GB before any kernel since CUDA 11.7 loads lazily (pytorch/pytorch#107667), more as "
        "kernels load; before, 1113 MiB on V100 (bigscience, tr3m-1B3.md) and 1573 MiB on A100 "
        "(tr11-176B-ml, chronicles-prequel.md)"
    ),
)

BYTES_COMMUNICATOR = Symbol(
    "bytes_communicator",
    688 * 2**20,
    Basis.ASSUMED,
    Interval(2 * 10**8, 11 * 10**8),
    meaning="buffers of NCCL for one group of ranks, on each of them",
    source=(
        "544 MB for two and 688 MB for more A100 (NVIDIA/nccl#964); linear in channels, not in ranks "
        "(#986): half on four V100, which have 12 (#713) where eight A100 have 24 (nccl-tests#100); "
        "1.06 GB for a first group on H100 (#1685)"
    ),
)


def _share(value: float, basis: Basis, spread: Interval, source: str) -> Symbol:
    return Symbol("share_fragments", value, basis, spread, source=source,
                  meaning="memory that the allocator keeps and cannot use, per byte of activations")  # fmt: skip


FRAGMENTS_FITTED = _share(
    0.2,
    Basis.FITTED,
    Interval(0, 0.5),
    "125 peaks of whole processes, allocators of 2021 to 2023 (docs/memory-validation.md)",
)
FRAGMENTS_ASSUMED = _share(
    0.05,
    Basis.ASSUMED,
    Interval(0, 0.3),
    "little with expandable segments (PyTorch 2.1 and newer), 0.2 as fitted to older ones",
)

#: 0.85 of the peaks of whole processes lie as near to their predictions, each source weighing the
#: same; the ranges of what software holds come on top. Set on the other sources the two hold 92 % of
#: an unseen one's peaks (benchmarks/memory_published.py).
ERROR_OF_MEMORY = Symbol(
    "error_of_memory",
    1,
    Basis.FITTED,
    Interval(0.886, 1.129),
    meaning="measured over predicted bytes of a whole process",
    source="133 peaks of four sources (docs/memory-validation.md)",
)


@dataclass(frozen=True, slots=True)
class MemoryStack:
    """What a trainer's software holds beside the model.

    Attributes:
        reduce_buckets: how many buckets of `bucket` 16-bit numbers gradients are reduced in.
        gathers: weights are gathered after the step through one more such bucket.
        flat: the step lays a rank's share of the gradients out in one 16-bit piece.
        step_copies: bytes that the step makes per byte of the optimizer's state; they come when
            activations are gone, and count as far as they exceed them.
        keeps_outputs: a pipeline keeps each stage's output for every micro-batch in flight.
    """

    name: str
    source: str
    context: Symbol = BYTES_CONTEXT
    communicator: Symbol = BYTES_COMMUNICATOR
    fragments: Symbol = FRAGMENTS_ASSUMED
    bucket: int = 0
    reduce_buckets: int = 0
    gathers: bool = False
    flat: bool = False
    step_copies: float = 0
    keeps_outputs: bool = False


UNKNOWN = MemoryStack("unknown", "nothing is known of it: a process, its groups, few fragments")

STACKS = {
    s.name: s
    for s in (
        UNKNOWN,
        MemoryStack("pytorch", "one process; torch.optim's foreach AdamW makes a copy of a moment for all "
                    "weights at once (torch/optim/adamw.py, _multi_tensor_adamw)",
                    fragments=FRAGMENTS_FITTED, step_copies=0.5),
        MemoryStack("deepspeed", "ZeRO 1 and 2 (runtime/zero/stage_1_and_2.py): buckets of 5e8 numbers by "
                    "default, gradients flattened in step(); PipelineEngine keeps pipe_buffers['outputs']",
                    fragments=FRAGMENTS_FITTED, bucket=5 * 10**8, reduce_buckets=1, gathers=True,
                    flat=True, keeps_outputs=True),
    )
}  # fmt: skip


def stack_of(name: str) -> MemoryStack:
    """The stack of a trainer's name, with or without its release.

    Trainers that are none of the stacks here take what is assumed of an unknown one.

    >>> stack_of("megatron-deepspeed").name, stack_of("megatron-core-0.8").name
    ('deepspeed', 'unknown')
    """
    if not name:
        raise UnknownName("stack", name, STACKS)
    return next((stack for key, stack in STACKS.items() if key in name), UNKNOWN)


def overhead(stack: MemoryStack, held: Node, shards: Shards, outputs: Expr | int = 0) -> Node:
    """What the stack holds beside `held`, a tree with gradients, state and activations.

    `outputs` are the bytes of a stage's output for all micro-batches in flight.

    >>> from isoflop.quantity import branch, leaf
    >>> held = branch("rank", "bytes", [leaf(f"bytes_{n}", "bytes", 10**9)
    ...     for n in ("weights", "grads", "optimizer", "activations")])
    >>> tree = overhead(STACKS["deepspeed"], held, Shards(tp=2, dp=4, zero=1))
    >>> [(part.name, round(float(part.value) / 1e9, 2)) for part in tree.children]
    ... # doctest: +NORMALIZE_WHITESPACE
    [('context', 0.8), ('communicators', 2.16), ('reduce_buckets', 1.0), ('gather_bucket', 1.0),
     ('gradients_flat', 0.25), ('fragments', 0.2)]
    """
    sizes = {child.name: child.total for child in held.children}
    activations = sizes["bytes_activations"]
    each = number(stack.bucket) * Symbol("bytes_bf16", 2)
    copies = product([Symbol("dp", shards.dp), Symbol("cp", shards.cp)])
    split = where(copies - 1, 1, 0)
    kept = outputs if stack.keeps_outputs else 0
    parts = {
        "context": number(stack.context),
        "communicators": groups(shards) * stack.communicator,
        "reduce_buckets": stack.reduce_buckets * each,
        "gather_bucket": split * minimum(each, sizes["bytes_weights"]) if stack.gathers else number(0),
        "gradients_flat": _flat(sizes["bytes_grads"], shards) if stack.flat else number(0),
        "step_copies": _copies(stack, sizes.get("bytes_optimizer", number(0)), activations),
        "stage_outputs": number(kept),
        "fragments": stack.fragments * activations,
    }  # fmt: skip
    kept_parts = [
        leaf(name, "bytes", size, basis=Basis.MODELLED, source=stack.source)
        for name, size in parts.items()
        if size != number(0)
    ]
    return branch("bytes_overhead", "bytes", kept_parts, source=stack.source)


def groups(shards: Shards) -> Expr:
    """Groups of more than one rank that a rank is in: one of each kind, and one of all ranks.

    Where ranks are split in one way alone, its group is all ranks. Sharding within a part of the
    copies adds the group across parts.
    """
    kinds = ("tp", "pp", "dp", "cp")
    ways = total(where(Symbol(kind, getattr(shards, kind)) - 1, 1, 0) for kind in kinds)
    own = ways + where(ways - 1, 1, 0) + where(Symbol("ep", shards.ep) - 1, 1, 0)
    if shards.shard is None:
        return own
    copies = product([Symbol("dp", shards.dp), Symbol("cp", shards.cp)])
    return own + where((shards.among - 1) * (copies - shards.among), 1, 0)


def _flat(grads: Expr, shards: Shards) -> Expr:
    return grads / shards.among if shards.zero == 1 else grads


def _copies(stack: MemoryStack, state: Expr, activations: Expr) -> Expr:
    if not stack.step_copies:
        return number(0)
    return maximum(number(stack.step_copies) * state - activations, 0)
