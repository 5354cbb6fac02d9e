"""All layouts of a space weighed and timed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from isoflop.count.memory_split import Offload
from isoflop.plan.memory.shard import Trained
from isoflop.plan.search.formula import Floats, bytes_needed, seconds
from isoflop.plan.search.space import Columns, Space, n_accelerators
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
class _Weighed:
    """Rows of one structure in the variations from `first` on, and which of these there are."""

    rows: Rows
    first: int
    offered: Mask
    held: Floats
    host: Floats
    seconds: Floats

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
    plain, *others = space.offloads
    first = [
        _weighed(space, job, setting, rows, plain, space.applies(taken(space.columns, rows)))
        for rows in _structures(space.columns)
    ]
    all_found = list(first)
    for offload in others:
        fastest = _fastest(all_found, used, room)
        for weighed in first:
            better = weighed.seconds < fastest[used[weighed.rows]][:, None]
            tried = weighed.over(room)[0] & better
            some = np.flatnonzero(tried.any(axis=1))
            if some.size:
                rows = weighed.rows[some]
                all_found.append(_weighed(space, job, setting, rows, offload, tried[some]))
    return _timed(all_found, used, room)


def _structures(columns: Columns) -> list[Rows]:
    """The rows of each structure of the formulas."""
    code = 2 * columns["cp_by"] + columns["sequence_parallel"]
    return [np.flatnonzero(code == one) for one in np.unique(code)]


def taken(columns: Columns, rows: Rows) -> Columns:
    return {name: column[rows] for name, column in columns.items()}


def _weighed(
    space: Space, job: Trained, setting: Setting, rows: Rows, offload: Offload, offered: Mask
) -> _Weighed:
    where, columns = space.offloading(offload), taken(space.columns, rows)
    variations = space.variations[where]
    held, host = bytes_needed(space, job, columns, variations)
    took = seconds(space, setting, columns, variations)
    return _Weighed(rows, where.start, offered, held, host, took)


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
        parts.append((w.rows[at], w.first + v, w.seconds[at, v], w.held[at, v], w.host[at, v]))
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
    return TooLarge(count, int(weighed.rows[at]), weighed.first + v, float(needed[at, v]))
