"""All layouts of a space weighed and timed."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from isoflop.plan.layout import offloads_under
from isoflop.plan.memory.shard import State, Trained
from isoflop.plan.search.formula import Floats, Formulas
from isoflop.plan.search.space import Columns, Space, Variation, n_accelerators
from isoflop.plan.step.setting import Setting

Rows = NDArray[np.intp]
Mask = NDArray[np.bool_]


@dataclass(frozen=True, slots=True)
class Room:
    """Bytes of an accelerator's memory, and of its host's for each accelerator that shares it."""

    accelerator: float
    host: float = np.inf


@dataclass(frozen=True, slots=True)
class TooLarge:
    """How many layouts do not fit, and the one that comes nearest."""

    count: int = 0
    row: int = 0
    variation: int = 0
    bytes_needed: float = np.inf


@dataclass(frozen=True, slots=True)
class Timed:
    """Layouts with their memory and the seconds of a step, of `evaluated` in all.

    Here are those that fit, and those that would be faster than any that fits on as many
    accelerators. `too_large` for the accelerator, or `too_large_host` for its host alone, are all
    others and some of these.
    """

    row: Rows
    variation: Rows
    seconds: Floats
    bytes_held: Floats
    bytes_host: Floats
    room: Room
    evaluated: int
    too_large: TooLarge
    too_large_host: TooLarge

    @property
    def fits(self) -> Mask:
        return (self.bytes_held <= self.room.accelerator) & (self.bytes_host <= self.room.host)


@dataclass(frozen=True, slots=True)
class Group:
    """Rows of one structure, and which of a space's variations are tried on them."""

    formulas: Formulas
    rows: Rows
    which: Rows

    @property
    def space(self) -> Space:
        return self.formulas.space

    @property
    def columns(self) -> Columns:
        return taken(self.space.columns, self.rows)

    @property
    def variations(self) -> list[Variation]:
        return [self.space.variations[i] for i in self.which]


@dataclass(frozen=True, slots=True)
class _Weighed:
    """A group's rows in its variations, and which of these there are."""

    group: Group
    offered: Mask
    held: Floats
    host: Floats
    seconds: Floats

    @property
    def rows(self) -> Rows:
        return self.group.rows

    def over(self, room: Room) -> tuple[Mask, Mask]:
        """What the accelerator has no room for, and what its host alone has none for."""
        over = self.held > room.accelerator
        return self.offered & over, self.offered & ~over & (self.host > room.host)

    def fits(self, room: Room) -> Mask:
        return self.offered & (self.held <= room.accelerator) & (self.host <= room.host)


def weigh(space: Space, job: Trained, setting: Setting, room: Room) -> Timed:
    """Every layout's memory and step time.

    `setting` gives all but the layout and the recomputation. Offloading takes time and saves
    nothing but memory: it is tried on what does not fit without, and would be faster without than
    all that fits on as many accelerators.
    """
    used = n_accelerators(space.columns)
    first = [
        _weighed(group, space.applies[np.ix_(group.rows, group.which)])
        for group in _groups(space, job, setting)
    ]
    found = list(first)
    for offload in range(1, len(space.offloads)):
        fastest = _fastest(found, used, room)
        again = [_tried(w, offload, fastest[used[w.rows]], room) for w in first]
        found += [weighed for weighed in again if weighed is not None]
    return _timed(found, used, room)


def _groups(space: Space, job: Trained, setting: Setting) -> Iterator[Group]:
    """Rows of each structure under 1F1B alone, as all without stages of one chunk are, and under
    every schedule.
    """
    plain = [i for i, v in enumerate(space.alike) if v.schedule == "1f1b"]
    for rows in _structures(space.columns):
        formulas = Formulas(space, job, setting, taken(space.columns, rows))
        stages = space.staged[rows]
        for own, which in ((rows[~stages], plain), (rows[stages], range(len(space.alike)))):
            if own.size and len(which):
                yield Group(formulas, own, np.array(which, dtype=np.intp))


def _structures(columns: Columns) -> list[Rows]:
    """The rows of each structure of the formulas."""
    code = 2 * columns["cp_by"] + columns["sequence_parallel"]
    return [np.flatnonzero(code == one) for one in np.unique(code)]


