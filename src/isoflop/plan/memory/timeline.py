"""What a rank of a pipeline holds, moment by moment through a step, under any schedule.

Weights, gradients and the optimizer's state stand; activations come with each forward and go
with each backward as the schedule orders them. The most that a timeline holds is what the
memory tree says: for 1F1B that of `memory_training_stage`, for other schedules `memory_peak`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from fractions import Fraction

from isoflop.count.blocks import Part, describe
from isoflop.count.memory_rank import Trained, memory_rank, stage_parts
from isoflop.count.memory_saved import layers_in
from isoflop.count.memory_split import Shards, split_of, ways_of
from isoflop.count.memory_stack import overhead, stack_of
from isoflop.count.operators import Core, Matmul
from isoflop.count.workload import Workload
from isoflop.errors import InputError, Problem
from isoflop.plan.memory.shard import bytes_boundary, shards_of
from isoflop.plan.schedule import (
    Interleaved,
    OneFOneB,
    Order,
    Schedule,
    Slot,
    held,
    orders,
    works,
)
from isoflop.plan.schedule.kinds import n_chunks, n_stages, stage_of
from isoflop.plan.step.setting import Setting
from isoflop.plan.training.work import STATES
from isoflop.quantity import Basis, Expr, Node, branch, leaf
from isoflop.quantity.expr import Value
from isoflop.quantity.units import format_bytes

#: What is there for one unit at a time, and what stands throughout.
IN_TURN = ("bytes_gathered", "bytes_keys_values")
STANDING = ("bytes_weights", "bytes_grads", "bytes_optimizer", *IN_TURN)


@dataclass(frozen=True, slots=True)
class Moment:
    """What is held while something runs, in bytes by part."""

    when: str
    parts: tuple[tuple[str, Value], ...]

    @property
    def bytes(self) -> Value:
        return sum(size for _, size in self.parts)


@dataclass(frozen=True, slots=True)
class Timeline:
    """A step of one rank: its moments in order, the optimizer's step last."""

    rank: int
    moments: tuple[Moment, ...]

    @property
    def peak(self) -> Moment:
        """The first moment that holds the most."""
        return max(self.moments, key=lambda moment: moment.bytes)

    def text(self, width: int = 40) -> str:
        """A bar for each moment; `#` stands, `+` comes and goes."""
        most = self.peak.bytes
        rows = [f"rank {self.rank}, most at {self.peak.when}: {format_bytes(most)}"]
        for moment in self.moments:
            fixed = sum(size for name, size in moment.parts if name != "bytes_activations")
            bar = "#" * round(fixed / most * width)
            bar += "+" * (round(moment.bytes / most * width) - len(bar))
            mark = " <" if moment is self.peak else ""
            rows.append(f"{moment.when:>12} |{bar:<{width}}| {format_bytes(moment.bytes)}{mark}")
        return "\n".join(rows)

    def tree(self) -> Node:
        """The peak by part."""
        parts = [leaf(n, "bytes", size, basis=Basis.MODELLED) for n, size in self.peak.parts]
        return branch("bytes_per_accelerator", "bytes", parts, source=f"at {self.peak.when}")


def memory_timeline(setting: Setting, rank: int = 0, schedule: Schedule | None = None) -> Timeline:
    """What pipeline rank `rank` holds through a step of `setting`.

    Without a `schedule` it is what the layout says: 1F1B, or interleaved with `virtual` chunks.

    Raises:
        InputError: the pipeline has no such rank, the schedule asks for other numbers of ranks
            or micro-batches, or there are fewer layers than stages.

    >>> from isoflop.arch import gpt
    >>> from isoflop.hardware import parse_cluster
    >>> from isoflop.plan.layout import Layout
    >>> small = gpt("small", d_model=64, n_layers=4, n_heads=4, vocab_size=99, max_seq_len=64)
    >>> setting = Setting(small, parse_cluster("2xa100-sxm-80gb"), Layout(pp=2), 64, 3)
    >>> [moment.when for moment in memory_timeline(setting).moments]
    ['F0', 'F1', 'BW0', 'F2', 'BW1', 'BW2', 'step']
    """
    layout, job = setting.layout, job_of(setting)
    if not 0 <= rank < layout.pp:
        rule = f"lies between 0 and pp - 1 = {layout.pp - 1}"
        raise InputError("timeline", [Problem("rank", rank, rule)])
    if schedule is None:
        schedule = Interleaved(layout.virtual) if layout.virtual > 1 else OneFOneB()
    order = orders(schedule, layout.pp, setting.n_micro_batches)[rank]
    stages = _stages(job, shards_of(layout), schedule, rank)
    moments = _moments(job, shards_of(layout), setting.stack, schedule, order, stages)
    return Timeline(rank, tuple(moments))


def memory_peak(setting: Setting, rank: int = 0, schedule: Schedule | None = None) -> Node:
    """What the rank holds at its peak, by part."""
    return memory_timeline(setting, rank, schedule).tree()


def job_of(setting: Setting) -> Trained:
    """One micro-batch of a setting as memory sees it; 8 and 4 bits multiply, 16 are stored."""
    match setting.compute:
        case "fp32" | "tf32" | "fp16":
            state = STATES[setting.compute]
        case _:
            state = STATES["bf16"]
    work = Workload.train(setting.layout.micro_batch, setting.seq_len)
    return Trained(setting.arch, work, state, setting.recompute)


# --- what a rank's stages hold ----------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Stage:
    """One stage of a rank: what stands, and what one micro-batch leaves.

    `layers`, with the embedding, is kept per micro-batch, `for_weights` of it once the inputs'
    gradient is done; `ends` are head and loss, `again` the layer that is made again, as far as it
    exceeds the `loss`, which shares its room.
    """

    standing: tuple[tuple[str, Value], ...]
    layers: Value
    for_weights: Value
    ends: Value
    loss: Value
    again: Value


