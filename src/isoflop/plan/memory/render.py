"""A step's memory as text: a chart for each rank, time from left to right."""

from __future__ import annotations

from isoflop.errors import InputError, Problem
from isoflop.plan.memory.pipeline import Held, PipelineMemory
from isoflop.quantity.expr import Value
from isoflop.quantity.units import format_bytes

MOST_RANKS = 16
#: Lines of all charts together, and the fewest and the most of one.
LINES, FEWEST, MOST = 32, 3, 8

LEGEND = (
    "# stands throughout (weights, gradients, optimizer, software), + comes and goes (activations), "
    "idle blank; the optimizer's step is last"
)


def render_memory(memory: PipelineMemory, width: int = 80) -> str:
    """Every rank in `width` columns, as high as the most that any holds.

    Raises:
        InputError: more ranks than a reader can take in, or no room for a row.
    """
    ranks = len(memory.ranks)
    rules = [
        ("ranks", ranks, f"is at most {MOST_RANKS}: ask for a file", ranks <= MOST_RANKS),
        ("width", width, "is at least 10", width >= 10),
    ]
    if bad := [Problem(field, value, rule) for field, value, rule, holds in rules if not holds]:
        raise InputError("timeline", bad)
    rank, peak = memory.peak
    height = min(MOST, max(FEWEST, LINES // ranks))
    charts = [_chart(memory, r, width, height) for r in range(ranks)]
    most, room = (format_bytes(size) for size in (peak.moment.bytes, memory.bytes_available))
    title = f"most on rank {rank} at {peak.moment.when}: {most} of {room}"
    return "\n".join([title, "", *charts, LEGEND])


def _chart(memory: PipelineMemory, rank: int, width: int, height: int) -> str:
    row = memory.ranks[rank]
    peak = max(row, key=lambda held: held.moment.bytes).moment
    columns = [_column(row, memory.end, at, width) for at in range(width)]
    tall = memory.peak[1].moment.bytes
    lines = [
        "".join(_cell(c, line, height, tall) for c in columns) for line in range(height, 0, -1)
    ]
    marks = [f"{format_bytes(peak.bytes)} at {peak.when}", *[""] * (height - 1)]
    names = [f"rank {rank:>2}", *["       "] * (height - 1)]
    rows = zip(names, lines, marks, strict=True)
    return "\n".join(f"{name} |{line}| {mark}".rstrip() for name, line, mark in rows)


def _column(row: tuple[Held, ...], end: Value, at: int, width: int) -> Held | None:
    """The most that is held within a column's time; None where the rank only waits."""
    first, last = end * at / width, end * (at + 1) / width
    within = [held for held in row if held.start < last and held.end > first]
    return max(within, key=lambda held: held.moment.bytes, default=None)


def _cell(held: Held | None, line: int, height: int, tall: Value) -> str:
    """What reaches the middle of a line, of `height` lines that are `tall` bytes."""
    reached = (line - 0.5) / height * float(tall)
    if held is None or held.moment.bytes < reached:
        return " "
    moving = dict(held.moment.parts)["bytes_activations"]
    return "#" if held.moment.bytes - moving >= reached else "+"
