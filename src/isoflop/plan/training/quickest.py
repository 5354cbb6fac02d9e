"""The quickest layout of a short list, timed by the formula of its step.

The list holds what trainers usually run: every split that `legal_layouts` offers, a few sizes
of micro-batch and numbers of chunks, ZeRO 1 and 3. `plan/search` looks at all there are, and
runs the best event by event; it needs numpy, and seconds.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, Literal, TypeAlias

from isoflop.count.blocks import Part, describe
from isoflop.count.memory_saved import RECOMPUTES, Recompute
from isoflop.plan.layout import Layout, broken_rules, legal_layouts
from isoflop.plan.memory.flight import Share, in_flight, shares_unlike
from isoflop.plan.memory.formula import Content
from isoflop.plan.memory.place import weigh
from isoflop.plan.memory.refusal import Refusal
from isoflop.plan.memory.shard import memory_training_varied, shards_of
from isoflop.plan.step.seconds import step_time
from isoflop.plan.step.setting import Setting
from isoflop.plan.step.sizes import SIZES, sizes_of
from isoflop.plan.training.ask import TrainAsk
from isoflop.quantity import Expr
from isoflop.quantity.compile import compile_expressions
from isoflop.quantity.units import format_bytes

#: Sequences of a micro-batch, and chunks of layers on a stage, that are tried.
MICRO_BATCHES = (1, 2, 4, 8, 16)
CHUNKS = (1, 2, 4, 8)
#: A context-parallel rank keeps at least so many tokens, as in a search of all layouts.
TOKENS_CONTEXT = 2048
#: A layout leaves at most one accelerator in this many idle, where any does.
IDLE_ONE_IN = 8
#: Faster layouts that do not fit, kept with their bytes: those that come nearest.
MOST_REFUSED = 3

Compiled: TypeAlias = Callable[..., tuple[Any, ...]]


@dataclass(frozen=True, slots=True)
class Timed:
    """A layout with what it makes again, and the seconds of its step."""

    layout: Layout
    recompute: Recompute
    seconds: float

    def __str__(self) -> str:
        return f"{self.layout} recompute={self.recompute}"

    def to_json(self) -> dict[str, Any]:
        return {"layout": self.layout.to_json(), "recompute": self.recompute,
                "seconds_step": self.seconds}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Ranking:
    """The quickest that fits, the next, how many were timed, and what would be quicker.

    `refused` are the nearest of the `n_refused` that are quicker than the best and do not fit.
    """

    best: Timed
    runner_up: Timed | None
    n_timed: int
    n_refused: int
    refused: tuple[Refusal, ...]

    def to_json(self) -> dict[str, Any]:
        second = self.runner_up
        return {
            "timed": self.n_timed,
            "quicker_refused": self.n_refused,
            "best": self.best.to_json(),
            "runner_up": None if second is None else second.to_json(),
        }

    @property
    def why(self) -> str:
        """What the best is the quickest of, and what the next loses by."""
        text = f"the quickest of {self.n_timed:,} layouts timed"
        second = self.runner_up
        if second is None:
            return f"{text}, and the only one weighed that fits"
        return f"{text}; next {second}: {second.seconds / self.best.seconds - 1:.1%} more time"

    @property
    def binding(self) -> str:
        """What kept a quicker layout out."""
        if not self.refused:
            return f"compute: none of the {self.n_timed:,} layouts timed is quicker"
        nearest = self.refused[0]
        return (
            f"memory: {self.n_refused:,} quicker layouts do not fit, the nearest by "
            f"{format_bytes(nearest.bytes_over)}: {nearest}"
        )


def quickest(ask: TrainAsk) -> Ranking | None:
    """The quickest layout of the list for a question whose layout is open; None where none fits.

    Making more again never saves time, so a layout is weighed only while what it takes at
    least is below the second of those that fit.

    Raises:
        InputError: the step of such a model on such a machine cannot be timed.

    >>> from isoflop.arch.zoo import entry
    >>> from isoflop.hardware import parse_cluster
    >>> from isoflop.plan.training.work import Work
    >>> ask = TrainAsk(Work(entry("llama-3-8b").arch, 10**12, 8192), parse_cluster("64xh100-sxm"), 512)
    >>> found = quickest(replace(ask, may_recompute=True))
    >>> found.best.seconds <= found.runner_up.seconds, found.best.layout.n_accelerators
    (True, 64)
    """
    layouts = tuple(listed(ask))
    if not layouts:
        return None
    clock, scale = _Clock(ask, layouts), _Scale(ask, layouts)
    room = float(ask.cluster.chip.bytes_memory.value)
    first, fits, large = clock.policies[0], list[Timed](), list[tuple[Timed, float]]()
    n_timed = len(layouts)
    for least, at in sorted((clock.seconds(one, first), i) for i, one in enumerate(layouts)):
        if len(fits) == 2 and least >= fits[1].seconds:
            break
        for policy in clock.policies:
            timed = Timed(layouts[at], policy, clock.seconds(layouts[at], policy))
            n_timed += policy != first
            if len(fits) == 2 and timed.seconds >= fits[1].seconds:
                break
            if (over := scale.bytes_held(timed.layout, policy) - room) <= 0:
                fits = sorted([*fits, timed], key=lambda t: t.seconds)[:2]
                break
            large.append((timed, over))
    if not fits:
        return None
    quicker = sorted((over, i) for i, (t, over) in enumerate(large) if t.seconds < fits[0].seconds)
    refused = tuple(_refusal(ask, large[i][0]) for _, i in quicker[:MOST_REFUSED])
    return Ranking(fits[0], fits[1] if len(fits) > 1 else None, n_timed, len(quicker), refused)


def listed(ask: TrainAsk) -> Iterator[Layout]:
    """The layouts of the list; idle accelerators only where nothing else is legal."""
    found = [layout for n in _micro_batches(ask) for layout in _split(ask, n)]
    count = ask.cluster.count
    busy = [one for one in found if IDLE_ONE_IN * (count - one.n_accelerators) <= count]
    for layout in busy or found:
        yield from _chunked(ask, layout)


def _micro_batches(ask: TrainAsk) -> Sequence[int]:
    if ask.micro_batch is not None:
        return (ask.micro_batch,)
    return [n for n in MICRO_BATCHES if ask.global_batch % n == 0]


def _split(ask: TrainAsk, micro_batch: int) -> Iterator[Layout]:
    """What is offered, ZeRO 1 standing for 0, which sends as much and holds more."""
    work = ask.work
    for layout in legal_layouts(work.arch, ask.cluster, ask.global_batch, micro_batch, work.seq_len,
                                tokens_per_context_rank=TOKENS_CONTEXT):  # fmt: skip
        if layout.zero in ((1, 3) if layout.dp * layout.cp > 1 else (0,)):
            yield layout


def _chunked(ask: TrainAsk, layout: Layout) -> Iterator[Layout]:
    yield layout
    work, stage = ask.work, ask.work.arch.n_layers // layout.pp
    for virtual in sorted({*CHUNKS, stage} - {1}) if layout.pp > 1 else ():
        more = replace(layout, virtual=virtual)
        if virtual <= stage and not broken_rules(
            more, work.arch, ask.cluster, ask.global_batch, work.seq_len
        ):
            yield more


def _refusal(ask: TrainAsk, timed: Timed) -> Refusal:
    """The refusal of a layout that does not fit, from the formulas that print."""
    job = replace(ask.job, work=ask.work.batch(timed.layout.micro_batch), recompute=timed.recompute)
    refusal = weigh(job, timed.layout, ask.cluster, ask.global_batch)[1]
    assert refusal is not None, timed
    return refusal


@dataclass(frozen=True)
class _Formulas:
    """Formulas compiled once for all layouts that they serve."""

    ask: TrainAsk
    layouts: Sequence[Layout]
    compiled: dict[object, Compiled] = field(default_factory=dict)

    @cached_property
    def policies(self) -> tuple[Recompute, ...]:
        """What may be made again, the least first."""
        return RECOMPUTES if self.ask.may_recompute else (self.ask.work.recompute,)

    def run(self, key: object, formula: Callable[[], Expr], over: Sequence[str]) -> Compiled:
        if key not in self.compiled:
            self.compiled[key] = compile_expressions([formula()], over)
        return self.compiled[key]

    def template(self, zero: Literal[0, 1, 2, 3]) -> Layout:
        """A layout with the structure of all: above 1 is what is in any, out of a domain too."""
        cluster = self.ask.cluster
        used = max(layout.n_accelerators for layout in self.layouts)
        domain = cluster.per_node or cluster.chip.per_node
        wide = 2 * domain if used > domain else 2
        many = {"tp": 2, "ep": 2, "virtual": 2, "pp": wide, "dp": wide, "cp": wide}
        above = {n: most if any(getattr(one, n) > 1 for one in self.layouts) else 1
                 for n, most in many.items()}  # fmt: skip
        return Layout(**above, zero=zero)  # type: ignore[arg-type]  # sizes by field

    def sizes(self, layout: Layout) -> list[int]:
        return list(sizes_of(layout, self.ask.global_batch).values())

    def setting(self, layout: Layout, policy: Recompute) -> Setting:
        return replace(self.ask.setting(layout), recompute=policy)


class _Clock(_Formulas):
    def seconds(self, layout: Layout, policy: Recompute) -> float:
        def formula() -> Expr:
            return step_time(self.setting(self.template(layout.zero), policy)).total

        run = self.run((layout.zero, policy), formula, SIZES)
        return float(run(*self.sizes(layout))[0])


@dataclass(frozen=True)
class _Scale(_Formulas):
    known: dict[tuple[int, int], dict[int, Share]] = field(default_factory=dict)

    @cached_property
    def root(self) -> Part:
        return describe(self.ask.work.arch, self.ask.job.work)

    def bytes_held(self, layout: Layout, policy: Recompute) -> float:
        """Of the fullest stage."""
        sizes, stages = self.sizes(layout), self.stages(layout.pp, layout.virtual)
        return max(
            float(self._run(content, layout.zero, policy)(
                *sizes, stage, *content.counted(share).values())[0])
            for stage, share in stages.items() for content in [Content.of(share)]
        )  # fmt: skip

    def stages(self, pp: int, virtual: int) -> dict[int, Share]:
        """What stages hold that may hold most."""
        if (pp, virtual) not in self.known:
            layout = Layout(pp=pp, virtual=virtual)
            self.known[pp, virtual] = shares_unlike(self.ask.work.arch, layout)
        return self.known[pp, virtual]

    def _run(self, content: Content, zero: Literal[0, 1, 2, 3], policy: Recompute) -> Compiled:
        def formula() -> Expr:
            template = self.template(zero)
            flight = in_flight(template, shards_of(template), 0, 1)
            trees = memory_training_varied(
                self.ask.job, self.root, template, content.share, flight, [(zero, policy, "none")]
            )
            return trees[0].total

        return self.run((content, zero, policy), formula, (*SIZES, "stage", *content.counts))
