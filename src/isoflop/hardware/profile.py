"""What a machine really does: measured curves of seconds over sizes, with their spread.

A `Profile` is made by `isoflop calibrate` and read by `isoflop.plan.cost`. It knows
nothing of any model: a curve is a kernel timed on a coarse grid of sizes, and is read
between grid points by interpolating the logarithm of seconds in the logarithms of the
sizes, which is exact for every power law.
"""

from __future__ import annotations

import json
import math
from bisect import bisect_right
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from itertools import pairwise, product
from typing import Any

from isoflop.errors import InputError, Problem, UnknownName
from isoflop.quantity import Basis, Interval, Symbol
from isoflop.quantity.basis import NORMAL_90

SCHEMA = "isoflop/1"

#: From the quartiles of a normal distribution to its central 90 %: 1.645 / 0.674.
QUARTILES_TO_90 = NORMAL_90 / 0.6744897501960817


@dataclass(frozen=True, slots=True)
class Curve:
    """Seconds of one kernel on a full grid of sizes.

    Attributes:
        name: of the kernel and its phase, such as `linear_backward`.
        axes: what the sizes are, in order.
        grid: for each axis its sizes, rising.
        seconds: the median at each grid point, the last axis running fastest.
        low, high: the quartiles over alternating repeats.

    Raises:
        InputError: grid and values do not fit each other, or a value is not above zero.

    >>> copy = Curve("copy", ("n",), ((1, 100),), (2.0, 200.0), (1.0, 100.0), (4.0, 400.0))
    >>> round(copy.at(10), 9), round(copy.at(1000), 9)
    (20.0, 2000.0)
    """

    name: str
    axes: tuple[str, ...]
    grid: tuple[tuple[float, ...], ...]
    seconds: tuple[float, ...]
    low: tuple[float, ...]
    high: tuple[float, ...]

    def __post_init__(self) -> None:
        n_points = math.prod(map(len, self.grid))
        rising = all(
            len(axis) > 0 and all(map(_positive, axis)) and all(a < b for a, b in pairwise(axis))
            for axis in self.grid
        )
        columns = {"seconds": self.seconds, "low": self.low, "high": self.high}
        bad = [
            Problem(field, f"{len(values)} values", f"has {n_points} finite values above 0")
            for field, values in columns.items()
            if len(values) != n_points or not all(map(_positive, values))
        ]
        if not rising or len(self.grid) != len(self.axes):
            rule = "has one rising list of sizes above 0 for each axis"
            bad.append(Problem("grid", self.axes, rule))
        elif not bad:
            ordered = zip(self.low, self.seconds, self.high, strict=True)
            if not all(low <= middle <= high for low, middle, high in ordered):
                bad.append(Problem("seconds", self.name, "lie between low and high"))
        if bad:
            raise InputError(f"curve {self.name}", bad)

    def at(self, *sizes: float) -> float:
        """Median seconds at these sizes; beyond the grid its last slope goes on."""
        return self._read(self.seconds, sizes)

    def interval(self, *sizes: float) -> Interval:
        """The 90 % range of one call, from the quartiles of the nearest grid points."""
        middle = self.at(*sizes)
        below = (self._read(self.low, sizes) / middle) ** QUARTILES_TO_90
        above = (self._read(self.high, sizes) / middle) ** QUARTILES_TO_90
        return Interval(middle * min(below, 1.0), middle * max(above, 1.0))

    def symbol(self, *sizes: float) -> Symbol:
        """Seconds at these sizes as a named, measured number.

        >>> unit = Curve("copy", ("n",), ((1, 100),), (2.0, 200.0), (2.0, 200.0), (2.0, 200.0))
        >>> unit.symbol(10).name
        'seconds_copy_10'
        """
        name = "_".join(["seconds", self.name, *(f"{size:.0f}" for size in sizes)])
        about = ", ".join(f"{a} {s:,.0f}" for a, s in zip(self.axes, sizes, strict=True))
        return Symbol(
            name, self.at(*sizes), Basis.MEASURED, self.interval(*sizes), "calibration", about
        )

    def _read(self, values: Sequence[float], sizes: Sequence[float]) -> float:
        """Multilinear interpolation in logarithms: a weighted geometric mean of corners."""
        corners = [_corners(axis, size) for axis, size in zip(self.grid, sizes, strict=True)]
        log_seconds = 0.0
        for corner in product(*corners):
            index, weight = 0, 1.0
            for axis, (place, share) in zip(self.grid, corner, strict=True):
                index, weight = index * len(axis) + place, weight * share
            log_seconds += weight * math.log(values[index])
        return math.exp(log_seconds)


def _corners(axis: tuple[float, ...], size: float) -> tuple[tuple[int, float], ...]:
    """The two grid points that a size is read from, each with its weight."""
    if len(axis) == 1:
        return ((0, 1.0),)
    left = min(max(bisect_right(axis, size) - 1, 0), len(axis) - 2)
    share = math.log(size / axis[left]) / math.log(axis[left + 1] / axis[left])
    return ((left, 1 - share), (left + 1, share))


