"""The memory peak of our trainer's step in fp32: which moment it is, and what lives then.

Gradients are freed after each step, so they never stand beside all activations. Three
moments compete: the loss, whose gradients are made with it some rows at a time, the start of
the last layer's backward, and the end of backward. The allocator keeps small blocks resident when they
are freed and gives large ones back, so small and large blocks peak on their own.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from isoflop.arch.spec import Arch
from isoflop.count.blocks import CAPPED, Part, Saved, describe
from isoflop.count.operators import Core, Loss, Matmul, Pointwise
from isoflop.count.workload import Precision, Workload
from isoflop.hardware.profile import Profile
from isoflop.plan.attention_kernel import scores_kept
from isoflop.plan.cost import ROWS_LOSS, UNREAD
from isoflop.quantity import (
    Basis,
    Expr,
    Node,
    Symbol,
    branch,
    leaf,
    maximum,
    minimum,
    number,
    total,
)

SOURCE = "moments of the trainer's step; gradients set to None (torch.optim, zero_grad)"


@dataclass(frozen=True, slots=True)
class Block:
    """`times` live tensors of `size` bytes each."""

    name: str
    size: Expr
    times: Expr

    @property
    def total(self) -> Expr:
        return self.size * self.times


def moments(arch: Arch, workload: Workload) -> dict[str, tuple[Block, ...]]:
    """The tensors alive at each moment that can be the peak, weights and moments included."""
    root = describe(arch, workload)
    width = Precision.FP32.bytes_each
    weights = tuple(_weights(root, width))
    trained = tuple(_weights(root, width, trained=True))
    state = weights + _renamed(trained, "moments", 2)
    grads = _renamed(trained, "gradients", 1)
    loss = next(p.operator for p in root.parts if isinstance(p.operator, Loss))
    logits = minimum(loss.rows, ROWS_LOSS) * loss.classes * width
    head = _head(root.parts) * width
    kept = tuple(b for part in root.parts if part.name != "loss" for b in _saved(part, width))
    # A cap's tanh and slope stand beside them, made again for each few rows.
    copies = number(1 if arch.head.softcap is None else 4)
    table = root.parts[0].parts[0].weights[0].size * width
    widest = _widest(root) * width
    return {
        # The head's gradient is summed: what some rows give stands beside it.
        "the loss": (
            *state, *kept, Block("logits of some rows", logits, copies),
            Block("gradients of the head", head, number(2)),
        ),
        "backward of the last layer": (
            *state, *kept, Block("gradient of the head", head, number(1)),
            Block("gradients of activations", widest, number(3)),
        ),
        # The table's gradient is dense; a tied one is summed with the head's.
        "end of backward": (*state, *grads, Block("gradient of the embedding", table, number(1))),
    }  # fmt: skip


@dataclass(frozen=True, slots=True)
class Alive:
    """The most that is alive, in blocks that the allocator keeps and in those it gives back."""

    small: Expr
    large: Expr

    @property
    def bytes_small(self) -> int:
        return int(self.small.value)

    @property
    def bytes_large(self) -> int:
        return int(self.large.value)


def bytes_alive(arch: Arch, workload: Workload, bytes_reused: int) -> Alive:
    """The peaks of small and of large blocks over a step; `bytes_reused` parts the two."""
    alive = moments(arch, workload).values()
    small, large = (
        maximum(*(total(b.total for b in blocks if (b.size.value > bytes_reused) == big) for blocks in alive))
        for big in (False, True)
    )  # fmt: skip
    return Alive(small, large)


def peak_memory(arch: Arch, workload: Workload, profile: Profile) -> Node:
    """Resident bytes above those of PyTorch just imported, at the peak of a step."""
    alive = bytes_alive(arch, workload, profile.bytes_reused)
    resident = Symbol("ratio_resident", profile.ratio_resident, Basis.MEASURED, source="calibration",
                      meaning="resident bytes per live byte of blocks that the allocator keeps")  # fmt: skip
    framework = Symbol("bytes_framework", profile.bytes_framework, Basis.MEASURED, source="calibration",
                       meaning="what PyTorch grows by when its kernels first run")  # fmt: skip
    room = Symbol("bytes_room", profile.bytes_room, Basis.MEASURED, source="calibration",
                  meaning="free memory that the process holds before a model is built")  # fmt: skip
    sizes = {
        "framework": framework,
        "small_blocks": maximum(resident * alive.small - room, 0),
        "large_blocks": alive.large,
    }
    return branch(
        "bytes_peak",
        "bytes",
        [leaf(n, "bytes", size, basis=Basis.MODELLED, source=SOURCE) for n, size in sizes.items()],
    )


def _renamed(blocks: tuple[Block, ...], name: str, copies: int) -> tuple[Block, ...]:
    return tuple(Block(name, b.size, copies * b.times) for b in blocks)


def _weights(
    part: Part, width: Expr, times: Expr | None = None, *, trained: bool = False
) -> Iterator[Block]:
    """All of them, or those that `trained` leaves: what never runs has no gradient."""
    times = part.times if times is None else times * part.times
    for weight in part.weights:
        yield Block("weights", weight.size * width, times)
    for below in part.parts:
        if not (trained and below.name == UNREAD):
            yield from _weights(below, width, times, trained=trained)


def _head(parts: Iterable[Part]) -> Expr:
    """Numbers in the matrix that makes logits, tied or not."""
    (head,) = (part for part in parts if part.name == "head")
    product = (head.parts[-1] if head.parts else head).operator
    assert isinstance(product, Matmul)
    return product.inner * product.cols


def _saved(part: Part, width: Expr, times: Expr | None = None) -> Iterator[Block]:
    times = part.times if times is None else times * part.times
    for saved in _kept(part):
        each = Symbol("bytes_index", 8) if saved.kind == "index" else width
        yield Block(saved.name, saved.size * each, times)
    for below in part.parts:
        yield from _saved(below, width, times)


def _kept(part: Part) -> Iterator[Saved]:
    """What PyTorch keeps on a CPU, dropout masks in the activations' precision.

    Where no kernel is fused a core keeps every pair instead of the log-sum-exp. Steps are in
    fp32, so that no tensor stands beside its fp32 copy.
    """
    core = part.operator
    n_kept = scores_kept(core) if isinstance(core, Core) else 0
    yield from (
        s
        for s in part.saved
        if not (n_kept and s.name == "log-sum-exp") and s.kind != "beside fp32" and s.name != CAPPED
    )
    yield from (s for s in part.kept_by_some if s.kind == "mask")
    if isinstance(core, Core):
        pairs = core.batch * core.heads * core.queries * core.keys
        yield from [Saved("scores", pairs, "scores", "heads")] * n_kept


def _widest(part: Part) -> Expr:
    """Numbers in the largest activation that any layer writes."""
    below = [_widest(p) for p in part.parts if p.name not in ("head", "loss")]
    match part.operator:
        case Matmul(rows, _, cols):
            below.append(rows * cols)
        case Pointwise(_, _, writes):
            below.append(writes)
        case Core(batch, heads, _, queries, _, keys) as core if scores_kept(core):
            below.append(batch * heads * queries * keys)
        case _:
            pass
    return maximum(*below) if below else number(0)
