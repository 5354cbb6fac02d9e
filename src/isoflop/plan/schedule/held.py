"""What a rank holds for its backwards to come; the order alone decides it, not the times."""

from __future__ import annotations

from collections.abc import Sequence

from isoflop.plan.schedule.orders import Order, works
from isoflop.quantity.expr import Value


def held(order: Order, activations: Sequence[Value], for_weights: Sequence[Value]) -> list[Value]:
    """What a rank holds during each slot of its order, aligned with its spans.

    A forward of stage s adds `activations[s]`. The whole backward frees that; the inputs'
    gradient alone keeps `for_weights[s]` of it until the weights' gradient is done.

    >>> from isoflop.plan.schedule.kinds import OneFOneB
    >>> from isoflop.plan.schedule.orders import orders
    >>> [held(order, [1, 1], [0, 0]) for order in orders(OneFOneB(), 2, 3)]
    [[1, 2, 2, 2, 2, 1], [1, 1, 1, 1, 1, 1]]
    """
    now: Value = 0
    levels = []
    for slot in order:
        before = now
        for kind, stage, _ in works(slot):
            if kind == "F":
                before += activations[stage]
                now += activations[stage]
            elif kind == "W":
                now -= for_weights[stage]
            else:
                now -= activations[stage] - (for_weights[stage] if kind == "B" else 0)
        levels.append(before)
    return levels
