"""The order of work on each rank, by rule.

A rule names only what a rank does next and with which of its chunks; which micro-batch that
is follows by counting, and a weights' gradient is the one that was put off longest ago.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from itertools import chain, count, repeat
from typing import Literal, NamedTuple, TypeAlias

from isoflop.plan.schedule.kinds import (
    DualPipe,
    DualPipeV,
    GPipe,
    Interleaved,
    OneFOneB,
    Schedule,
    ZeroBubble,
    check,
    n_chunks,
    stage_of,
)

#: Forward; the inputs' gradient; the weights' gradient put off; both gradients at once.
Kind: TypeAlias = Literal["F", "B", "W", "BW"]


class Work(NamedTuple):
    """One micro-batch's forward or backward through one stage."""

    kind: Kind
    stage: int
    micro_batch: int


class Together(NamedTuple):
    """A forward and a whole backward that a rank runs at once, one computing while the other
    communicates.
    """

    forward: Work
    backward: Work


Slot: TypeAlias = Work | Together
Order: TypeAlias = tuple[Slot, ...]

#: What a rank does next and the chunk; F+BW is a forward of the chunk together with a
#: backward of the rank's other chunk.
_Step: TypeAlias = tuple[Literal["F", "B", "W", "BW", "F+BW"], int]


def works(slot: Slot) -> tuple[Work, ...]:
    """What runs in a slot: one piece of work, or two together."""
    return (slot.forward, slot.backward) if isinstance(slot, Together) else (slot,)


def orders(schedule: Schedule, pp: int, n_micro: int) -> tuple[Order, ...]:
    """What each rank does, in order.

    Raises:
        InputError: the schedule has no order for so many ranks and micro-batches.

    >>> for order in orders(ZeroBubble(), 2, 3):
    ...     print(" ".join(f"{work.kind}{work.micro_batch}" for work in order))
    F0 F1 B0 W0 F2 B1 W1 B2 W2
    F0 B0 F1 B1 W0 F2 B2 W1 W2
    """
    check(schedule, pp, n_micro)
    return tuple(_order(schedule, pp, n_micro, rank) for rank in range(pp))


def _order(schedule: Schedule, pp: int, n_micro: int, rank: int) -> Order:
    chunks = range(n_chunks(schedule))
    stages = [stage_of(schedule, pp, rank, chunk) for chunk in chunks]
    first = [_first_micro_batch(schedule, pp, n_micro, rank, chunk) for chunk in chunks]
    forwards, backwards = [count(i) for i in first], [count(i) for i in first]
    put_off: deque[Work] = deque()
    order: list[Slot] = []
    for kind, chunk in _steps(schedule, pp, n_micro, rank):
        if kind == "W":
            order.append(put_off.popleft())
        elif kind == "F":
            order.append(Work("F", stages[chunk], next(forwards[chunk])))
        elif kind == "F+BW":
            forward = Work("F", stages[chunk], next(forwards[chunk]))
            order.append(
                Together(forward, Work("BW", stages[1 - chunk], next(backwards[1 - chunk])))
            )
        else:
            work = Work(kind, stages[chunk], next(backwards[chunk]))
            order.append(work)
            if kind == "B":
                put_off.append(work._replace(kind="W"))
    return tuple(order)


def _first_micro_batch(schedule: Schedule, pp: int, n_micro: int, rank: int, chunk: int) -> int:
    """Half of DualPipe's micro-batches enter at the last rank; all others count from zero."""
    from_the_last = isinstance(schedule, DualPipe) and (2 * rank >= pp) != (chunk == 1)
    return n_micro // 2 if from_the_last else 0


def _steps(schedule: Schedule, pp: int, n_micro: int, rank: int) -> Iterator[_Step]:
    match schedule:
        case GPipe():
            return chain(repeat(("F", 0), n_micro), repeat(("BW", 0), n_micro))
        case OneFOneB():
            return _alternating(1, n_micro, pp - 1 - rank)
        case Interleaved(virtual=virtual):
            warm = 2 * (pp - 1 - rank) + (virtual - 1) * pp
            return _alternating(virtual, n_micro, warm, group=pp)
        case ZeroBubble(ahead=ahead):
            return _zero_bubble(n_micro, ahead * (pp - 1 - rank), ahead * rank)
        case DualPipe():
            return _dual(n_micro // 2, pp // 2, min(rank, pp - 1 - rank))
        case DualPipeV():
            return _dual(n_micro, pp, rank)


def _alternating(virtual: int, n_micro: int, warm: int, group: int = 1) -> Iterator[_Step]:
    """`warm` forwards, then a forward and a backward in turn, then what backwards are left.

    A rank takes its chunks in turn, `group` micro-batches each, and backward in reverse.
    """
    turns = [chunk for chunk in range(virtual) for _ in range(group)] * (n_micro // group)
    warm = min(warm, len(turns))
    yield from (("F", chunk) for chunk in turns[:warm])
    for ahead, chunk in zip(turns[warm:], turns, strict=False):
        yield "F", ahead
        yield "BW", virtual - 1 - chunk
    yield from (("BW", virtual - 1 - chunk) for chunk in turns[len(turns) - warm :])


def _zero_bubble(n_micro: int, warm: int, put_off: int) -> Iterator[_Step]:
    """1F1B where the weights' gradients stay `put_off` micro-batches behind the inputs'."""
    yield from repeat(("F", 0), warm)
    for done in range(n_micro):
        if done + warm < n_micro:
            yield "F", 0
        yield "B", 0
        if done >= put_off:
            yield "W", 0
    yield from repeat(("W", 0), min(put_off, n_micro))


def _dual(n_micro: int, half: int, rank: int) -> Iterator[_Step]:
    """The eight phases of DualPipe on one arm of `half` ranks, `n_micro` entering this arm.

    Chunk 0 is on the way to the turn, chunk 1 on the way back; `rank` half - 1 is at the
    turn. From DeepSeek's repository, dualpipe.py, whose phases these are.
    """
    to_turn = half - 1 - rank
    yield from repeat(("F", 0), 2 * to_turn)
    for _ in range(rank + 1):
        yield from (("F", 0), ("F", 1))
    for _ in range(to_turn):
        yield from (("B", 1), ("W", 1), ("F", 1))
    for turn in range(n_micro - 2 * half + rank + 1):
        if turn == 0 and to_turn == 0:  # the first at the turn: its backward must not wait
            yield from (("F", 0), ("BW", 1))
        else:
            yield "F+BW", 0
        yield "F+BW", 1
    for _ in range(to_turn):
        yield from (("BW", 1), ("F+BW", 1))
    for step in range(2 * (rank + 1)):
        yield "BW" if step <= rank else "B", 1 - step % 2
    for _ in range(to_turn):
        yield from (("W", 0), ("B", 0))
    yield from repeat(("W", 0), rank + 1)
