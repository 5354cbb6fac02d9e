"""A schedule run event by event: when each rank does what, and where it waits."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import NamedTuple, TypeAlias

from isoflop.errors import InputError, Problem
from isoflop.plan.schedule.orders import Order, Slot, Together, Work, works
from isoflop.quantity.expr import Value


@dataclass(frozen=True, slots=True)
class Durations:
    """Seconds of one micro-batch's work on each stage, and between stages.

    `seconds_backward` is the whole backward; `seconds_weight` is the part of it that makes
    the weights' gradients, which zero-bubble schedules put off. `seconds_send` passes before
    what one rank made is at the next; the sender works on meanwhile, unless `sends_hold` it.
    `seconds_hidden` is what a forward and a backward save when they run together, and neither
    can hide more than itself.

    Raises:
        InputError: rows of unequal length, a negative time, weights' gradients that take
            longer than the backward that they are part of.
    """

    seconds_forward: Sequence[Value]
    seconds_backward: Sequence[Value]
    seconds_weight: Sequence[Value]
    seconds_send: Value = 0
    seconds_hidden: Value = 0
    sends_hold: bool = False

    def __post_init__(self) -> None:
        if bad := [Problem(f, v, rule) for f, v, rule, holds in self._rules() if not holds]:
            raise InputError("durations", bad)

    def _rules(self) -> Iterator[tuple[str, object, str, bool]]:
        f, b, w = self.seconds_forward, self.seconds_backward, self.seconds_weight
        for name, row in (("seconds_forward", f), ("seconds_backward", b), ("seconds_weight", w)):
            yield name, row, f"has one time for each of {len(f)} stages", len(row) == len(f) > 0
            yield name, row, "is nowhere below 0", min(row, default=0) >= 0
        part = all(weight <= whole for weight, whole in zip(w, b, strict=False))
        yield "seconds_weight", w, "is part of seconds_backward", part
        yield "seconds_send", self.seconds_send, "is at least 0", self.seconds_send >= 0
        yield "seconds_hidden", self.seconds_hidden, "is at least 0", self.seconds_hidden >= 0

    @classmethod
    def equal(
        cls,
        n_stages: int,
        forward: Value,
        backward: Value,
        weight: Value = 0,
        *,
        send: Value = 0,
        hidden: Value = 0,
    ) -> Durations:
        """Stages that all take equally long."""
        f, b, w = ((seconds,) * n_stages for seconds in (forward, backward, weight))
        return cls(f, b, w, send, hidden)

    def of(self, slot: Slot) -> Value:
        """Seconds that a slot keeps its rank busy, sends aside."""
        if isinstance(slot, Together):
            forward, backward = self.of(slot.forward), self.of(slot.backward)
            return forward + backward - min(self.seconds_hidden, forward, backward)
        kind, stage, _ = slot
        if kind == "F":
            return self.seconds_forward[stage]
        if kind == "W":
            return self.seconds_weight[stage]
        whole = self.seconds_backward[stage]
        return whole if kind == "BW" else whole - self.seconds_weight[stage]


class Span(NamedTuple):
    """From when to when a rank did what."""

    start: Value
    end: Value
    slot: Slot


@dataclass(frozen=True, slots=True)
class Simulation:
    """What each rank did when; times count from the first forward's start."""

    spans: tuple[tuple[Span, ...], ...]

    @property
    def seconds(self) -> Value:
        """From the first forward to the end of the last rank's work: a step whose optimizer
        waits for all ranks.
        """
        return max(row[-1].end for row in self.spans)

    @property
    def seconds_longest_rank(self) -> Value:
        """The longest from one rank's own first work to its last: what a step costs where
        ranks begin the next one without waiting for all (Qi 2023, 2401.10241, section 4).
        """
        return max(row[-1].end - row[0].start for row in self.spans)

    def busy(self, rank: int) -> Value:
        """Seconds that a rank works, and is held by its sends."""
        return sum(span.end - span.start for span in self.spans[rank])

    def idle(self, rank: int) -> Value:
        return self.seconds - self.busy(rank)

    @property
    def bubble(self) -> Value:
        """The idle share of all ranks' time, (p - 1) / (m + p - 1) for 1F1B; exact where
        the durations are.
        """
        ranks = range(len(self.spans))
        return Fraction(1) * sum(map(self.idle, ranks)) / (len(ranks) * self.seconds)


