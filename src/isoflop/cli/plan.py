"""What the plans of training and serving share on the command line."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Annotated

from cyclopts import Parameter

from isoflop.cli.options import Duration, Real
from isoflop.plan.goodput import Rhythm, Trouble
from isoflop.quantity import Basis, Node
from isoflop.quantity.units import (
    format_count,
    format_exact,
    format_rounded,
    format_seconds,
    format_value,
)
from isoflop.report.text import table

On = Annotated[str, Parameter(name="--on", help="Accelerators, such as 1024xa100-sxm-80gb.")]


@Parameter(name="*")
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


def numbers(nodes: Mapping[str, Node]) -> str:
    """Values with their 90 % ranges, one per line: three digits of what is modelled."""
    rows = [[f"  {name}", _value(node), span_text(node)] for name, node in nodes.items()]
    return table(rows, ["  number", "value", "90 % range"], "lrl")


def _value(node: Node) -> str:
    """Three digits of what is modelled; counts in full, those of FLOPs with their prefix."""
    if node.bases != {Basis.EXACT}:
        return format_rounded(node.value, node.unit)
    return format_value(node.value, "flops") if node.unit == "flops" else format_exact(node.value)


def span_text(node: Node) -> str:
    """The 90 % range of a number, a unit that both ends share said once.

    >>> from isoflop.quantity import Basis, Interval, Symbol, leaf
    >>> rate = Symbol("rate", 0.03, Basis.ASSUMED, Interval(0.02, 0.04))
    >>> span_text(leaf("x", "seconds", rate))
    '20.9 to 40.3 ms'
    """
    span = node.interval
    if span is None:
        return "exact"
    low, high = (format_rounded(end, node.unit) for end in (span.low, span.high))
    first, _, unit = low.partition(" ")
    return f"{first if unit and high.endswith(f' {unit}') else low} to {high}"
