"""The chips we know, read from catalog.toml."""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from functools import cache
from importlib import resources
from typing import Any, TypeAlias, cast

from isoflop.errors import UnknownName
from isoflop.hardware.chip import Chip, Precision
from isoflop.quantity import Basis, Interval, Symbol

Table: TypeAlias = Mapping[str, Any]

TERA, GIGA, MEBI = 10**12, 10**9, 2**20


def find(name: str) -> Chip:
    """The chip called `name`, upper or lower case.

    Raises:
        UnknownName: not in the catalogue; the near names are listed.

    >>> find("H100-SXM").bytes_per_second_memory.value
    3350000000000
    """
    chips = _chips()
    folded = name.strip().casefold()
    if folded not in chips:
        raise UnknownName("accelerator", name, chips, hint="`isoflop hardware` lists them")
    return chips[folded]


def names() -> tuple[str, ...]:
    """Every name in the catalogue, in its order.

    >>> "tpu-v5e" in names()
    True
    """
    return tuple(_chips())


@cache
def _chips() -> dict[str, Chip]:
    text = resources.files("isoflop.hardware").joinpath("catalog.toml").read_text("utf-8")
    table = tomllib.loads(text)
    return {name: _chip(name, row, table["source"]) for name, row in table["chip"].items()}


def _chip(name: str, row: Table, sources: Table) -> Chip:
    def number(field: str, entry: float | Table, unit: int = 1) -> Symbol:
        return _number(field, entry, unit, row["source"], sources)

    return Chip(
        name=name,
        vendor=row["vendor"],
        year=row["year"],
        peaks={
            cast("Precision", p): number(f"flops_per_second_peak_{p}", entry, TERA)
            for p, entry in row["teraflops_per_second"].items()
        },
        bytes_memory=number("bytes_memory", row["mebibytes_memory"], MEBI),
        per_node=row["per_node"],
        watts=number("watts", row["watts"]),
        dollars_per_hour=number("dollars_per_hour", row["dollars_per_hour"]),
        **{
            f"bytes_per_second_{of}": number(
                f"bytes_per_second_{of}", row[f"gigabytes_per_second_{of}"], GIGA
            )
            for of in ("memory", "link", "network")
        },
    )


def _number(field: str, entry: float | Table, unit: int, source: str, sources: Table) -> Symbol:
    """One number of the catalogue: a bare value, or a table that says more about it."""
    more: Table = entry if isinstance(entry, Mapping) else {"value": entry}
    cited = sources[more.get("source", source)]
    spread = Interval(more["low"] * unit, more["high"] * unit) if "low" in more else None
    value = more["value"] * unit
    return Symbol(
        field,
        value if unit == 1 else round(value),
        Basis(more.get("basis", "datasheet")),
        spread,
        source=f"{cited['text']}, {cited['date']}",
        meaning=more.get("note", ""),
    )
