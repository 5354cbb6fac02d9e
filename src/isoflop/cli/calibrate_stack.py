"""isoflop calibrate --from: a trainer's software learnt from a few of its own steps."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from isoflop.cli.output import check_output, emit, note, say
from isoflop.errors import InputError, Problem
from isoflop.quantity.units import format_seconds
from isoflop.report.text import table

if TYPE_CHECKING:
    from isoflop.check.calibrate_stack import Calibrated
    from isoflop.check.published import Measured

#: Numbers shown, those that the steps said most of first.
MOST_SHOWN = 8


def calibrate_from(path: Path, output: Path, stack: str | None, *, as_json: bool) -> None:
    """Fit, write what was learnt, and say what it was.

    Raises:
        InputError: no usable step, steps of several stacks, or a file that is not ours.
        UnknownName: no such stack.
    """
    from isoflop.check.calibrate_stack import calibrate_stack
    from isoflop.check.published import read_rows
    from isoflop.check.step_fit import Row
    from isoflop.hardware.fitted import OwnSteps
    from isoflop.runs import write_whole

    _check_stack_file(output)
    rows = read_rows(path)
    used = [_under(row, stack) for row in rows if row.setting and row.measured_seconds]
    skipped = [f"{row.row_id}: {row.skipped}" for row in rows if row.skipped]
    if not used:
        rule = "has a step with a time and a whole configuration"
        raise InputError("calibrate", [Problem("--from", str(path), rule, "; ".join(skipped[:3]))])
    learnt = calibrate_stack([Row(r.setting, r.measured_seconds, r.family) for r in used])  # type: ignore[arg-type]
    own = OwnSteps(learnt.stack, len(used), {n: learnt.beliefs.posterior[n] for n in learnt.told})
    write_whole(output, own.to_toml().encode())
    note(f"written to {output}")
    data = _data(learnt, used, skipped)
    if as_json:
        return emit("calibrate", {"output": str(output), "stack": data})
    return say(_text(data))


def _check_stack_file(output: Path) -> None:
    """Refuse to overwrite what is not ours."""
    from isoflop.hardware.fitted import HEADER

    ours = output.is_file() and output.read_bytes().startswith(HEADER.encode())
    if not ours:
        check_output(output)


def _under(row: Measured, stack: str | None) -> Measured:
    assert row.setting is not None
    return row if stack is None else replace(row, setting=replace(row.setting, stack=stack))


def _data(learnt: Calibrated, used: Sequence[Measured], skipped: list[str]) -> dict[str, Any]:
    from isoflop.plan.step.seconds import step_time

    numbers = []
    for name, told in sorted(learnt.told.items(), key=lambda item: -item[1]):
        value, low, high = learnt.beliefs.posterior[name]
        numbers.append({"name": name, "prior": learnt.prior[name], "value": value,
                        "low": low, "high": high, "told": told})  # fmt: skip
    steps = []
    for row, error in zip(used, learnt.errors, strict=True):
        assert row.setting is not None
        assert row.measured_seconds is not None
        before = float(step_time(row.setting).value)
        steps.append({"row_id": row.row_id, "measured": row.measured_seconds, "before": before,
                      "after": (1 + error) * row.measured_seconds})  # fmt: skip
    return {"name": learnt.stack, "numbers": numbers, "steps": steps, "skipped": skipped}


def _text(data: dict[str, Any]) -> str:
    steps = [
        [f"  {s['row_id']}", *(format_seconds(s[k]) for k in ("measured", "before", "after"))]
        for s in data["steps"]
    ]
    numbers = [
        [f"  {n['name']}", f"{n['prior']:.3g}", f"{n['value']:.3g}",
         f"{n['low']:.3g} to {n['high']:.3g}", f"{100 * n['told']:.0f} %"]
        for n in data["numbers"][:MOST_SHOWN]
    ]  # fmt: skip
    rest = len(data["numbers"]) - len(numbers)
    parts = [
        f"{len(steps)} steps of {data['name']}",
        table(steps, ["  step", "measured", "before", "after"], "lrrr"),
        "what they say: `told` is the share of what was not known of a number that they took away",
        table(numbers, ["  number", "before", "after", "90 %", "told"], "lrrrr"),
    ]
    if rest > 0:
        parts.append(f"and {rest} numbers that they say less of (--json lists them)")
    if data["skipped"]:
        parts.append(
            f"{len(data['skipped'])} rows without a prediction, first {data['skipped'][0]}"
        )
    return "\n\n".join(parts)
