"""What a training plan is asked for, and what is wrong with a question."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Self

from isoflop.count.blocks import beside
from isoflop.count.memory_saved import FLASH, KERNELS, RECOMPUTES
from isoflop.errors import Problem
from isoflop.hardware import Chip, Cluster
from isoflop.hardware.chip import Precision as Format
from isoflop.hardware.fitted import Beliefs, shipped
from isoflop.hardware.stack import find_stack
from isoflop.plan.ask import at_most, one_of, whole
from isoflop.plan.economics import unstated
from isoflop.plan.goodput import Trouble
from isoflop.plan.layout import Layout
from isoflop.plan.memory.shard import Trained
from isoflop.plan.step.setting import Setting
from isoflop.plan.training.work import COUNTINGS, STATES, Work
from isoflop.quantity import Expr, Symbol

#: The stack whose constants have the widest ranges.
UNKNOWN = "unknown"


@dataclass(frozen=True, slots=True)
class TrainAsk:
    """What a training plan is asked for; `plan_train` says what each field means.

    `may_recompute`: where the layout is open, so is recomputation, whatever `work` has.
    `trouble` None: it is as assumed, and within a rate that is given. `chosen` says in words
    what was left open and filled in by whoever asks.
    """

    work: Work
    cluster: Cluster
    global_batch: int
    precision: Format = "bf16"
    micro_batch: int | None = None
    layout: Layout | None = None
    mfu: float | None = None
    tflops: float | None = None
    price: float | None = None
    watts: float | None = None
    pue: float | None = None
    carbon: float | None = None
    stack: str | None = None
    beliefs: Beliefs = field(default_factory=shipped)
    trouble: Trouble | None = None
    may_recompute: bool = False
    chosen: tuple[str, ...] = ()

    @property
    def rate_given(self) -> bool:
        """Whether the user knows how fast the run is."""
        return self.mfu is not None or self.tflops is not None

    @property
    def failures(self) -> Trouble | None:
        """What comes on top of the steps."""
        return Trouble() if self.trouble is None and not self.rate_given else self.trouble

    @property
    def tightest(self) -> Self:
        """The same question with all the recomputation that the planner may choose."""
        if not self.may_recompute:
            return self
        return replace(self, work=replace(self.work, recompute="full"), may_recompute=False)

    def setting(self, layout: Layout) -> Setting:
        """One step under a layout, as its time is computed."""
        return Setting(self.work.arch, self.cluster, layout, self.work.seq_len, self.global_batch,
                       compute=self.precision,  # type: ignore[arg-type]  # problems_of lists what may be computed in
                       recompute=self.work.recompute,
                       stack=self.stack or UNKNOWN,
                       beliefs=self.beliefs)  # fmt: skip

    @property
    def n_steps(self) -> Expr:
        """Steps of the run, the last of which may be part of one."""
        per_step = self.global_batch * self.work.seq_len
        return Symbol("tokens", self.work.tokens) / Symbol("tokens_per_step", per_step)

    @property
    def job(self) -> Trained:
        """One micro-batch, as memory sees it; a layout given brings its own, a stack its kernels."""
        n = self.layout.micro_batch if self.layout is not None else self.micro_batch or 1
        work = self.work
        unfused = self.stack is not None and find_stack(self.stack).attention == "unfused"
        return Trained(work.arch, work.batch(n), STATES[self.precision], work.recompute,
                       KERNELS["korthikanti"] if unfused else FLASH)  # fmt: skip


def problems_of(ask: TrainAsk) -> list[Problem]:
    """What is wrong with a question, its layout aside."""
    chip, pue = ask.cluster.chip, ask.pue
    return [
        *_check_work(ask),
        *_check_towers(ask.work),
        *one_of("precision", ask.precision, STATES),
        *one_of("recompute", ask.work.recompute, RECOMPUTES),
        *one_of("convention", ask.work.convention, COUNTINGS),
        *_check_rate(chip, ask.precision, ask.mfu, ask.tflops),
        *_check_stack(ask),
        *unstated(chip, price=ask.price, watts=ask.watts),
        *([] if pue is None or pue >= 1 else [Problem("pue", pue, "is at least 1, all energy over the machines' own")]),
    ]  # fmt: skip


def _check_work(ask: TrainAsk) -> list[Problem]:
    work = ask.work
    micro_batch = ask.layout.micro_batch if ask.layout is not None else ask.micro_batch or 1
    bad = [
        *whole("tokens", work.tokens, 10**18),
        *whole("seq_len", work.seq_len, work.arch.max_seq_len),
        *whole("global_batch", ask.global_batch, 10**9),
        *whole("micro_batch", micro_batch, 10**9),
    ]
    if not bad and ask.global_batch % micro_batch:
        bad.append(Problem("micro_batch", micro_batch, f"divides global_batch={ask.global_batch}"))
    return bad


def _check_towers(work: Work) -> list[Problem]:
    """Lengths of what a tower reads are given where there is one."""
    bad = []
    encoder, vision = work.arch.encoder, work.arch.vision
    if encoder is not None:
        bad += whole("source_len", work.source_len or work.seq_len, encoder.max_seq_len)
    elif work.source_len is not None:
        bad.append(Problem("source_len", work.source_len, "is given where there is an encoder"))
    if vision is not None:
        bad += whole("images", work.images, 10**6)
    elif work.images != 1:
        bad.append(Problem("images", work.images, "is given where there is a vision tower"))
    return bad


def _check_stack(ask: TrainAsk) -> list[Problem]:
    """A stack's step times stand alone, and are those of a decoder."""
    if ask.stack is None:
        return []
    bad = []
    if ask.rate_given:
        bad.append(Problem("stack", ask.stack, "is not given together with mfu or tflops"))
    find_stack(ask.stack)
    return [*bad, *beside(ask.work.arch, "is none where a stack's step time is asked for")]


def _check_rate(
    chip: Chip, precision: Format, mfu: float | None, tflops: float | None
) -> list[Problem]:
    if mfu is not None and tflops is not None:
        return [Problem("mfu", mfu, "is not given together with tflops", "give one of them")]
    if precision not in chip.peaks:
        return []  # `Chip.peak` says it better
    peak = float(chip.peaks[precision].value) / 1e12
    return [
        *at_most("mfu", mfu, 1, "all of the peak"),
        *at_most("tflops", tflops, peak, f"the peak of {chip.name} in {precision}"),
    ]
