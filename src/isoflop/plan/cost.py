"""Seconds of a training step, operator by operator, from a calibrated profile.

Each operator of the description reads the curves that `uses` names, at its own sizes, and
pays once for standing between others (`Profile.seconds_between`, measured on the least
models there are); the step is their sum. All share one more number, the machine's pace,
so that a slow hour moves every part of the total alike.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal, TypeAlias

from isoflop.arch.spec import Arch
from isoflop.count.blocks import Part, describe
from isoflop.count.operators import Core, Gather, Loss, Matmul, Pointwise
from isoflop.count.workload import Precision, Workload
from isoflop.hardware.profile import Profile
from isoflop.plan.attention_kernel import STANDS_IN, attention_kernel
from isoflop.quantity import (
    Basis,
    Expr,
    Interval,
    Node,
    Symbol,
    branch,
    ceil_div,
    leaf,
    maximum,
    minimum,
    number,
    total,
)

Phase: TypeAlias = Literal["forward", "backward"]
_ONE = number(1)
#: Heads of all sequences together are independent work: more than this many, enough to
#: keep every thread busy, take as many times as long as there are times as many.
HEADS_MOST = 32
#: The head and the loss take this many tokens at a time (isoflop.model.loss).
ROWS_LOSS = 512
HEADS = ("head", "logits")
#: What is stored and never runs, so that it has no gradient.
UNREAD = "unread"
#: What the sum of kernels misses of a step.
IN_A_STEP = Symbol(
    "step_per_kernels",
    1.0,
    Basis.MODELLED,
    Interval(0.87, 1.15),
    "benchmarks/step_time_cpu: of twelve rows eleven within 9 %, one 18 %; in-sample",
    "a step's seconds over those of its kernels one by one",
)
SOURCE = "calibrated curves (isoflop.hardware.profile)"


@dataclass(frozen=True, slots=True)
class Use:
    """One call of a kernel at these sizes, or `times` calls' worth of it."""

    kernel: str
    sizes: tuple[Expr, ...]
    times: Expr = _ONE


def uses(part: Part, d_head: Expr | None = None) -> tuple[Use, ...]:
    """Which kernels a part runs, forward and backward: where operators meet curves.

    `d_head` is the head size of the attention that the part belongs to.
    """
    match part.operator:
        case Matmul(rows, inner, cols, bias):
            product = Use("linear", (rows, inner, cols))
            return (product, Use("bias", (rows, cols))) if bias else (product,)
        case Core(batch, heads, kv_heads, queries, _, _, d_key, d_value) as core:
            n, most = batch * heads, HEADS_MOST
            width = d_key if d_key.value == d_value.value else (d_key + d_value) / 2
            times = maximum(n / most, 1)
            if "distances" in core.beside:  # every pair is scored twice: its key and its distance
                width, times = d_value, 2 * times
            sizes = (minimum(n, most), queries, width, heads / kv_heads)
            return (Use(attention_kernel(core), sizes, times),)
        case Pointwise("layer_norm" | "rms_norm" as kind, _, writes, rows) if rows is not None:
            return (Use(kind, (rows, writes / rows)),)
        case Pointwise("rotary", _, writes) if d_head is not None:
            # Queries and keys turn in a call each; both are priced as halves of one length.
            return (Use("rotary", (writes / d_head / 2, d_head)),) * 2
        case Pointwise("silu_clamped_gate", _, writes):
            return (Use("silu_clamped", (writes,)),)
        case Pointwise(kind, _, writes) if kind.endswith("_gate"):
            return (Use(kind.removesuffix("_gate"), (writes,)), Use("multiply", (writes,)))
        case Pointwise(kind, _, writes):
            return (Use(kind, (writes,)),)
        case Gather(rows, width, table):
            return (Use("gather", (rows, width, table)),)
        case Loss(rows, classes):
            return (Use("loss", (minimum(rows, ROWS_LOSS), classes), maximum(rows / ROWS_LOSS, 1)),)
        case None:
            return ()


def sums(part: Part) -> tuple[Use, ...]:
    """The gradients that backward adds up: of a tensor with two readers, of the head by rows."""
    match part.operator:
        case Pointwise("add", _, writes):
            return (Use("add", (writes,)),)  # the stream is read by the block and by the sum
        case Matmul(rows, inner, cols) if part.name in HEADS:
            tied = 0 if part.weights else 1
            return (Use("add", (inner * cols,), ceil_div(rows, ROWS_LOSS) + tied),)
        case Gather(_, width, table) if not part.weights:
            return (Use("add", (table * width,)),)  # of a table that others read too
        case Matmul(rows, inner) if not part.saved and part.name not in ("out", "down"):
            return (Use("add", (rows * inner,)),)  # an input that a sibling keeps: k and v, or up
        case _:
            return ()


def drops(part: Part) -> tuple[Use, ...]:
    """Each dropout: random numbers for a mask, and a product forward and backward."""
    masks = (saved.size for saved in part.kept_by_some if saved.kind in ("mask", "mask_scores"))
    return tuple(Use("dropout", (size,)) for size in masks)


def blocks_written(part: Part, phase: Phase) -> tuple[Expr, ...]:
    """Elements of each new tensor that a part writes: its outputs, or its gradients."""
    forward = phase == "forward"
    match part.operator:
        case Matmul(rows, inner, cols):
            written = minimum(rows, ROWS_LOSS) if part.name in HEADS else rows
            return (written * cols,) if forward else (rows * inner, inner * cols)
        case Pointwise(_, _, writes):
            return (writes,)
        case Gather(rows, width, table):
            return (rows * width,) if forward else (table * width,)
        case _:
            return ()


