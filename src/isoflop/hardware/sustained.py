"""What share of a chip's peak its best matrix products reach, and its attention kernels."""

from __future__ import annotations

import tomllib
from functools import cache
from importlib import resources
from typing import Any

from isoflop.hardware.chip import Chip
from isoflop.hardware.fitted import Beliefs, shipped
from isoflop.hardware.stack import Kernel
from isoflop.quantity import Basis, Symbol


def share_matmul(chip: Chip, precision: str, beliefs: Beliefs | None = None) -> Symbol:
    """Best rate of a matrix product over the datasheet's peak.

    `precision` is one of the peak's: fp16 counts as bf16. A chip without a row has the
    prior of its precision, with a wider range.

    >>> from isoflop.hardware import find
    >>> 0.8 < share_matmul(find("a100-sxm-80gb"), "bf16").value < 0.95
    True
    """
    rows = _table()["matmul"]
    kind = "bf16" if precision in ("fp16", "bf16") else precision
    own = rows[chip.name].get("as", chip.name) if chip.name in rows else chip.name
    row = rows.get(own, {}).get(kind) or rows["prior"].get(kind, rows["prior"]["other"])
    return _symbol(f"share_matmul_{kind}_{own}", row, beliefs)


def share_attention(chip: Chip, kernel: Kernel, beliefs: Beliefs | None = None) -> Symbol:
    """Rate of an attention kernel, forward and backward together, over the bf16 peak.

    Of long causal sequences at heads of 128; half the pairs and 2.5 forward passes of
    FLOPs backward are counted (Dao 2023, 2307.08691, section 4.1).
    """
    rows, generation = _table()["attention"][kernel], _generation(chip)
    return _symbol(f"share_{kernel}_{generation}", rows.get(generation, rows["other"]), beliefs)


def cores(chip: Chip) -> Symbol:
    """Cores (streaming multiprocessors) of a chip, over which the tiles of a product are dealt."""
    rows, generation = _table()["cores"], _generation(chip)
    return _symbol(f"n_cores_{generation}", rows.get(generation, rows["other"]))


def _generation(chip: Chip) -> str:
    """The chips that run the same kernels alike."""
    for generation, prefixes in _table()["generation"].items():
        if chip.name.startswith(tuple(prefixes)):
            return str(generation)
    return "other"


def _symbol(name: str, row: Any, beliefs: Beliefs | None = None) -> Symbol:
    basis = Basis(row.get("basis", "measured"))
    return (beliefs or shipped()).symbol(
        name, row["value"], basis, _table()["source"][row["source"]]
    )


@cache
def _table() -> dict[str, Any]:
    text = resources.files("isoflop.hardware").joinpath("sustained.toml").read_text("utf-8")
    return tomllib.loads(text)
