"""What kind of truth a number is, and how far it may be off."""

from __future__ import annotations

import math
from dataclasses import dataclass
from enum import StrEnum

#: Half-width, in standard deviations, of the central 90 % of a normal distribution.
NORMAL_90 = 1.6448536269514722


class Basis(StrEnum):
    """Where a number comes from. A derived number carries the set of them.

    >>> Basis("assumed").meaning
    'a default you may override'
    """

    EXACT = "exact"
    DATASHEET = "datasheet"
    MEASURED = "measured"
    FITTED = "fitted"
    MODELLED = "modelled"
    ASSUMED = "assumed"

    @property
    def meaning(self) -> str:
        return {
            Basis.EXACT: "arithmetic on the spec",
            Basis.DATASHEET: "a vendor's document",
            Basis.MEASURED: "timed or weighed on a machine",
            Basis.FITTED: "a law fitted to runs",
            Basis.MODELLED: "a model of the machine, with known error",
            Basis.ASSUMED: "a default you may override",
        }[self]


@dataclass(frozen=True, slots=True)
class Interval:
    """A range that holds the true value with probability `level`.

    >>> 2.0 in Interval(1.5, 3.0)
    True
    >>> Interval(3.0, 1.5)
    Traceback (most recent call last):
    ValueError: an interval needs low <= high, got 3.0 and 1.5
    """

    low: float
    high: float
    level: float = 0.9

    def __post_init__(self) -> None:
        if not self.low <= self.high:
            raise ValueError(f"an interval needs low <= high, got {self.low} and {self.high}")
        if not 0 < self.level < 1:
            raise ValueError(f"an interval's level lies between 0 and 1, got {self.level}")

    def __contains__(self, value: float) -> bool:
        return self.low <= value <= self.high

    def quantile(self, middle: float, normal: float) -> float:
        """The value `normal` standard deviations from `middle`.

        Log-normal where the interval is positive, so that a rate or a price
        never turns negative; split at `middle`, so that both ends are met.
        Only intervals at level 0.9 are drawn from.
        """
        if math.isclose(self.low, self.high):
            return middle
        end = self.high if normal >= 0 else self.low
        reach = abs(normal) / NORMAL_90
        if self.low > 0:
            return float(middle * (end / middle) ** reach)
        return middle + (end - middle) * reach

    def to_json(self) -> dict[str, float]:
        return {"low": self.low, "high": self.high, "level": self.level}
