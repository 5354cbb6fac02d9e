"""What share of a chip's peak its best matrix products reach, and its attention kernels."""

from __future__ import annotations

import tomllib
from functools import cache
from importlib import resources
from typing import Any

from isoflop.hardware.chip import Chip
from isoflop.hardware.stack import Kernel
from isoflop.quantity import Basis, Interval, Symbol


def share_matmul(chip: Chip, precision: str) -> Symbol:
    """Best measured rate of a matrix product over the datasheet's peak.

    `precision` is one of the peak's: fp16 counts as bf16. A chip without a row has the
    prior of its precision, with a wider range.

    >>> from isoflop.hardware import find
    >>> round(share_matmul(find("a100-sxm-80gb"), "bf16").value, 2)
    0.87
    """
    rows = _table()["matmul"]
    kind = "bf16" if precision in ("fp16", "bf16") else precision
    row = rows.get(chip.name, {}).get(kind) or rows["prior"].get(kind, rows["prior"]["other"])
    return _symbol(f"share_matmul_{kind}", row)


def share_attention(chip: Chip, kernel: Kernel) -> Symbol:
    """Rate of an attention kernel, forward and backward together, over the bf16 peak.

    Of long causal sequences at heads of 128; half the pairs and 2.5 forward passes of
    FLOPs backward are counted (Dao 2023, 2307.08691, section 4.1).
    """
    rows = _table()["attention"][kernel]
    row = rows.get(_generation(chip), rows["other"])
    return _symbol(f"share_{kernel}", row)


def _generation(chip: Chip) -> str:
    """The chips that run the same kernels alike."""
    for generation, prefixes in _table()["generation"].items():
        if chip.name.startswith(tuple(prefixes)):
            return str(generation)
    return "other"


def _symbol(name: str, row: Any) -> Symbol:
    value, low, high = row["value"]
    basis = Basis(row.get("basis", "measured"))
    return Symbol(name, value, basis, Interval(low, high), source=row["source"])


@cache
def _table() -> dict[str, Any]:
    text = resources.files("isoflop.hardware").joinpath("sustained.toml").read_text("utf-8")
    return tomllib.loads(text)