def step_cost(arch: Arch, workload: Workload, profile: Profile, pace: float = 1.0) -> Node:
    """Seconds of forward, backward and optimizer of one fp32 step, by path.

    `pace` is how much slower the machine is now than while it was calibrated.

    Kernels that an older profile lacks are read as `untimed` says.

    Raises:
        UnknownName: the profile lacks a curve that the model needs.
    """
    root = describe(arch, workload)
    price = Pricer(profile, _tensors(root), pace)
    phases: tuple[Phase, ...] = ("forward", "backward")
    children = [price.leaf("batch", price.read(Use("batch", (workload.B, workload.T))))]
    children += [
        branch(phase, "seconds", price.work(root, phase), source=SOURCE) for phase in phases
    ]
    children.append(branch("optimizer", "seconds", price.weights(root), source=SOURCE))
    children.append(price.leaf("between", price.between(), n_operators(root)))
    return branch("seconds_step", "seconds", children)


def untimed(arch: Arch, workload: Workload, profile: Profile) -> tuple[str, ...]:
    """The kernels of a step that an older profile lacks: what they take is predicted too low."""
    return tuple(sorted({name for name in _kernels(describe(arch, workload)) if name in STANDS_IN
                         and not _has(profile, name)}))  # fmt: skip


def _kernels(part: Part) -> Iterator[str]:
    if isinstance(part.operator, Core):
        yield attention_kernel(part.operator)
    yield from (use.kernel for use in drops(part))
    for below in part.parts:
        yield from _kernels(below)


def _has(profile: Profile, kernel: str) -> bool:
    return f"{kernel}_forward" in profile.curves


@dataclass(frozen=True, slots=True)
class Pricer:
    """The fold over a description; `n_tensors` are the model's weights as the optimizer sees them."""

    profile: Profile
    n_tensors: Expr
    pace: float

    def work(self, group: Part, phase: Phase, d_head: Expr | None = None) -> list[Node]:
        """The parts of a group that do something in a phase."""
        cores = [p.operator.d_key for p in group.parts if isinstance(p.operator, Core)]
        d_head = cores[0] if cores else d_head
        found = []
        for part in group.parts:
            if part.parts:
                found.append(
                    branch(part.name, "seconds", self.work(part, phase, d_head), times=part.times)
                )
            elif part.operator is not None:
                found.append(self.leaf(part.name, self._seconds(part, phase, d_head), part.times))
        return found

    def between(self) -> Expr:
        """What one operator costs beside its kernels."""
        value = self.profile.seconds_between
        meaning = "Python, autograd and cold caches between two kernels"
        return Symbol("seconds_between", value, Basis.MEASURED, None, "calibration", meaning)

    def weights(self, group: Part) -> list[Node]:
        """The optimizer's share of each part: that of its tensors among equal ones."""
        found = []
        for part in group.parts:
            if part.name == UNREAD:
                continue
            if part.parts and (below := self.weights(part)):
                found.append(branch(part.name, "seconds", below, times=part.times))
            elif part.weights:
                calls = (Use("optimizer", (self.n_tensors, weight.size)) for weight in part.weights)
                seconds = total(self.read(call) / self.n_tensors for call in calls)
                found.append(self.leaf(part.name, seconds, part.times))
        return found

    def _seconds(self, part: Part, phase: Phase, d_head: Expr | None) -> Expr:
        if isinstance(part.operator, Loss):  # its gradient is made with it
            return total(self.read(use) for use in uses(part) if phase == "forward")
        terms = [self.read(use, f"_{phase}") for use in (*uses(part, d_head), *drops(part))]
        if phase == "backward" and isinstance(part.operator, Matmul) and part.operator.input_fixed:
            terms = [term / 2 for term in terms]  # nobody asks for the input's gradient
        if phase == "backward":
            terms += [self.read(use, "_forward") for use in sums(part)]
        for elements in blocks_written(part, phase):
            size = elements * Precision.FP32.bytes_each
            if size.value > self.profile.bytes_reused:
                terms.append(self.read(Use("fresh", (size,))))
        return total(terms)

    def read(self, use: Use, phase: str = "") -> Expr:
        kernel: str | None = use.kernel
        if kernel in STANDS_IN and not _has(self.profile, use.kernel):
            kernel = STANDS_IN[use.kernel]
        if kernel is None:
            return number(0)
        sizes = (float(size.value) for size in use.sizes)
        return use.times * self.profile.curve(kernel + phase).symbol(*sizes)

    def leaf(self, name: str, seconds: Expr, times: Expr = _ONE) -> Node:
        spread = self.profile.pace
        pace = Symbol(
            "pace",
            self.pace,
            Basis.MEASURED,
            Interval(self.pace * spread.low, self.pace * spread.high),
            "calibration",
            "of the whole machine",
        )
        return leaf(
            name,
            "seconds",
            pace * IN_A_STEP * seconds,
            times=times,
            basis=Basis.MEASURED,
            source=SOURCE,
        )


def n_operators(part: Part) -> Expr:
    """How many operators run in a forward pass."""
    below = total(n_operators(p) for p in part.parts)
    return part.times * (below + number(int(part.operator is not None)))


def _tensors(part: Part) -> Expr:
    """How many trained tensors there are."""
    below = total(_tensors(p) for p in part.parts if p.name != UNREAD)
    return part.times * (below + number(len(part.weights)))
