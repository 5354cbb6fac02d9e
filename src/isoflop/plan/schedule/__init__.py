"""Pipeline schedules: who does what when, how long a step takes, what is held meanwhile.

kinds.py holds the schedules as values and what each asks for; orders.py the order of work on
each rank, by rule; simulate.py runs orders event by event; held.py folds over an order what a
rank holds; closed.py has the same seconds and holdings as formulas; render.py draws a step.
"""

from isoflop.plan.schedule.closed import (
    InFlight,
    Terms,
    bubble_published,
    idle_closed,
    in_flight_closed,
    n_together,
    seconds_closed,
)
from isoflop.plan.schedule.held import held
from isoflop.plan.schedule.kinds import (
    SCHEDULES,
    SOURCES,
    DualPipe,
    DualPipeV,
    GPipe,
    Interleaved,
    OneFOneB,
    Schedule,
    ScheduleName,
    ZeroBubble,
    broken_rules,
    n_chunks,
    n_stages,
    stages_of,
)
from isoflop.plan.schedule.orders import Order, Slot, Together, Work, orders, works
from isoflop.plan.schedule.render import render
from isoflop.plan.schedule.simulate import Durations, Simulation, Span, simulate

__all__ = [
    "SCHEDULES",
    "SOURCES",
    "DualPipe",
    "DualPipeV",
    "Durations",
    "GPipe",
    "InFlight",
    "Interleaved",
    "OneFOneB",
    "Order",
    "Schedule",
    "ScheduleName",
    "Simulation",
    "Slot",
    "Span",
    "Terms",
    "Together",
    "Work",
    "ZeroBubble",
    "broken_rules",
    "bubble_published",
    "held",
    "idle_closed",
    "in_flight_closed",
    "n_chunks",
    "n_stages",
    "n_together",
    "orders",
    "render",
    "seconds_closed",
    "simulate",
    "stages_of",
    "works",
]
