"""A simulated step as text: one row for each rank, time from left to right."""

from __future__ import annotations

from isoflop.errors import InputError, Problem
from isoflop.plan.schedule.orders import Slot, Together, works
from isoflop.plan.schedule.simulate import Simulation

MOST_RANKS = 16

#: What fills the time of each kind of work, after its label.
FILL = {"F": "-", "B": "=", "BW": "=", "W": "~"}

LEGEND = (
    "F forward ---, B backward ===, W weights' gradient ~~~, both together ###, idle blank; "
    "numbers are micro-batches, small letters a rank's later chunks"
)


def render(simulation: Simulation, width: int = 100) -> str:
    """The step in `width` columns; a label stands where its work has room for it.

    Raises:
        InputError: more ranks than a reader can take in, or no room for a row.

    >>> from isoflop.plan.schedule.kinds import OneFOneB
    >>> from isoflop.plan.schedule.orders import orders
    >>> from isoflop.plan.schedule.simulate import Durations, simulate
    >>> step = simulate(orders(OneFOneB(), 2, 3), Durations.equal(2, 1, 2))
    >>> print(render(step, 36).rsplit(LEGEND)[0].rstrip())
    rank  0 |F0-F1-      B0====F2-B1====   B2====|  25% idle
    rank  1 |   F0-B0====F1-B1====F2-B2====      |  25% idle
    """
    _check(simulation, width)
    rows = [_row(simulation, rank, width) for rank in range(len(simulation.spans))]
    return "\n".join([*rows, LEGEND])


def _check(simulation: Simulation, width: int) -> None:
    ranks = len(simulation.spans)
    rules = [
        ("ranks", ranks, f"is at most {MOST_RANKS}", ranks <= MOST_RANKS),
        ("width", width, "is at least 10", width >= 10),
    ]
    if bad := [Problem(field, value, rule) for field, value, rule, holds in rules if not holds]:
        raise InputError("timeline", bad)


def _row(simulation: Simulation, rank: int, width: int) -> str:
    first = min(work.stage for span in simulation.spans[rank] for work in works(span.slot))
    text = ""
    for span in simulation.spans[rank]:
        start, end = (round(at / simulation.seconds * width) for at in (span.start, span.end))
        text += " " * (start - len(text)) + _cell(span.slot, end - start, first)
    idle = float(simulation.idle(rank) / simulation.seconds)
    return f"rank {rank:>2} |{text:<{width}}| {idle:4.0%} idle"


def _cell(slot: Slot, width: int, first: int) -> str:
    """A slot in `width` columns: its label where it fits, filled up by its kind."""
    label = "".join(
        f"{w.kind[0] if w.stage == first else w.kind[0].lower()}{w.micro_batch}"
        for w in works(slot)
    )
    fill = "#" if isinstance(slot, Together) else FILL[slot.kind]
    return (label if len(label) < width else "").ljust(width, fill)
