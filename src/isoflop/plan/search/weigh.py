"""All layouts of a space weighed, and those that fit timed."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from isoflop.plan.memory.shard import Trained
from isoflop.plan.search.formula import Floats, Formulas
from isoflop.plan.search.space import Columns, Space, Variation
from isoflop.plan.step.setting import Setting

Rows = NDArray[np.intp]


@dataclass(frozen=True, slots=True)
class TooLarge:
    """How many layouts do not fit, and the one that comes nearest."""

    count: int = 0
    row: int = 0
    variation: int = 0
    bytes_needed: float = np.inf


@dataclass(frozen=True, slots=True)
class Timed:
    """Layouts with their memory and the seconds of a step; `enumerated` counts all there are.

    Of a split of the model of which some variation fits all are here; the others are only
    counted in `too_large`, with those here that do not fit.
    """

    row: Rows
    variation: Rows
    seconds: Floats
    bytes_held: Floats
    fits: NDArray[np.bool_]
    too_large: TooLarge

    @property
    def enumerated(self) -> int:
        return int(self.fits.sum()) + self.too_large.count


def weigh(space: Space, job: Trained, setting: Setting, room: float) -> Timed:
    """Every layout's memory, and the step time of those that take at most `room` bytes.

    `setting` gives all but the layout and the recomputation.
    """
    found = [(np.zeros(0, np.intp), np.zeros(0, np.intp), np.zeros(0), np.zeros(0))]
    large = TooLarge()
    for together in (0, 1):
        rows = np.flatnonzero(space.columns["sequence_parallel"] == together)
        if not rows.size:
            continue
        formulas = Formulas(space, job, setting, taken(space.columns, rows))
        for group in _groups(space, rows):
            held, offered = _held(formulas, group), space.applies[np.ix_(group.rows, group.which)]
            large = _nearer(large, group, held, offered & (held > room))
            found += _timed(formulas, group, np.where(offered, held, np.inf), room)
    row, variation, took, weights = (np.concatenate(part) for part in zip(*found, strict=True))
    return Timed(row, variation, took, weights, weights <= room, large)


def taken(columns: Columns, rows: Rows) -> Columns:
    return {name: column[rows] for name, column in columns.items()}


@dataclass(frozen=True, slots=True)
class Group:
    """Rows of a space, and which of its variations are tried on them."""

    space: Space
    rows: Rows
    which: Rows

    @property
    def columns(self) -> Columns:
        return taken(self.space.columns, self.rows)

    @property
    def variations(self) -> list[Variation]:
        return [self.space.variations[i] for i in self.which]


def _groups(space: Space, rows: Rows) -> Iterator[Group]:
    """Rows under 1F1B alone, as all without stages of one chunk are, and under every schedule."""
    plain = [i for i, v in enumerate(space.variations) if v.schedule == "1f1b"]
    stages = space.staged[rows]
    for own, which in ((rows[~stages], plain), (rows[stages], range(len(space.variations)))):
        if own.size and len(which):
            yield Group(space, own, np.array(which, dtype=np.intp))


def _held(formulas: Formulas, group: Group) -> Floats:
    """Bytes of a group's rows by its variations, infinite where a schedule has no order."""
    held = np.full((len(group.rows), len(group.which)), np.inf)
    schedules = [v.schedule for v in group.variations]
    for schedule in dict.fromkeys(schedules):
        runs = np.flatnonzero(group.space.runs[schedule][group.rows])
        if not runs.size:
            continue
        own = np.flatnonzero([name == schedule for name in schedules])
        columns = taken(group.space.columns, group.rows[runs])
        held[np.ix_(runs, own)] = formulas.bytes_needed(columns, schedule)
    return held


def _timed(
    formulas: Formulas, group: Group, held: Floats, room: float
) -> list[tuple[Rows, Rows, Floats, Floats]]:
    """Step times of the rows of which some variation fits."""
    some = np.flatnonzero((held <= room).any(axis=1))
    if not some.size:
        return []
    fits = replace(group, rows=group.rows[some])
    took = formulas.seconds(fits.columns, group.variations)
    at, variation = np.nonzero(np.isfinite(held[some]))
    return [(fits.rows[at], group.which[variation], took[at, variation], held[some][at, variation])]


def _nearer(known: TooLarge, group: Group, held: Floats, large: NDArray[np.bool_]) -> TooLarge:
    """The refused so far with those of more rows."""
    count = known.count + int(large.sum())
    if not large.any():
        return known
    at, variation = divmod(int(np.where(large, held, np.inf).argmin()), held.shape[1])
    if held[at, variation] >= known.bytes_needed:
        return TooLarge(count, known.row, known.variation, known.bytes_needed)
    return TooLarge(
        count, int(group.rows[at]), int(group.which[variation]), float(held[at, variation])
    )
