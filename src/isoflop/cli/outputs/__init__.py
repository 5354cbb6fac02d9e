"""The published form of every command's JSON; `isoflop schema` prints it as JSON Schema.

Commands build plain dicts and never import this module; tests validate what they print
against it, so neither can drift from the other.
"""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, TypeAdapter

from isoflop.cli.outputs import counts, laws, plans, runs
from isoflop.cli.outputs import validate as published

OUTPUTS: dict[str, type[BaseModel]] = {
    "models": counts.Models,
    "show": counts.Show,
    "count": counts.Count,
    "explain": counts.Explain,
    "compare": counts.Compare,
    "hardware": counts.Hardware,
    "plan train": plans.PlanTrain,
    "plan serve": plans.PlanServe,
    "plan diff": plans.PlanDiff,
    "plan budget": plans.PlanBudget,
    "laws": laws.Laws,
    "fit": laws.Fit,
    "predict": laws.Predict,
    "calibrate": runs.Calibrate,
    "validate": published.Validate,
    "check": runs.Check,
    "train": runs.Train,
    "export": runs.Export,
    "generate": runs.Generate,
    "demo": runs.Demo,
}


def schemas() -> dict[str, Any]:
    """JSON Schema (2020-12) of each command's output, by command."""
    return {name: TypeAdapter(form).json_schema() for name, form in OUTPUTS.items()}


def validate(command: str, text: str) -> None:
    """Raise pydantic's ValidationError where `text` is not what `command` may print."""
    OUTPUTS[command].model_validate_json(text)