def _positive(value: object) -> bool:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return False
    return math.isfinite(value) and value > 0


@dataclass(frozen=True, slots=True)
class Machine:
    """What was calibrated: the machine, how much of it was used, with which software."""

    cpu: str
    n_cores: int
    n_threads: int
    bytes_memory: int
    torch: str
    system: str
    date: str


@dataclass(frozen=True, slots=True)
class Profile:
    """A machine's curves.

    Attributes:
        pace: the 90 % range of the whole machine's slowness during the calibration, 1 its
            median: what shared hosts and clocks do to every kernel at once.
        bytes_framework: resident memory that PyTorch grows by when its kernels first run:
            code pages, buffers of the matrix library, stacks of the threads.
        bytes_reused: the largest block that the allocator keeps when it is freed; larger
            ones go back to the kernel, and are faulted in anew each time.
        bytes_room: free memory that the process already holds when the first model is built.
        ratio_resident: resident bytes per live byte of a training step's small blocks.
        seconds_between: what an operator costs beside its kernel, forward and backward
            together: Python between modules, autograd's bookkeeping, caches gone cold.
        seconds_spent: on the calibration.
        n_rounds: repeats behind each median.
    """

    machine: Machine
    curves: Mapping[str, Curve]
    pace: Interval
    bytes_framework: int
    bytes_room: int
    bytes_reused: int
    ratio_resident: float
    seconds_between: float
    seconds_spent: float
    n_rounds: int

    def curve(self, name: str) -> Curve:
        """The curve of a kernel.

        Raises:
            UnknownName: the profile has no such curve; the near ones are named.
        """
        if name not in self.curves:
            raise UnknownName("calibrated curve", name, self.curves, "calibrate again")
        return self.curves[name]

    def to_json(self) -> dict[str, Any]:
        rest = {f.name: getattr(self, f.name) for f in fields(self)}
        return {"schema": SCHEMA, "kind": "profile"} | rest | {
            "machine": asdict(self.machine),
            "curves": [asdict(curve) for curve in self.curves.values()],
            "pace": self.pace.to_json(),
        }  # fmt: skip

    @classmethod
    def from_json(cls, data: Any, where: str = "profile") -> Profile:
        """A profile from what `to_json` gave.

        Raises:
            InputError: another schema, or a field that is missing or malformed.
        """
        if (
            not isinstance(data, dict)
            or data.get("schema") != SCHEMA
            or data.get("kind") != "profile"
        ):
            found = data.get("schema") if isinstance(data, dict) else type(data).__name__
            hint = "make one with `isoflop calibrate`"
            raise InputError(where, [Problem("schema", found, f"is a profile of {SCHEMA}", hint)])
        read: dict[str, Any] = {}
        bad: list[Problem] = []
        for field, parse in _FIELDS.items():
            try:
                read[field] = parse(data[field])
            except InputError as error:
                bad += error.problems
            except (KeyError, TypeError, ValueError, ZeroDivisionError):
                bad.append(
                    Problem(field, data.get(field, "missing"), "is as `isoflop calibrate` wrote it")
                )
        if bad:
            raise InputError(where, bad)
        return cls(**read)

    def dumps(self) -> str:
        """The profile as a file holds it."""
        return json.dumps(self.to_json(), indent=1) + "\n"

    @classmethod
    def loads(cls, text: str, where: str = "profile") -> Profile:
        """A profile from a file's text.

        Raises:
            InputError: not JSON, or not a profile.
        """
        try:
            data = json.loads(text)
        except ValueError:
            problem = Problem("text", text[:40], "is JSON", "make one with `isoflop calibrate`")
            raise InputError(where, [problem]) from None
        return cls.from_json(data, where)


def _read_curves(data: Sequence[Mapping[str, Any]]) -> dict[str, Curve]:
    return {curve.name: curve for curve in map(_read_curve, data)}


def _read_curve(data: Mapping[str, Any]) -> Curve:
    return Curve(
        str(data["name"]),
        tuple(map(str, data["axes"])),
        tuple(map(tuple, data["grid"])),
        *(tuple(data[column]) for column in ("seconds", "low", "high")),
    )


def _read_machine(data: Mapping[str, Any]) -> Machine:
    return Machine(
        cpu=str(data["cpu"]),
        n_cores=int(data["n_cores"]),
        n_threads=int(data["n_threads"]),
        bytes_memory=int(data["bytes_memory"]),
        torch=str(data["torch"]),
        system=str(data["system"]),
        date=str(data["date"]),
    )


_FIELDS: dict[str, Callable[[Any], Any]] = {
    "machine": _read_machine,
    "curves": _read_curves,
    "pace": lambda d: Interval(float(d["low"]), float(d["high"]), float(d["level"])),
    "bytes_framework": int,
    "bytes_room": int,
    "bytes_reused": int,
    "ratio_resident": float,
    "seconds_between": float,
    "seconds_spent": float,
    "n_rounds": int,
}
