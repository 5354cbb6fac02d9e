"""What isoflop plan train writes instead of the plan: a trainer's text, or a step's memory."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from isoflop.cli.options import Real
from isoflop.cli.output import SCHEMA, check_output, note, say, write
from isoflop.cli.output import emit as to_json
from isoflop.errors import InputError, Problem
from isoflop.plan import TrainPlan
from isoflop.plan.emit import emitted
from isoflop.plan.memory.pipeline import PipelineMemory, memory_of_pipeline
from isoflop.plan.memory.render import render_memory

#: What a drawn timeline may be called.
DRAWN = (".svg", ".png")


@Parameter(name="*", group="What to write instead of the plan")
@dataclass(frozen=True, slots=True)
class Written:
    """What to write instead of the plan.

    Parameters
    ----------
    emit
        Write the plan for a trainer: recipe (isoflop's own), megatron (arguments), torchrun
        (Megatron-LM's command) or torchtitan (its command).
    learning_rate
        Learning rate that --emit writes; a plan does not choose one.
    timeline
        Show what every pipeline rank holds through a step.
    output
        File that --emit or --timeline (.svg, .png or .json) writes; standard output when not
        given.
    """

    emit: str | None = None
    learning_rate: Real | None = None
    timeline: Annotated[bool, Parameter(negative="")] = False
    output: Annotated[Path | None, Parameter(name=("--output", "-o"))] = None

    def check(self) -> None:
        """Raise InputError where something is said of a text that is not asked for."""
        rules = [
            ("--timeline", self.timeline, "is given without --emit",
             not self.timeline or self.emit is None),
            ("--output", self.output, "is given with --emit or --timeline",
             self.output is None or self.timeline or self.emit is not None),
            ("--learning-rate", self.learning_rate, "is given with --emit",
             self.learning_rate is None or self.emit is not None),
        ]  # fmt: skip
        if bad := [Problem(name, value, rule) for name, value, rule, holds in rules if not holds]:
            raise InputError("plan train", bad)

    def tell(self, plan: TrainPlan, *, as_json: bool) -> bool:
        """Write what is asked for; False where nothing is."""
        if self.emit is not None:
            write(emitted(self.emit, plan, self.learning_rate), self.output)
        elif self.timeline:
            _timeline(plan, self.output, as_json=as_json)
        return self.timeline or self.emit is not None


#: Nothing said: the plan itself.
NOTHING = Written()


def _timeline(plan: TrainPlan, output: Path | None, *, as_json: bool) -> None:
    """A picture in text; a figure or JSON where a file or --json asks for it."""
    memory = memory_of_pipeline(plan.ask.setting(plan.layout))
    data = {**plan.to_json(), "timeline": memory.to_json()}
    title = f"{plan.ask.work.arch.name} on {plan.cluster}: {plan.layout}"
    if output is None:
        return to_json("plan train", data) if as_json else say(f"{title}\n{render_memory(memory)}")
    if output.suffix == ".json":
        whole = {"schema": SCHEMA, "command": "plan train", **data}
        return write(json.dumps(whole, indent=2, allow_nan=False), output)
    if output.suffix in DRAWN:
        return _draw(memory, title, output)
    rule = f"ends in .json, {' or '.join(DRAWN)}"
    raise InputError("plan train", [Problem("--output", output, rule)])


def _draw(memory: PipelineMemory, title: str, path: Path) -> None:
    from isoflop.report.memory import draw_memory

    if path.exists():
        raise InputError("plan train", [Problem("--output", path, "is a new file")])
    check_output(path)
    draw_memory(memory, title, path)
    note(f"wrote {path}")