def taken(columns: Columns, rows: Rows) -> Columns:
    return {name: column[rows] for name, column in columns.items()}


def _tried(weighed: _Weighed, offload: int, fastest: Floats, room: Room) -> _Weighed | None:
    """What does not fit as it was weighed and would be the fastest, with an offload; it is given
    by its place among the space's, where what was weighed is of the first.
    """
    space = weighed.group.space
    which = weighed.group.which + offload * len(space.alike)
    legal = [offloads_under(v.offload, v.schedule) for v in (space.variations[i] for i in which)]
    tried = weighed.over(room)[0] & (weighed.seconds < fastest[:, None]) & np.array(legal)
    rows, some = (np.flatnonzero(tried.any(axis=axis)) for axis in (1, 0))
    if not rows.size:
        return None
    return _weighed(
        Group(weighed.group.formulas, weighed.rows[rows], which[some]), tried[np.ix_(rows, some)]
    )


def _weighed(group: Group, offered: Mask) -> _Weighed:
    """Bytes and seconds; bytes are infinite where a schedule has no order."""
    formulas, variations = group.formulas, group.variations
    held = np.full(offered.shape, np.inf)
    host = np.zeros(offered.shape)
    schedules = [v.schedule for v in variations]
    for schedule in dict.fromkeys(schedules):
        runs = np.flatnonzero(group.space.runs[schedule][group.rows])
        if not runs.size:
            continue
        own = np.flatnonzero([name == schedule for name in schedules])
        states: tuple[State, ...] = tuple(
            (variations[i].zero, variations[i].recompute, variations[i].offload) for i in own
        )
        columns = taken(group.space.columns, group.rows[runs])
        found = formulas.bytes_needed(columns, schedule, states)
        held[np.ix_(runs, own)] = found[:, : own.size]
        if found.shape[1] > own.size:
            host[np.ix_(runs, own)] = found[:, own.size :]
    return _Weighed(group, offered, held, host, formulas.seconds(group.columns, variations))


def _fastest(found: Sequence[_Weighed], used: NDArray[np.int64], room: Room) -> Floats:
    """Seconds of the fastest that fits, by the number of accelerators."""
    fastest = np.full(int(used.max(initial=0)) + 1, np.inf)
    for weighed in found:
        best = np.where(weighed.fits(room), weighed.seconds, np.inf).min(axis=1)
        np.minimum.at(fastest, used[weighed.rows], best)
    return fastest


def _timed(found: Sequence[_Weighed], used: NDArray[np.int64], room: Room) -> Timed:
    fastest = _fastest(found, used, room)
    parts = [(np.zeros(0, np.intp), np.zeros(0, np.intp), *np.zeros((3, 0)))]
    large, large_host = TooLarge(), TooLarge()
    for w in found:
        over, over_host = w.over(room)
        large = _nearer(large, w, w.held, over)
        large_host = _nearer(large_host, w, w.host, over_host)
        faster = w.offered & (w.seconds < fastest[used[w.rows]][:, None])
        at, v = np.nonzero(faster | w.fits(room))
        parts.append((w.rows[at], w.group.which[v], w.seconds[at, v], w.held[at, v], w.host[at, v]))
    row, variation, took, held, host = (
        np.concatenate(column) for column in zip(*parts, strict=True)
    )
    evaluated = sum(int(w.offered.sum()) for w in found)
    return Timed(row, variation, took, held, host, room, evaluated, large, large_host)


def _nearer(known: TooLarge, weighed: _Weighed, needed: Floats, large: Mask) -> TooLarge:
    """The refused so far with those of more rows."""
    count = known.count + int(large.sum())
    if not large.any():
        return known
    at, v = divmod(int(np.where(large, needed, np.inf).argmin()), needed.shape[1])
    if needed[at, v] >= known.bytes_needed:
        return TooLarge(count, known.row, known.variation, known.bytes_needed)
    variation = int(weighed.group.which[v])
    return TooLarge(count, int(weighed.rows[at]), variation, float(needed[at, v]))
