"""What published steps say of uncertain numbers, over what was believed before.

The tables of stacks, chips and constants hold priors, written by hand with their sources;
`fitted.toml` holds what `benchmarks/step_fit.py` made of them, and nothing else.
"""

from __future__ import annotations

import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from importlib import resources
from typing import Final

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
