"""All layouts of a space weighed, and those that fit timed."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from isoflop.plan.memory.shard import Trained
from isoflop.plan.search.formula import Floats, bytes_needed, seconds
from isoflop.plan.search.space import Columns, Space
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
        held = bytes_needed(space, job, taken(space.columns, rows))
        offered = space.applies(taken(space.columns, rows))
        large = _nearer(large, rows, held, offered & (held > room))
        found += _timed(space, setting, rows, np.where(offered, held, np.inf), room)
    row, variation, took, weights = (np.concatenate(part) for part in zip(*found, strict=True))
    return Timed(row, variation, took, weights, weights <= room, large)


def taken(columns: Columns, rows: Rows) -> Columns:
    return {name: column[rows] for name, column in columns.items()}


def _timed(
    space: Space, setting: Setting, rows: Rows, held: Floats, room: float
) -> list[tuple[Rows, Rows, Floats, Floats]]:
    """Step times of rows of one structure of which some variation fits."""
    some = np.flatnonzero((held <= room).any(axis=1))
    if not some.size:
        return []
    took = seconds(space, setting, taken(space.columns, rows[some]))
    at, variation = np.nonzero(np.isfinite(held[some]))
    return [(rows[some][at], variation, took[at, variation], held[some][at, variation])]


def _nearer(known: TooLarge, rows: Rows, held: Floats, large: NDArray[np.bool_]) -> TooLarge:
    """The refused so far with those of more rows."""
    count = known.count + int(large.sum())
    if not large.any():
        return known
    at, variation = divmod(int(np.where(large, held, np.inf).argmin()), held.shape[1])
    if held[at, variation] >= known.bytes_needed:
        return TooLarge(count, known.row, known.variation, known.bytes_needed)
    return TooLarge(count, int(rows[at]), variation, float(held[at, variation]))
