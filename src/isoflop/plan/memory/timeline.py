"""What a rank of a pipeline holds, moment by moment through a step, under any schedule.

Weights, gradients and the optimizer's state stand; activations come with each forward and go
with each backward as the schedule orders them. The most that a timeline holds is what the
memory tree of `memory_training_stage` says.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from fractions import Fraction
from typing import TypeAlias

from isoflop.count.blocks import describe
from isoflop.count.memory_rank import Trained, memory_rank, stage_parts
from isoflop.count.memory_split import Shards
from isoflop.count.memory_stack import overhead, stack_of
from isoflop.count.workload import Workload
from isoflop.errors import InputError, Problem
from isoflop.plan.layout import Layout
from isoflop.plan.memory.put_off import bytes_for_weights
from isoflop.plan.memory.shard import bytes_boundary, memory_training_stage, shards_of
from isoflop.plan.schedule import (
    Interleaved,
    Order,
    Schedule,
    Slot,
    held,
    n_stages,
    orders,
    stages_of,
    works,
)
from isoflop.plan.step.setting import Setting
from isoflop.plan.training.work import STATES
from isoflop.quantity import Basis, Node, branch, leaf
from isoflop.quantity.expr import Value
from isoflop.quantity.units import format_bytes

#: What stands throughout.
STANDING = (
    "bytes_weights",
    "bytes_grads",
    "bytes_optimizer",
    "bytes_gathered",
    "bytes_keys_values",
)


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


def memory_timeline(setting: Setting, rank: int = 0) -> Timeline:
    """What pipeline rank `rank` holds through a step of `setting`.

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
    schedule = layout.pipeline
    order = orders(schedule, layout.pp, setting.n_micro_batches)[rank]
    own = _stages(job, shards_of(layout), schedule, rank)
    levels, standing = _levels(own, order), _standing(setting, job, rank)
    standing += _beside(job, layout, setting.stack, order, max(levels), standing)
    moments = [
        Moment(_label(slot, own), (*standing, ("bytes_activations", level)))
        for slot, level in zip(order, levels, strict=True)
    ]
    return Timeline(rank, (*moments, Moment("step", (*standing, ("bytes_activations", 0)))))


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
    """What one micro-batch leaves on one stage of a rank.

    `layers`, with the embedding, is kept per micro-batch, `for_weights` of it once the inputs'
    gradient is done; `ends` are head and loss, `again` the layer that is made again, as far as it
    exceeds the `loss`, which shares its room.
    """

    layers: Value
    for_weights: Value
    ends: Value
    loss: Value
    again: Value


def _stages(job: Trained, shards: Shards, schedule: Schedule, rank: int) -> dict[int, _Stage]:
    """The rank's stages by their number in the pipeline."""
    count = n_stages(schedule, shards.pp)
    deep = replace(shards, pp=count, virtual=1)
    own = stages_of(schedule, shards.pp, rank)
    return {number: _stage(job, deep, number) for number in own}


def _stage(job: Trained, deep: Shards, number: int) -> _Stage:
    tree = memory_rank(job, deep, stage=number)
    kept = {child.name: child.value for child in tree.find("bytes_activations").children}
    again = kept.pop("layer_going_backward", 0)
    comes_and_goes = {*job.arch.kinds, "embedding"}
    layers = sum(size for name, size in kept.items() if name in comes_and_goes)
    for_weights = _for_weights(job, deep, number)
    ends, loss = sum(kept.values()) - layers, kept.get("loss", 0)
    return _Stage(layers, for_weights, ends, loss, again)


def _for_weights(job: Trained, deep: Shards, number: int) -> Value:
    """What the weights' gradients of a stage's layers need of one micro-batch."""
    parts = stage_parts(job.arch, describe(job.arch, job.work), deep.pp, number, deep.virtual)
    return sum(
        copies.value * bytes_for_weights(job, deep, part).value
        for part, copies in parts
        if part.is_layer
    )


# --- the step ---------------------------------------------------------------------------------


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


Standing: TypeAlias = tuple[tuple[str, Value], ...]


def _standing(setting: Setting, job: Trained, rank: int) -> Standing:
    """What stays throughout, as the memory tree has it."""
    tree = memory_training_stage(job, setting.layout, setting.n_micro_batches, rank)
    return tuple((c.name, c.value) for c in tree.children if c.name in STANDING)


def _beside(
    job: Trained, layout: Layout, stack: str, order: Order, most: Value, standing: Standing
) -> Standing:
    """What the software holds, for the most activations of the step."""
    shards, schedule = shards_of(layout), layout.pipeline
    sizes = (*standing, ("bytes_activations", most))
    rank = branch("rank", "bytes", [leaf(name, "bytes", size) for name, size in sizes])
    each = Fraction(1, schedule.virtual) if isinstance(schedule, Interleaved) else 1
    size = n_stages(schedule, layout.pp)
    flight = max(held(order, [each] * size, [0] * size))
    outputs = flight * bytes_boundary(job, shards) if shards.pp > 1 else 0
    return (("bytes_overhead", overhead(stack_of(stack), rank, shards, outputs).value),)


def _label(slot: Slot, own: dict[int, _Stage]) -> str:
    """`F0`; with several stages on the rank also which, as `F0@3`."""
    several = len(own) > 1
    return " ".join(
        f"{w.kind}{w.micro_batch}{f'@{w.stage}' if several else ''}" for w in works(slot)
    )
