"""A trainer's software and machine learnt from a few of its own steps.

What others' steps said is the prior; few rows move it as far as they weigh against it. Every
uncertain number may move, the kernels' and the machine's too: which of them a few rows identify
depends on what was run, so none is chosen beforehand.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from isoflop.check.step_fit import NORMAL, Fitted, Problem, Row, fit, moves
from isoflop.errors import InputError
from isoflop.errors import Problem as Broken
from isoflop.hardware.fitted import Beliefs, shipped
from isoflop.hardware.stack import find_stack

#: What a stack's own rows may move beside what published steps moved.
OF_STACK = ("seconds_host_layer_", "share_elementwise_")
#: Steps of one trainer on one chip lie so much nearer to a fit of their own than those of all
#: trainers do to one of them all: neighbouring releases differ by 1.3 to 1.9 %, not by 5. Over
#: several chips they do not: what is wrong of one chip must not be learnt as the trainer's.
NEARER = 0.3
#: Below this share of its prior's variance taken away, a number was not identified.
IDENTIFIED = 0.3


@dataclass(frozen=True, slots=True)
class Calibrated:
    """Beliefs after a stack's own steps.

    `prior` is what was believed of each number that could move, `told` the share of its
    variance that the steps took away, `errors` predicted over measured less 1 of each step.
    """

    stack: str
    beliefs: Beliefs
    prior: Mapping[str, float]
    told: Mapping[str, float]
    errors: tuple[float, ...]

    @property
    def identified(self) -> tuple[str, ...]:
        """The numbers that the steps say something of, most first."""
        found = [name for name, share in self.told.items() if share >= IDENTIFIED]
        return tuple(sorted(found, key=lambda name: -self.told[name]))


def may_move(name: str) -> bool:
    """Whether a stack's own steps move the number of this name.

    >>> may_move("seconds_host_layer_torchtitan"), may_move("seconds_call")
    (True, False)
    """
    return moves(name) or name.startswith(OF_STACK)


def learn(problem: Problem, which: Sequence[int] | None = None) -> Fitted:
    """The numbers after a stack's own steps `which` (all where None), from the problem's beliefs."""
    rows = problem.rows if which is None else [problem.rows[i] for i in which]
    one = len({row.setting.cluster.chip.name for row in rows}) == 1
    return fit(problem, which, NORMAL, NEARER if one else 1.0)


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
    problem = Problem(rows, shipped() if prior is None else prior, may_move)
    found = learn(problem)
    return Calibrated(
        stacks[0],
        Beliefs(found.beliefs.posterior, f"{len(rows)} steps of {stacks[0]}"),
        {name: float(symbol.value) for name, symbol in problem.priors.items()},
        found.told,
        found.errors,
    )
