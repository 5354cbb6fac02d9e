"""What steps say of uncertain numbers, over what was believed before.

The tables of stacks, chips and constants hold priors, written by hand with their sources;
`fitted.toml` holds what `benchmarks/step_fit.py` made of them, and nothing else. A file of the
same form that `isoflop calibrate --from` writes holds what a user's own steps said on top.
"""

from __future__ import annotations

import tomllib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from importlib import resources
from typing import Any, Final

from isoflop.errors import InputError, Problem
from isoflop.quantity import Basis, Interval, Symbol

SOURCE: Final = "fitted to published steps by benchmarks/step_fit.py"


@dataclass(frozen=True, slots=True)
class Beliefs:
    """Uncertain numbers as known after some steps were read: (value, low, high) by name.

    What no step said anything about keeps its prior.
    """

    posterior: Mapping[str, Sequence[float]] = field(default_factory=dict, hash=False)
    source: str = SOURCE

    def symbol(
        self, name: str, prior: Sequence[float], basis: Basis, source: str, meaning: str = ""
    ) -> Symbol:
        """A number by name: as fitted where it was, else its prior (value, low, high).

        >>> PRIORS.symbol("a_guess", (2.0, 1.0, 4.0), Basis.ASSUMED, "").value
        2.0
        """
        key = name.replace("-", "_").replace(".", "_")
        if key in self.posterior:
            value, low, high = self.posterior[key]
            told = f"{self.source}; before: {prior[0]:g}, {source}"
            return Symbol(key, value, Basis.FITTED, Interval(low, high), told, meaning)
        value, low, high = prior
        spread = Interval(low, high) if low < high else None
        return Symbol(key, value, basis, spread, source, meaning)


PRIORS: Final = Beliefs()


@cache
def shipped() -> Beliefs:
    """What isoflop was fitted to."""
    text = resources.files("isoflop.hardware").joinpath("fitted.toml").read_text("utf-8")
    return Beliefs(tomllib.loads(text)["fitted"])


@dataclass(frozen=True, slots=True)
class OwnSteps:
    """What a few steps of a user's own said: the stack they ran under, and numbers by name."""

    stack: str
    n_steps: int
    posterior: Mapping[str, Sequence[float]]

    @property
    def beliefs(self) -> Beliefs:
        """Over what isoflop ships with."""
        told = f"{self.n_steps} steps of {self.stack}"
        return Beliefs({**shipped().posterior, **self.posterior}, told)

    def to_toml(self) -> str:
        head = f'{HEADER}\nstack = "{self.stack}"\nn_steps = {self.n_steps}\n[fitted]\n'
        return head + toml_of(self.posterior)

    @classmethod
    def from_table(cls, found: Mapping[str, Any], where: str) -> OwnSteps:
        """Read what `to_toml` wrote, as the table that TOML makes of it.

        Raises:
            InputError: fields that are missing or of the wrong kind.

        >>> own = OwnSteps("unknown", 3, {"residual_unknown": (1.1, 1.0, 1.2)})
        >>> OwnSteps.from_table(tomllib.loads(own.to_toml()), "stack.toml") == own
        True
        """
        bad = [
            Problem(field, found.get(field), rule, "`isoflop calibrate --from` writes it")
            for field, (holds, rule) in _RULES.items()
            if not holds(found.get(field))
        ]
        if bad:
            raise InputError(where, bad)
        numbers = {name: tuple(map(float, three)) for name, three in found["fitted"].items()}
        return cls(found["stack"], found["n_steps"], numbers)


HEADER: Final = "# Written by `isoflop calibrate --from`: name = [value, low, high] at 90 %."


def toml_of(posterior: Mapping[str, Sequence[float]]) -> str:
    """One line per number, by name."""
    return "".join(
        f"{name} = [{', '.join(f'{n:.5g}' for n in three)}]\n"
        for name, three in sorted(posterior.items())
    )


def _three(value: Any) -> bool:
    numbers = isinstance(value, list) and all(type(n) in (int, float) for n in value)
    return numbers and len(value) == 3 and 0 < value[1] <= value[0] <= value[2]


_RULES: Final[dict[str, tuple[Callable[[Any], bool], str]]] = {
    "stack": (lambda v: isinstance(v, str), "is the name of a stack"),
    "n_steps": (lambda v: type(v) is int and v > 0, "is a whole number above 0"),
    "fitted": (
        lambda v: isinstance(v, dict) and all(map(_three, v.values())),
        "is a table of [value, low, high], above 0 and in this order around the value",
    ),
}
