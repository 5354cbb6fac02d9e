"""All layouts of a space weighed, and those that fit timed."""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import product

import numpy as np
from numpy.typing import NDArray

from isoflop.plan.memory.shard import Trained
from isoflop.plan.search.formula import Floats, bytes_needed, seconds
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
    for together, schedule in product((0, 1), space.schedules):
        alike = space.columns["sequence_parallel"] == together
        rows = np.flatnonzero(alike & space.runs(space.columns, schedule))
        if not rows.size:
            continue
        own = [i for i, v in enumerate(space.variations) if v.schedule == schedule]
        group = Alike(space, rows, np.array(own))
        held = bytes_needed(space, job, group.columns, group.variations)
        offered = space.applies(group.columns)[:, group.which]
        large = _nearer(large, group, held, offered & (held > room))
        found += _timed(group, setting, np.where(offered, held, np.inf), room)
    row, variation, took, weights = (np.concatenate(part) for part in zip(*found, strict=True))
    return Timed(row, variation, took, weights, weights <= room, large)


@dataclass(frozen=True, slots=True)
class Alike:
    """Rows of a space that share a structure, and which of its variations are tried on them."""

    space: Space
    rows: Rows
    which: Rows

    @property
    def columns(self) -> Columns:
        return {name: column[self.rows] for name, column in self.space.columns.items()}

    @property
    def variations(self) -> list[Variation]:
        return [self.space.variations[i] for i in self.which]


def _timed(
    group: Alike, setting: Setting, held: Floats, room: float
) -> list[tuple[Rows, Rows, Floats, Floats]]:
    """Step times of rows of one structure of which some variation fits."""
    some = np.flatnonzero((held <= room).any(axis=1))
    if not some.size:
        return []
    fits = replace(group, rows=group.rows[some])
    took = seconds(group.space, setting, fits.columns, group.variations)
    at, variation = np.nonzero(np.isfinite(held[some]))
    return [(fits.rows[at], group.which[variation], took[at, variation], held[some][at, variation])]


def _nearer(known: TooLarge, group: Alike, held: Floats, large: NDArray[np.bool_]) -> TooLarge:
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
