"""A trainer's software learnt from a few of its own steps.

What chips, links and kernels do is known from others' steps; what is left to learn of a stack
is how far off its steps are as a whole, and how long its host takes. Few rows move these from
what was believed as far as they weigh against it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from isoflop.check.step_fit import Problem, Row, fit
from isoflop.errors import InputError
from isoflop.errors import Problem as Broken
from isoflop.hardware.fitted import Beliefs, shipped
from isoflop.hardware.stack import find_stack

#: What a stack's own rows may move.
OF_STACK = ("residual_", "seconds_host_layer_", "seconds_host_experts_", "share_sorting_")
#: Below this share of its prior's variance taken away, a number was not identified.
IDENTIFIED = 0.3


@dataclass(frozen=True, slots=True)
class Calibrated:
    """Beliefs after a stack's own steps, which numbers they identified, and errors left."""

    beliefs: Beliefs
    identified: tuple[str, ...]
    left_at_prior: tuple[str, ...]
    errors: tuple[float, ...]


def calibrate_stack(rows: Sequence[Row], prior: Beliefs | None = None) -> Calibrated:
    """What steps of one stack say of it.

    Raises:
        InputError: no rows, or rows of several stacks.
        UnknownName: the rows' stack is not known.
    """
    stacks = sorted({find_stack(row.setting.stack).name for row in rows})
    if len(stacks) != 1:
        rule = "is one stack, in at least one row"
        raise InputError("calibration", [Broken("stack", ", ".join(stacks) or "none", rule)])
    known = shipped() if prior is None else prior
    found = fit(Problem(rows, known, lambda name: name.startswith(OF_STACK)))
    return Calibrated(
        Beliefs(found.beliefs.posterior, f"{len(rows)} steps of {stacks[0]}"),
        tuple(name for name, share in found.told.items() if share >= IDENTIFIED),
        tuple(name for name, share in found.told.items() if share < IDENTIFIED),
        found.errors,
    )
