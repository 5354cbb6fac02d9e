"""The few constants behind a predicted step, each with its range, source and meaning."""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from functools import cache
from importlib import resources
from typing import Any

from isoflop.quantity import Basis, Interval, Symbol


@dataclass(frozen=True, slots=True)
class Constants:
    """What is the same on every chip and under every stack; `constants.toml` says what each is."""

    share_bandwidth: Symbol
    serial_memory: Symbol
    share_wave_idle: Symbol
    share_unaligned: Symbol
    share_sustained: Symbol
    share_attention: Symbol
    share_link: Symbol
    share_network: Symbol
    share_hidden_tensor: Symbol
    share_hidden_data: Symbol
    share_hidden_experts: Symbol
    share_step_lost: Symbol

    def with_values(self, values: Mapping[str, float]) -> Constants:
        """The same constants at other values, as a fit or a what-if sets them."""
        changed = {name: replace(getattr(self, name), given=v) for name, v in values.items()}
        return replace(self, **changed)


@dataclass(frozen=True, slots=True)
class Prior:
    """What was believed of a constant before any training step was read."""

    value: float
    deviation: float


@cache
def constants() -> Constants:
    """The constants as fitted.

    >>> 0 < constants().share_bandwidth.value < 1
    True
    """
    rows = _rows()
    return Constants(**{f.name: _symbol(f.name, rows[f.name]) for f in fields(Constants)})


def priors() -> dict[str, Prior]:
    """The prior of each constant, by name."""
    return {name: Prior(*row["prior"]) for name, row in _rows().items()}


def _rows() -> dict[str, Any]:
    text = resources.files("isoflop.plan").joinpath("constants.toml").read_text("utf-8")
    return dict(tomllib.loads(text)["constant"])


def _symbol(name: str, row: Mapping[str, Any]) -> Symbol:
    value, low, high = row["value"]
    spread = Interval(low, high)
    return Symbol(name, value, Basis.FITTED, spread, source=row["source"], meaning=row["meaning"])
