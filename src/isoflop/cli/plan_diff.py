"""isoflop plan diff"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from isoflop.cli.options import Json
from isoflop.cli.output import LARGEST_OUTPUT, emit, say
from isoflop.errors import InputError, Problem
from isoflop.plan.diff import Moved, Number, PlanDiff, diff
from isoflop.plan.shown import LABELS
from isoflop.quantity.units import format_value
from isoflop.report.text import table


def plan_diff(a: Path, b: Path, /, *, as_json: Json = False) -> None:
    """Show what changed between two plans, and why.

    Parameters
    ----------
    a
        A plan as --json wrote it.
    b
        Another of the same command.
    """
    found = diff(_read(a), _read(b))
    if as_json:
        return emit("plan diff", {"a": str(a), "b": str(b), **found.to_json()})
    return say(render_diff(found))


def _read(path: Path) -> Any:
    """The JSON in a file.

    Raises:
        InputError: unreadable, or no JSON.
    """
    try:
        with path.open("rb") as file:
            return json.loads(file.read(LARGEST_OUTPUT))
    except (OSError, ValueError, RecursionError) as error:
        why = error.strerror if isinstance(error, OSError) and error.strerror else "not JSON"
        raise InputError(str(path), [Problem("file", why, "is a plan that --json wrote")]) from None


def render_diff(found: PlanDiff) -> str:
    """Inputs first, then assumptions, then each number that moved with what moved it."""
    if not (found.inputs or found.assumptions or found.numbers):
        return "the two plans say the same"
    lines = [*_section("asked and chosen", found.inputs), *_section("assumed", found.assumptions)]
    for number in found.numbers:
        lines += [*_number(number)]
    return "\n".join(lines)


def _section(title: str, moved: tuple[Moved, ...]) -> list[str]:
    rows = [[f"  {m.name}", _text(m.a), "->", _text(m.b)] for m in moved]
    return [f"{title}:", table(rows), ""] if rows else []


def _number(number: Number) -> list[str]:
    change = "" if number.change is None else f" ({number.change:+.1%})"
    unit = number.unit if number.unit in ("bytes", "flops", "dollars", "seconds") else ""
    head = f"{LABELS.get(number.name, number.name)}: {format_value(number.a, unit)} -> {format_value(number.b, unit)}{change}"
    rows = [
        [f"  {p.name}", *(["absent" if v is None else format_value(v, unit) for v in (p.a, p.b)])]
        for p in number.parts
    ]
    return [head, *([table(rows)] if rows else [])]


def _text(value: object) -> str:
    return "not said" if value is None else str(value)