def _stages(job: Trained, shards: Shards, schedule: Schedule, rank: int) -> dict[int, _Stage]:
    """The rank's stages by their number in the pipeline."""
    count = n_stages(schedule, shards.pp)
    deep = replace(shards, pp=count, virtual=1)
    own = (stage_of(schedule, shards.pp, rank, chunk) for chunk in range(n_chunks(schedule)))
    return {number: _stage(job, deep, number) for number in own}


def _stage(job: Trained, deep: Shards, number: int) -> _Stage:
    tree = memory_rank(job, deep, stage=number)
    kept = {child.name: child.value for child in tree.find("bytes_activations").children}
    again = kept.pop("layer_going_backward", 0)
    comes_and_goes = {*job.arch.kinds, "embedding"}
    layers = sum(size for name, size in kept.items() if name in comes_and_goes)
    standing = tuple((c.name, c.value) for c in tree.children if c.name in STANDING)
    for_weights = _for_weights(job, deep, number)
    ends, loss = sum(kept.values()) - layers, kept.get("loss", 0)
    return _Stage(standing, layers, for_weights, ends, loss, again)


def _for_weights(job: Trained, deep: Shards, number: int) -> Value:
    """What the weights' gradients of a stage's layers need: matrices' inputs, and their outputs'
    gradients (Qi 2023, 2401.10241, section 2.3: 32 s b h for GPT).
    """
    found: Value = 0
    for part, copies in stage_parts(
        job.arch, describe(job.arch, job.work), deep.pp, number, deep.virtual
    ):
        split = ways_of(split_of(job.arch, part.name, deep), deep)
        for _, layer in layers_in([part]):
            found += copies.value * sum(_of_matrices(layer, split))
    return found * job.state.activation.bytes_each.value


def _of_matrices(part: Part, split: Callable[[str], Expr], times: Value = 1) -> Iterator[Value]:
    if isinstance(part.operator, Matmul) and part.weights:
        axis, _ = part.weights[0].axes[-1]
        yield times * (part.operator.rows * part.operator.cols / split(axis)).value
        yield from (times * (s.size / split(s.axis)).value for s in part.saved if s.name == "input")
        if part.name == "down" and not part.saved:  # relu has kept it
            yield times * (part.operator.rows * part.operator.inner / split("ff")).value
    if isinstance(part.operator, Core):  # its output is what the next matrix reads
        core = part.operator
        output = core.batch * core.heads * core.queries * core.d_value
        yield times * (output / split("heads")).value
    for below in part.parts:
        yield from _of_matrices(below, split, times * below.times.value)


# --- the step ---------------------------------------------------------------------------------


def _moments(
    job: Trained,
    shards: Shards,
    stack: str,
    schedule: Schedule,
    order: Order,
    own: dict[int, _Stage],
) -> Iterator[Moment]:
    levels = _levels(own, order)
    standing = _standing(own) + _beside(job, shards, stack, schedule, order, max(levels), own)
    for slot, level in zip(order, levels, strict=True):
        yield Moment(_label(slot, own), (*standing, ("bytes_activations", level)))
    yield Moment("step", (*standing, ("bytes_activations", 0)))


def _levels(own: dict[int, _Stage], order: Order) -> list[Value]:
    """Bytes of activations during each slot: in flight, at the ends, and made again."""
    size = max(own) + 1
    layers = [own[n].layers if n in own else 0 for n in range(size)]
    waiting = [own[n].for_weights if n in own else 0 for n in range(size)]
    ends = sum(stage.ends for stage in own.values())
    loss = sum(stage.loss for stage in own.values())
    again = {n: max(stage.again - (loss - stage.loss), 0) for n, stage in own.items()}
    levels = []
    for slot, flight in zip(order, held(order, layers, waiting), strict=True):
        back = [again[work.stage] for work in works(slot) if work.kind in ("B", "BW")]
        levels.append(flight + ends + max(back, default=0))
    return levels


def _standing(own: dict[int, _Stage]) -> tuple[tuple[str, Value], ...]:
    """What all stages of the rank hold throughout; units are gathered one stage at a time."""
    by_name: dict[str, list[Value]] = {}
    for stage in own.values():
        for name, size in stage.standing:
            by_name.setdefault(name, []).append(size)
    return tuple((n, max(v) if n in IN_TURN else sum(v)) for n, v in by_name.items())


def _beside(
    job: Trained, shards: Shards, stack: str, schedule: Schedule, order: Order, most: Value,
    own: dict[int, _Stage],
) -> tuple[tuple[str, Value], ...]:  # fmt: skip
    """What the software holds, for the most activations of the step."""
    sizes = (*_standing(own), ("bytes_activations", most))
    rank = branch("rank", "bytes", [leaf(name, "bytes", size) for name, size in sizes])
    each = Fraction(1, schedule.virtual) if isinstance(schedule, Interleaved) else 1
    flight = max(held(order, [each] * (max(own) + 1), [0] * (max(own) + 1)))
    outputs = flight * bytes_boundary(job, shards) if shards.pp > 1 else 0
    return (("bytes_overhead", overhead(stack_of(stack), rank, shards, outputs).value),)


def _label(slot: Slot, own: dict[int, _Stage]) -> str:
    """`F0`; with several stages on the rank also which, as `F0@3`."""
    several = len(own) > 1
    return " ".join(
        f"{w.kind}{w.micro_batch}{f'@{w.stage}' if several else ''}" for w in works(slot)
    )