#: A finished forward ("F") or gradient of the inputs ("B") of one stage and micro-batch.
_Result: TypeAlias = tuple[str, int, int]


def simulate(orders: Sequence[Order], durations: Durations) -> Simulation:
    """Run the orders: each rank takes its work in turn, as soon as its inputs are there.

    A stage's forward needs the stage before; its backward its own forward and the backward
    of the stage behind. Time and work grow with the number of slots alone.

    Raises:
        InputError: an order that cannot run to its end, with what each stuck rank waits for.

    >>> from isoflop.plan.schedule.kinds import OneFOneB
    >>> from isoflop.plan.schedule.orders import orders
    >>> step = simulate(orders(OneFOneB(), 4, 8), Durations.equal(4, forward=1, backward=2))
    >>> step.seconds, step.bubble
    (33, Fraction(3, 11))
    """
    last = len(durations.seconds_forward) - 1
    seconds = _seconds_held(orders, durations) if durations.sends_hold else durations.of
    send = 0 if durations.sends_hold else durations.seconds_send
    spans: list[list[Span]] = [[] for _ in orders]
    done: dict[_Result, tuple[Value, int]] = {}
    awaited: dict[_Result, int] = {}
    ready = list(range(len(orders)))

    def work_through(rank: int) -> Iterator[_Result]:
        """Do a rank's work; yield what is missing whenever there is no going on."""
        now: Value = 0
        for slot in orders[rank]:
            start = now
            for need in _needs(slot, last):
                while need not in done:
                    yield need
                end, by = done[need]
                start = max(start, end if by == rank else end + send)
            now = start + seconds(slot)
            spans[rank].append(Span(start, now, slot))
            for result in _results(slot):
                done[result] = now, rank
                if result in awaited:
                    ready.append(awaited.pop(result))

    ranks = [work_through(rank) for rank in range(len(orders))]
    while ready:
        rank = ready.pop()
        if missing := next(ranks[rank], None):
            awaited[missing] = rank
    _check_all_ran(orders, spans, last, done)
    return Simulation(tuple(map(tuple, spans)))


def _needs(slot: Slot, last: int) -> tuple[_Result, ...]:
    """What must be there before a slot can start."""
    if isinstance(slot, Together):
        return _needs(slot.forward, last) + _needs(slot.backward, last)
    kind, stage, i = slot
    if kind == "F":
        return (("F", stage - 1, i),) if stage else ()
    if kind == "W":
        return (("B", stage, i),)
    return (("F", stage, i),) if stage == last else (("F", stage, i), ("B", stage + 1, i))


def _results(slot: Slot) -> tuple[_Result, ...]:
    """What others may need of a slot once it is done."""
    if isinstance(slot, Together):
        return _results(slot.forward) + _results(slot.backward)
    if slot.kind == "W":
        return ()
    return (("F" if slot.kind == "F" else "B", slot.stage, slot.micro_batch),)


def _seconds_held(orders: Sequence[Order], durations: Durations) -> Callable[[Slot], Value]:
    """Seconds of a slot together with sending each result that another rank takes."""
    home = {
        (work.stage, work.micro_batch): rank
        for rank, order in enumerate(orders)
        for slot in order
        for work in works(slot)
    }

    def seconds(slot: Slot) -> Value:
        moves = (((s, i), (s + 1 if kind == "F" else s - 1, i)) for kind, s, i in _results(slot))
        sends = sum(home.get(taker, home[maker]) != home[maker] for maker, taker in moves)
        return durations.of(slot) + sends * durations.seconds_send

    return seconds


def _check_all_ran(
    orders: Sequence[Order],
    spans: Sequence[Sequence[Span]],
    last: int,
    done: Collection[_Result],
) -> None:
    """Raise InputError where ranks wait for each other, or for what nobody does."""
    waiting = [
        (rank, order[len(row)])
        for rank, (order, row) in enumerate(zip(orders, spans, strict=True))
        if len(row) < len(order)
    ]
    stuck = [
        Problem(
            f"rank {rank}",
            " and ".join(map(_name, works(slot))),
            f"runs after {_name(next(n for n in _needs(slot, last) if n not in done))}",
            "no rank reaches that: move it ahead, or add it",
        )
        for rank, slot in waiting
    ]
    if stuck:
        raise InputError("orders", stuck)


def _name(work: Work | _Result) -> str:
    kind, stage, micro_batch = work
    return f"{kind} of stage {stage}, micro-batch {micro_batch}"
