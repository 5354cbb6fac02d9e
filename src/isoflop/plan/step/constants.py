"""The few constants behind a predicted step, each with its range, source and meaning."""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from functools import cache
from importlib import resources
from typing import Any

from isoflop.hardware.fabric import Fabric
from isoflop.hardware.fitted import Beliefs, shipped
from isoflop.quantity import Basis, Symbol


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
    share_shown_tensor: Symbol
    share_shown_data: Symbol
    share_shown_experts: Symbol
    share_host_link: Symbol
    share_host_memory: Symbol
    share_shown_offload: Symbol
    error_of_model: Symbol
    error_of_experts: Symbol

    def beside_kernels(self, alone: Fabric) -> Fabric:
        """A fabric at the rates that collectives reach beside other kernels."""
        return replace(
            alone,
            efficiency_link=alone.efficiency_link * self.share_link,
            efficiency_in_switch=alone.efficiency_in_switch * self.share_link,
            efficiency_network=alone.efficiency_network * self.share_network,
        )


def constants(beliefs: Beliefs | None = None) -> Constants:
    """The constants as fitted, or as `beliefs` has them.

    >>> 0 < constants().share_bandwidth.value < 1
    True
    """
    rows, known = _rows(), beliefs or shipped()
    return Constants(**{f.name: _symbol(f.name, rows[f.name], known) for f in fields(Constants)})


@cache
def _rows() -> Mapping[str, Any]:
    text = resources.files("isoflop.plan.step").joinpath("constants.toml").read_text("utf-8")
    return dict(tomllib.loads(text)["constant"])


def _symbol(name: str, row: Mapping[str, Any], beliefs: Beliefs) -> Symbol:
    return beliefs.symbol(name, row["prior"], Basis.ASSUMED, row["source"], row["meaning"])
