"""isoflop hardware"""

from __future__ import annotations

from isoflop.cli.options import Json
from isoflop.cli.output import emit, say
from isoflop.hardware import Chip, find, names
from isoflop.quantity import Symbol
from isoflop.quantity.units import format_bytes, format_si
from isoflop.report.text import table


def hardware(name: str | None = None, /, *, as_json: Json = False) -> None:
    """List the accelerators, or show one with its sources.

    Parameters
    ----------
    name
        One accelerator, such as h100-sxm.
    """
    chips = [find(n) for n in names()] if name is None else [find(name)]
    if as_json:
        return emit("hardware", {"hardware": [chip.to_json() for chip in chips]})
    return say(list_chips(chips) if name is None else show_chip(chips[0]))


def list_chips(chips: list[Chip]) -> str:
    """One line per accelerator. Dense peaks: the 2:4 sparse figures are twice these."""
    header = ["accelerator", "16-bit dense", "memory", "bandwidth", "link", "power", "$/h"]
    rows = [
        [
            chip.name,
            format_si(_sixteen_bit(chip).value, "FLOP/s"),
            format_bytes(chip.bytes_memory.value),
            format_si(chip.bytes_per_second_memory.value, "B/s"),
            format_si(chip.bytes_per_second_link.value, "B/s"),
            format_si(chip.watts.value, "W"),
            f"{float(chip.dollars_per_hour.value):.2f}",
        ]
        for chip in chips
    ]
    return table(rows, header, "lrrrrrr")


def _sixteen_bit(chip: Chip) -> Symbol:
    return chip.peak("bf16" if "bf16" in chip.peaks else "fp16")


def show_chip(chip: Chip) -> str:
    """Every number of one accelerator: value, range, kind of truth, source."""
    rows = [
        [f"  {s.name}", f"{float(s.value):.6g}", _range(s), s.basis.value, s.source]
        for s in chip.numbers()
    ]
    title = f"{chip.name}: {chip.vendor}, {chip.year}, {chip.per_node} to a node"
    return f"{title}\n{table(rows, ['  number', 'value', 'range', 'basis', 'source'], 'lrlll')}"


def _range(symbol: Symbol) -> str:
    return f"{symbol.spread.low:g} to {symbol.spread.high:g}" if symbol.spread else ""
