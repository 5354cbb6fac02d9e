"""The chips and the machines we know, read from catalog.toml."""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from importlib import resources
from typing import Any, Final, TypeAlias, TypeVar, cast

from isoflop.errors import UnknownName
from isoflop.hardware.chip import Chip, Precision
from isoflop.hardware.host import Host
from isoflop.hardware.join import read_join
from isoflop.hardware.node import Node
from isoflop.quantity import Basis, Interval, Symbol

Table: TypeAlias = Mapping[str, Any]
#: A number of the catalogue, more about it, or the words below.
Entry: TypeAlias = float | Table | str
T = TypeVar("T")

NOT_STATED: Final = "not stated"

TERA, GIGA, GIBI, MEBI = 10**12, 10**9, 2**30, 2**20


def find(name: str) -> Chip:
    """The chip called `name`, upper or lower case.

    Raises:
        UnknownName: not in the catalogue; the near names are listed.

    >>> find("H100-SXM").bytes_per_second_memory.value
    3350000000000
    """
    return _entry("accelerator", name, _catalog().chips)


def find_node(name: str) -> Node:
    """The machine called `name`, upper or lower case.

    Raises:
        UnknownName: not in the catalogue; the near names are listed.

    >>> find_node("gb200-nvl72").chips
    72
    """
    return _entry("node", name, _catalog().nodes)


def look_up(name: str) -> Chip | Node:
    """The chip or the machine called `name`; no two share a name.

    Raises:
        UnknownName: neither; the near names of both are listed.
    """
    both: dict[str, Chip | Node] = {**_catalog().chips, **_catalog().nodes}
    return _entry("accelerator or node", name, both)


def names() -> tuple[str, ...]:
    """Every chip's name, in the order of the catalogue.

    >>> "tpu-v5e" in names()
    True
    """
    return tuple(_catalog().chips)


def node_names() -> tuple[str, ...]:
    """Every machine's name, in the order of the catalogue.

    >>> "dgx-h100" in node_names()
    True
    """
    return tuple(_catalog().nodes)


def _entry(kind: str, name: str, known: Mapping[str, T]) -> T:
    folded = name.strip().casefold()
    if folded not in known:
        raise UnknownName(kind, name, known, hint="`isoflop hardware` lists them")
    return known[folded]


@dataclass(frozen=True, slots=True)
class _Catalog:
    chips: Mapping[str, Chip]
    nodes: Mapping[str, Node]


@cache
def _catalog() -> _Catalog:
    text = resources.files("isoflop.hardware").joinpath("catalog.toml").read_text("utf-8")
    table = tomllib.loads(text)
    rows, sources = table["chip"], table["source"]
    hosts = {name: _host(name, row, sources) for name, row in table["host"].items()}
    chips = {name: _chip(name, _whole_row(name, rows), hosts, sources) for name in rows}
    nodes = {name: _node(name, row, chips, hosts, sources) for name, row in table["node"].items()}
    return _Catalog(chips, nodes)


def _whole_row(name: str, rows: Mapping[str, Table]) -> Table:
    """A row with the fields that it takes from the row it is like."""
    row = rows[name]
    return {**_whole_row(row["like"], rows), **row} if "like" in row else row


def _host(name: str, row: Table, sources: Table) -> Host:
    def number(field: str, entry: float | Table, unit: int) -> Symbol:
        return _number(field, entry, unit, row["source"], sources)

    return Host(
        name=name,
        chips=row["chips"],
        bytes_per_second_link=number(
            "bytes_per_second_host_link", row["gigabytes_per_second_link"], GIGA
        ),
        bytes_memory=number("bytes_memory_host", row["gibibytes_memory"], GIBI),
        bytes_per_second_memory=number(
            "bytes_per_second_memory_host", row["gigabytes_per_second_memory"], GIGA
        ),
    )


def _chip(name: str, row: Table, hosts: Mapping[str, Host], sources: Table) -> Chip:
    def number(field: str, entry: float | Table, unit: int = 1) -> Symbol:
        return _number(field, entry, unit, row["source"], sources)

    def stated(field: str, entry: Entry, unit: int = 1) -> Symbol | None:
        return None if entry == NOT_STATED else number(field, cast("float | Table", entry), unit)

    return Chip(
        name=name,
        vendor=row["vendor"],
        year=row["year"],
        peaks={
            cast("Precision", p): number(f"flops_per_second_peak_{p}", entry, TERA)
            for p, entry in row["teraflops_per_second"].items()
        },
        bytes_memory=number("bytes_memory", row["mebibytes_memory"], MEBI),
        bytes_per_second_memory=number(
            "bytes_per_second_memory", row["gigabytes_per_second_memory"], GIGA
        ),
        per_node=row["per_node"],
        watts=stated("watts", row["watts"]),
        dollars_per_hour=stated("dollars_per_hour", row["dollars_per_hour"]),
        joined=read_join(row["joined"]) if "joined" in row else None,
        host=None if row["host"] == NOT_STATED else hosts[row["host"]],
        **{
            f"bytes_per_second_{of}": stated(
                f"bytes_per_second_{of}", row[f"gigabytes_per_second_{of}"], GIGA
            )
            for of in ("link", "network")
        },
    )


def _node(
    name: str, row: Table, chips: Mapping[str, Chip], hosts: Mapping[str, Host], sources: Table
) -> Node:
    field = "bytes_per_second_network"
    network: Entry = row["gigabytes_per_second_network"]
    cited = sources[row["source"]]
    return Node(
        name=name,
        chip=chips[row["chip"]],
        chips=row["chips"],
        domain=row.get("domain", row["chips"]),
        bytes_per_second_network=None
        if network == NOT_STATED
        else _number(field, cast("float | Table", network), GIGA, row["source"], sources),
        source=f"{cited['text']}, {cited['date']}",
        joined=read_join(row["joined"]) if "joined" in row else None,
        host=hosts[row["host"]] if "host" in row else None,
    )


def _number(field: str, entry: float | Table, unit: int, source: str, sources: Table) -> Symbol:
    """One number of the catalogue: a bare value, or a table that says more about it.

    What was remembered and not read is assumed, within the doubt that its source states.
    """
    more: Table = entry if isinstance(entry, Mapping) else {"value": entry}
    cited = sources[more.get("source", source)]
    doubt: float = cited.get("doubt", 0)
    value = more["value"] * unit
    spread = None
    if "low" in more:
        spread = Interval(more["low"] * unit, more["high"] * unit)
    elif doubt:
        spread = Interval(value * (1 - doubt), value * (1 + doubt))
    return Symbol(
        field,
        value if unit == 1 else round(value),
        Basis(more.get("basis", "assumed" if doubt else "datasheet")),
        spread,
        source=f"{cited['text']}, {cited['date']}",
        meaning=more.get("note", ""),
    )
