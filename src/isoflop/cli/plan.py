"""What the plans of training and serving share on the command line."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Annotated

from cyclopts import Parameter

from isoflop.cli.options import Duration, Real
from isoflop.plan.goodput import Rhythm, Trouble
from isoflop.quantity import Node
from isoflop.quantity.units import (
    format_count,
    format_seconds,
)

On = Annotated[
    str, Parameter(name="--on", metavar="NxCHIP", help="Accelerators, such as 1024xa100-sxm-80gb.")
]


@Parameter(name="*", group="Failures")
@dataclass(frozen=True, slots=True)
class Failures:
    """What keeps a run from its steps, in place of assumptions.

    Parameters
    ----------
    mtbf_hours
        Mean hours between the failures of one accelerator.
    seconds_restart
        Time from a failure until the run trains again, such as 10min.
    overrun
        Hours of the run over what its steps, checkpoints and failures take; 1 is as planned.
    """

    mtbf_hours: Real | None = None
    seconds_restart: Annotated[Duration | None, Parameter(name="--restart")] = None
    overrun: Real | None = None

    @property
    def said(self) -> Trouble | None:
        """What was said of them; None where nothing was."""
        return None if self == Failures() else Trouble(**asdict(self))


def risk_text(rhythm: Rhythm, days: Node) -> str:
    """How many failures a run meets, how often it saves, how much of its time trains."""
    value = {name: float(node.value) for name, node in rhythm.nodes(days).items()}
    return (
        f"{format_count(value['failures'])} failures expected, at least one with "
        f"{percent(value['probability_of_failure'])}; a checkpoint every "
        f"{format_seconds(value['seconds_checkpoint_interval'])}; "
        f"{percent(value['goodput'])} of the time trains"
    )


def percent(share: float) -> str:
    """A probability or a share in whole percent, never a false 0 or 100.

    >>> percent(0.0001), percent(0.638), percent(0.9998)
    ('under 1 %', '64 %', 'over 99 %')
    """
    if share < 0.01:
        return "under 1 %"
    return "over 99 %" if share > 0.99 else f"{100 * share:.0f} %"
