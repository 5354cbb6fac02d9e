"""What changed between two plans that were written as JSON, and which parts of a number moved."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

from isoflop.errors import InputError, Problem

Json: TypeAlias = Mapping[str, Any]

SCHEMA, COMMANDS = "isoflop/1", ("plan train", "plan serve")
#: Parts of a plan's JSON that are derived from the rest, or stand beside it.
DERIVED = frozenset({"schema", "command", "breakdown", "intervals", "assumptions", "refused", "quoted",
                     "search", "ranking", "mfu", "binding", "notes"})  # fmt: skip
#: Parts of a number that are shown, those that moved most first.
MOST_PARTS = 3


@dataclass(frozen=True, slots=True)
class Moved:
    """One value in both plans; None where a plan does not have it."""

    name: str
    a: Any
    b: Any

    def to_json(self) -> dict[str, Any]:
        return {"name": self.name, "a": self.a, "b": self.b}


@dataclass(frozen=True, slots=True)
class Number:
    """A number of both plans, and the parts of its tree that moved most."""

    name: str
    unit: str
    a: float
    b: float
    parts: tuple[Moved, ...]

    @property
    def change(self) -> float | None:
        """Relative to the first plan; None where that is 0."""
        return self.b / self.a - 1 if self.a else None

    def to_json(self) -> dict[str, Any]:
        parts = [p.to_json() for p in self.parts]
        return {"name": self.name, "unit": self.unit, "a": self.a, "b": self.b,
                "change": self.change, "parts": parts}  # fmt: skip


@dataclass(frozen=True, slots=True)
class PlanDiff:
    """Inputs and choices that differ, assumptions that differ, and numbers that moved."""

    inputs: tuple[Moved, ...]
    assumptions: tuple[Moved, ...]
    numbers: tuple[Number, ...]

    def to_json(self) -> dict[str, Any]:
        return {
            "inputs": [m.to_json() for m in self.inputs],
            "assumptions": [m.to_json() for m in self.assumptions],
            "numbers": [n.to_json() for n in self.numbers],
        }


def diff(a: Json, b: Json) -> PlanDiff:
    """Two plans of one command, held side by side.

    Raises:
        InputError: one of them is no plan, or they are plans of different commands.
    """
    _check(a, b)
    trees = a["breakdown"], b["breakdown"]
    shared = [name for name in trees[0] if name in trees[1]]
    numbers = (_number(name, trees[0][name], trees[1][name]) for name in shared)
    return PlanDiff(
        inputs=_moved(dict(_inputs(a)), dict(_inputs(b))),
        assumptions=_moved(_assumed(a), _assumed(b)),
        numbers=tuple(n for n in numbers if n.a != n.b),
    )


def _check(a: Json, b: Json) -> None:
    bad = [Problem(name, _called(plan), "is JSON of isoflop plan train or plan serve")
           for name, plan in (("A", a), ("B", b)) if not _is_plan(plan)]  # fmt: skip
    if not bad and a["command"] != b["command"]:
        bad = [Problem("B", b["command"], f"is a {a['command']} too")]
    if bad:
        raise InputError("plan diff", bad)


def _is_plan(plan: object) -> bool:
    if not isinstance(plan, Mapping):
        return False
    named = plan.get("schema") == SCHEMA and plan.get("command") in COMMANDS
    trees = plan.get("breakdown")
    return named and isinstance(trees, Mapping) and all(map(_is_tree, trees.values()))


def _is_tree(node: object) -> bool:
    if not isinstance(node, Mapping) or not isinstance(node.get("value"), (int, float)):
        return False
    fine = isinstance(node.get("name"), str) and isinstance(node.get("times", 1), (int, float))
    below = node.get("children", [])
    return fine and isinstance(below, list) and all(map(_is_tree, below))


def _called(plan: object) -> str:
    return (
        str(plan.get("command", "no command")) if isinstance(plan, Mapping) else type(plan).__name__
    )


def _inputs(plan: Json) -> Iterator[tuple[str, Any]]:
    """What was asked and chosen, tables flattened: layout.tp."""
    numbers = plan["breakdown"]
    for name, value in plan.items():
        if name in DERIVED or name in numbers:
            continue
        if isinstance(value, Mapping):
            yield from ((f"{name}.{key}", inner) for key, inner in value.items())
        else:
            yield name, value


def _assumed(plan: Json) -> dict[str, Any]:
    return {a["name"]: a.get("value") for a in plan.get("assumptions", [])}


def _moved(a: Json, b: Json) -> tuple[Moved, ...]:
    return tuple(Moved(n, a.get(n), b.get(n)) for n in {**a, **b} if a.get(n) != b.get(n))


def _number(name: str, a: Json, b: Json) -> Number:
    parts = _moved(dict(leaves(a)), dict(leaves(b)))
    by_size = sorted(parts, key=lambda m: -abs((m.b or 0) - (m.a or 0)))
    return Number(name, str(a.get("unit", "")), a["value"], b["value"], tuple(by_size[:MOST_PARTS]))


def leaves(node: Json, path: str = "", copies: float = 1) -> Iterator[tuple[str, float]]:
    """What each leaf contributes, all copies, by path under the root."""
    copies_below = copies * node.get("times", 1)
    for child in node.get("children", []):
        below = f"{path}/{child['name']}" if path else child["name"]
        if child.get("children"):
            yield from leaves(child, below, copies_below)
        else:
            yield below, copies_below * child["value"]
