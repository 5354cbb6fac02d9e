"""Pipeline schedules as values, where each runs its stages, and what each asks for."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, TypeAlias

from isoflop.errors import InputError, Problem


@dataclass(frozen=True, slots=True)
class GPipe:
    """All forwards, then all backwards (Huang 2018, 1811.06965, figure 2c)."""


@dataclass(frozen=True, slots=True)
class OneFOneB:
    """A backward as soon as there is one, then a forward (Narayanan 2021, 2104.04473, 2.2.1)."""


@dataclass(frozen=True, slots=True)
class Interleaved:
    """1F1B with `virtual` chunks of layers on each rank (Narayanan 2021, 2104.04473, 2.2.2)."""

    virtual: int = 2


@dataclass(frozen=True, slots=True)
class ZeroBubble:
    """1F1B with the weights' gradients put off into the bubble (Qi 2023, 2401.10241).

    `ahead` 1 is ZB-H1, which keeps 1F1B's memory (section 2.1); 2 is ZB-H2, which runs twice
    as many forwards ahead and has no bubble where F, B and W take equally long (section 2.2).
    """

    ahead: Literal[1, 2] = 1


@dataclass(frozen=True, slots=True)
class DualPipe:
    """Micro-batches enter from both ends, each rank holds two stages, and a forward runs
    together with a backward (DeepSeek-V3, 2412.19437, section 3.2.1).
    """


@dataclass(frozen=True, slots=True)
class DualPipeV:
    """DualPipe cut in half: a V of two chunks, so that weights are held once (DeepSeek's
    repository DualPipe; Qi 2025, "DualPipe could be better without the Dual").
    """


Schedule: TypeAlias = GPipe | OneFOneB | Interleaved | ZeroBubble | DualPipe | DualPipeV

#: How a layout names a schedule; 1F1B of several chunks is interleaved.
ScheduleName: TypeAlias = Literal["1f1b", "gpipe", "zb-h1", "zb-h2", "dualpipe", "dualpipev"]
SCHEDULES: Mapping[ScheduleName, Schedule] = {
    "1f1b": OneFOneB(),
    "gpipe": GPipe(),
    "zb-h1": ZeroBubble(1),
    "zb-h2": ZeroBubble(2),
    "dualpipe": DualPipe(),
    "dualpipev": DualPipeV(),
}

#: Those that put weights' gradients off.
PUT_OFF: frozenset[ScheduleName] = frozenset({"zb-h1", "zb-h2", "dualpipe", "dualpipev"})

SOURCES: Mapping[ScheduleName, str] = {
    "1f1b": "Narayanan 2021 (2104.04473), section 2.2",
    "gpipe": "Huang 2018 (1811.06965), section 2.3",
    "zb-h1": "Qi 2023 (2401.10241), section 2.1",
    "zb-h2": "Qi 2023 (2401.10241), section 2.2",
    "dualpipe": "DeepSeek-V3 (2412.19437), section 3.2.1",
    "dualpipev": 'Qi 2025, "DualPipe could be better without the Dual"',
}


def n_chunks(schedule: Schedule) -> int:
    """Stages that one rank holds.

    >>> n_chunks(Interleaved(4)), n_chunks(DualPipe()), n_chunks(OneFOneB())
    (4, 2, 1)
    """
    match schedule:
        case Interleaved(virtual=virtual):
            return virtual
        case DualPipe() | DualPipeV():
            return 2
        case _:
            return 1


def n_stages(schedule: Schedule, pp: int) -> int:
    """Stages that a micro-batch passes; DualPipe holds each of them twice."""
    return pp if isinstance(schedule, DualPipe) else pp * n_chunks(schedule)


def stage_of(schedule: Schedule, pp: int, rank: int, chunk: int) -> int:
    """The stage that a rank's chunk is.

    >>> [stage_of(DualPipeV(), 4, rank, 1) for rank in range(4)]
    [7, 6, 5, 4]
    """
    match schedule:
        case DualPipeV():
            return rank if chunk == 0 else 2 * pp - 1 - rank
        case DualPipe():
            # Chunk 0 takes what enters at the rank's own end, chunk 1 what enters opposite.
            return min(rank, pp - 1 - rank) if chunk == 0 else max(rank, pp - 1 - rank)
        case _:
            return chunk * pp + rank


def stages_of(schedule: Schedule, pp: int, rank: int) -> tuple[int, ...]:
    """The stages that a rank holds, in the order of its chunks.

    >>> stages_of(DualPipe(), 4, 1), stages_of(DualPipeV(), 4, 1), stages_of(Interleaved(2), 4, 1)
    ((1, 2), (1, 6), (1, 5))
    """
    return tuple(stage_of(schedule, pp, rank, chunk) for chunk in range(n_chunks(schedule)))


def broken_rules(schedule: Schedule, pp: int, n_micro: int) -> list[Problem]:
    """What a schedule asks of the pipeline; none broken means that its order exists.

    >>> for problem in broken_rules(DualPipe(), 5, 7):
    ...     print(problem)
    pp=5: must be even: ranks of DualPipe work in pairs
    n_micro=7: must be even: half of them enter at each end
    n_micro=7: must be at least 2 * pp = 10
    """
    low = [Problem(n, v, "is at least 1") for n, v in (("pp", pp), ("n_micro", n_micro)) if v < 1]
    return low or [Problem(f, v, rule) for f, v, rule, holds in _rules(schedule, pp, n_micro)
                   if not holds]  # fmt: skip


def _rules(schedule: Schedule, pp: int, n_micro: int) -> list[tuple[str, int, str, bool]]:
    match schedule:
        case Interleaved(virtual=virtual):
            return [
                ("pp", pp, "is at least 2 where ranks hold several chunks", pp >= 2),
                ("virtual", virtual, "is at least 2, or else the schedule is 1F1B", virtual >= 2),
                ("n_micro", n_micro, f"is a multiple of pp = {pp}", n_micro % pp == 0),
            ]
        case ZeroBubble(ahead=ahead):
            least = ahead * (pp - 1) + 1
            return [
                ("ahead", ahead, "is 1 (ZB-H1) or 2 (ZB-H2)", ahead in (1, 2)),
                ("n_micro", n_micro, f"is at least {least}, which rank 0 runs ahead",
                 n_micro >= least),
            ]  # fmt: skip
        case DualPipe():
            return [
                ("pp", pp, "is even: ranks of DualPipe work in pairs", pp % 2 == 0),
                ("n_micro", n_micro, "is even: half of them enter at each end", n_micro % 2 == 0),
                ("n_micro", n_micro, f"is at least 2 * pp = {2 * pp}", n_micro >= 2 * pp),
            ]
        case DualPipeV():
            return [("n_micro", n_micro, f"is at least 2 * pp = {2 * pp}", n_micro >= 2 * pp)]
        case _:
            return []


def check(schedule: Schedule, pp: int, n_micro: int) -> None:
    """Raise InputError with every rule that the schedule breaks."""
    if bad := broken_rules(schedule, pp, n_micro):
        raise InputError("schedule", bad)


def schedule_rules(name: ScheduleName, n_layers: int, pp: int, n_micro: int) -> list[Problem]:
    """What a schedule asks of a pipeline of several stages.

    >>> print(*schedule_rules("dualpipev", n_layers=6, pp=4, n_micro=4), sep="; ")
    pp=4: must hold: times 2 is at most n_layers=6; n_micro=4: must be at least 2 * pp = 8
    """
    schedule, broken = SCHEDULES[name], []
    if isinstance(schedule, DualPipeV) and 2 * pp > n_layers:
        broken.append(Problem("pp", pp, f"times 2 is at most n_layers={n_layers}"))
    return broken + broken_rules(schedule, pp, n_micro)
