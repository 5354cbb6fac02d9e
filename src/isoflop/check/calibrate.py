"""Measure this machine: every kernel's seconds over a grid of sizes, in bounded time.

Repeats alternate over all kernels, so that a slow minute of a shared machine falls on all
of them alike; each grid point keeps the median of its repeats and their quartiles.
"""

from __future__ import annotations

import os
import platform
import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from itertools import product
from pathlib import Path

import torch

from isoflop.check.kernels import KERNELS, Bench, Differentiable, Kernel, Point, try_point
from isoflop.check.least import resident_memory, seconds_between
from isoflop.check.measure import n_cores
from isoflop.errors import InputError, Problem
from isoflop.hardware.profile import Curve, Machine, Profile
from isoflop.quantity import Interval
from isoflop.train.allocator import give_freed_memory_back, keep_freed_memory

#: Fewer repeats make no median.
FEWEST_ROUNDS = 3

#: A point that takes longer than this share of the budget is left to extrapolation.
SHARE_OF_ONE_POINT = 1 / 200

#: With less time than this every second size is left out; errors then are larger.
SECONDS_FINE = 12.0

#: Left of the budget for the process that weighs PyTorch's memory.
SECONDS_MEMORY = 8.0

OnProgress = Callable[[str, float], None]


def calibrate(
    *, threads: int, seconds_budget: float = 30.0, on_progress: OnProgress | None = None
) -> Profile:
    """Time every kernel with `threads` threads for about `seconds_budget` seconds.

    A budget below some 12 s is overrun: starting PyTorch in a second process takes several.

    `on_progress` is told what is being done and which share of the budget is spent.

    Raises:
        InputError: no such number of threads here, or a budget of no time.
    """
    _check(threads, seconds_budget)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        reused = keep_freed_memory()
        return _calibrate(threads, seconds_budget, reused, on_progress or (lambda *_: None))
    finally:
        give_freed_memory_back()
        torch.set_num_threads(before)


def _check(threads: int, seconds_budget: float) -> None:
    bad = []
    if not isinstance(threads, int) or not 1 <= threads <= n_cores():
        rule = f"is a whole number from 1 to {n_cores()}, the cores of this process"
        bad.append(Problem("threads", threads, rule))
    if not seconds_budget > 0:
        bad.append(Problem("seconds_budget", seconds_budget, "is above 0"))
    if bad:
        raise InputError("calibrate", bad)


def _calibrate(threads: int, budget: float, reused: int, on_progress: OnProgress) -> Profile:
    began = time.perf_counter()
    points = []
    for kernel in KERNELS if budget >= SECONDS_FINE else map(_coarse, KERNELS):
        on_progress(f"trying {kernel.name}", (time.perf_counter() - began) / budget)
        points += list(_affordable(kernel, budget))
    samples: dict[tuple[str, tuple[int, ...]], list[float]] = defaultdict(list)
    n_rounds = 0
    reserve = min(SECONDS_MEMORY, budget / 4)
    while n_rounds < FEWEST_ROUNDS or _time_for_another(began, budget - reserve, n_rounds):
        for point in points:
            for phase, seconds in point.bench.sample(point.copies).items():
                samples[point.kernel.name + phase, point.sizes].append(seconds)
        n_rounds += 1
        on_progress(f"round {n_rounds}", (time.perf_counter() - began) / budget)
    on_progress("memory", (time.perf_counter() - began) / budget)
    framework, room, ratio = resident_memory(threads, reused)
    profile = Profile(
        machine=_machine(threads),
        curves=_curves(points, samples),
        pace=_pace(samples),
        bytes_framework=framework,
        bytes_room=room,
        bytes_reused=reused,
        ratio_resident=ratio,
        seconds_between=0.0,
        seconds_spent=0.0,
        n_rounds=n_rounds,
    )
    on_progress("between kernels", (time.perf_counter() - began) / budget)
    between = seconds_between(profile)
    return replace(profile, seconds_between=between, seconds_spent=time.perf_counter() - began)


def _time_for_another(began: float, budget: float, n_rounds: int) -> bool:
    spent = time.perf_counter() - began
    return spent * (n_rounds + 2) / (n_rounds + 1) < budget


def _coarse(kernel: Kernel) -> Kernel:
    """The kernel with every second size of its axes."""
    return replace(kernel, grid=tuple(axis[::2] for axis in kernel.grid))


def _affordable(kernel: Kernel, budget: float) -> Iterator[Point]:
    """The kernel's grid points, without the top of an axis where a point takes too long."""
    grid = list(kernel.grid)
    tried: dict[tuple[int, ...], Point] = {}
    most = budget * SHARE_OF_ONE_POINT
    for sizes in sorted(product(*grid), key=lambda s: kernel.elements(*s)):
        if any(size not in axis for size, axis in zip(sizes, grid, strict=True)):
            continue
        point, seconds = try_point(kernel, sizes)
        tried[sizes] = point
        if seconds > most:
            grid = _without(grid, sizes)
    return (tried[sizes] for sizes in product(*grid))


def _without(grid: Sequence[tuple[int, ...]], sizes: tuple[int, ...]) -> list[tuple[int, ...]]:
    """The grid without the largest size that this point has, relative to its axis."""
    spare = [i for i, axis in enumerate(grid) if len(axis) > 2 and sizes[i] == axis[-1]]
    if not spare:
        return list(grid)
    longest = max(spare, key=lambda i: grid[i][-1])
    return [axis[:-1] if i == longest else axis for i, axis in enumerate(grid)]


def _curves(
    points: Sequence[Point], samples: dict[tuple[str, tuple[int, ...]], list[float]]
) -> dict[str, Curve]:
    found: dict[str, Curve] = {}
    by_kernel: dict[str, list[Point]] = defaultdict(list)
    for point in points:
        by_kernel[point.kernel.name].append(point)
    for name, members in by_kernel.items():
        kernel = members[0].kernel
        grid = tuple(
            tuple(sorted(set(axis))) for axis in zip(*(p.sizes for p in members), strict=True)
        )
        for phase in _phases(members[0].bench):
            rows = [_quartiles(samples[name + phase, sizes]) for sizes in product(*grid)]
            low, middle, high = zip(*rows, strict=True)
            found[name + phase] = Curve(name + phase, kernel.axes, grid, middle, low, high)
    return found


def _phases(bench: Bench) -> tuple[str, ...]:
    return ("_forward", "_backward") if isinstance(bench, Differentiable) else ("",)


def _quartiles(values: Sequence[float]) -> tuple[float, float, float]:
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return low, middle, high


def _pace(samples: dict[tuple[str, tuple[int, ...]], list[float]]) -> Interval:
    """How much slower or faster than its median the whole machine ran, round by round."""
    ratios = []
    for turn in zip(*samples.values(), strict=True):
        relative = (t / statistics.median(v) for t, v in zip(turn, samples.values(), strict=True))
        ratios.append(statistics.median(relative))
    ordered = sorted(ratios)
    return Interval(min(ordered[0], 1.0), max(ordered[-1], 1.0))


def _machine(threads: int) -> Machine:
    return Machine(
        cpu=_cpu_name(),
        n_cores=n_cores(),
        n_threads=threads,
        bytes_memory=os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        torch=str(torch.__version__),
        system=f"{platform.system()} {platform.machine()}",
        date=datetime.now(UTC).date().isoformat(),
    )


def _cpu_name() -> str:
    """The processor's name; where the system does not say, what PyTorch found it can do."""
    listing = Path("/proc/cpuinfo")
    lines = listing.read_text().splitlines() if listing.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or torch.backends.cpu.get_cpu_capability()
