"""isoflop hardware"""

from __future__ import annotations

from isoflop.cli.options import Json
from isoflop.cli.output import emit, say
from isoflop.errors import InputError, Problem, UnknownName
from isoflop.hardware import Chip, Node, find, find_node, look_up, names, node_names
from isoflop.quantity import Symbol
from isoflop.quantity.units import format_bytes, format_si
from isoflop.report.text import symbol_text, table

NOT_STATED = "not stated"


def hardware(
    name: str | None = None, /, *, vendor: str | None = None, as_json: Json = False
) -> None:
    """List the accelerators and the nodes, or show one with its sources.

    Parameters
    ----------
    name
        One accelerator or node, such as h100-sxm or dgx-h100.
    vendor
        Only those of one vendor, such as amd.
    """
    chips, nodes = chosen(name, vendor)
    if as_json:
        listed = [chip.to_json() for chip in chips], [node.to_json() for node in nodes]
        return emit("hardware", dict(zip(("hardware", "nodes"), listed, strict=True)))
    if name is None:
        return say(f"{list_chips(chips)}\n\n{list_nodes(nodes)}")
    return say("\n\n".join([*map(show_node, nodes), *map(show_chip, chips)]))


def chosen(name: str | None, vendor: str | None) -> tuple[list[Chip], list[Node]]:
    """What was asked for; a node brings the chip inside it.

    Raises:
        UnknownName: no such accelerator, node or vendor.
        InputError: a name and a vendor: one of them would be ignored.
    """
    if name is not None:
        if vendor is not None:
            problem = Problem("--vendor", vendor, "is not given together with a name")
            raise InputError("hardware", [problem])
        found = look_up(name)
        return ([found.chip_inside], [found]) if isinstance(found, Node) else ([found], [])
    chips, nodes = [find(n) for n in names()], [find_node(n) for n in node_names()]
    if vendor is None:
        return chips, nodes
    known = {chip.vendor.casefold() for chip in chips}
    wanted = vendor.casefold()
    if wanted not in known:
        raise UnknownName("vendor", vendor, known, hint=f"choose one of {', '.join(sorted(known))}")
    return (
        [chip for chip in chips if chip.vendor.casefold() == wanted],
        [node for node in nodes if node.chip.vendor.casefold() == wanted],
    )


def list_chips(chips: list[Chip]) -> str:
    """One line per accelerator. Dense peaks: the 2:4 sparse figures are twice these."""
    header = ["accelerator", "16-bit dense", "memory", "bandwidth", "link", "power", "$/h"]
    rows = [
        [
            chip.name,
            format_si(_sixteen_bit(chip).value, "FLOP/s"),
            format_bytes(chip.bytes_memory.value),
            format_si(chip.bytes_per_second_memory.value, "B/s"),
            _si(chip.bytes_per_second_link, "B/s"),
            _si(chip.watts, "W"),
            f"{float(price.value):.2f}" if (price := chip.dollars_per_hour) else NOT_STATED,
        ]
        for chip in chips
    ]
    return table(rows, header, "lrrrrrr")


def list_nodes(nodes: list[Node]) -> str:
    """One line per machine; the network is each chip's share, in one direction."""
    header = ["node", "accelerator", "chips", "joined", "network per chip"]
    rows = [
        [
            node.name,
            node.chip.name,
            str(node.chips),
            str(node.domain),
            _si(node.bytes_per_second_network, "B/s"),
        ]
        for node in nodes
    ]
    return table(rows, header, "llrrr")


def _si(number: Symbol | None, unit: str) -> str:
    return NOT_STATED if number is None else format_si(number.value, unit)


def _sixteen_bit(chip: Chip) -> Symbol:
    return chip.peak("bf16" if "bf16" in chip.peaks else "fp16")


def show_node(node: Node) -> str:
    """One machine, and where it is described."""
    return (
        f"{node.name}: {node.chips} {node.chip.name} in each, the fast link joins {node.domain}\n"
        f"  source: {node.source}"
    )


def show_chip(chip: Chip) -> str:
    """Every number of one accelerator: value, range, kind of truth, source, note."""
    cited = list(dict.fromkeys(s.source for s in chip.numbers()))
    rows = [
        [f"  {s.name}", symbol_text(s, s.value), _range(s), s.basis.value,
         f"[{cited.index(s.source) + 1}] {s.meaning}"]
        for s in chip.numbers()
    ]  # fmt: skip
    rows += [[f"  {name}", NOT_STATED, "", "", ""] for name in chip.not_stated()]
    lines = [
        f"{chip.name}: {chip.vendor}, {chip.year}, {chip.per_node} to a node",
        table(rows, ["  number", "value", "range", "basis", "source"], "lrlll"),
        *(f"  [{n}] {source}" for n, source in enumerate(cited, start=1)),
    ]
    return "\n".join(lines)


def _range(symbol: Symbol) -> str:
    if symbol.spread is None:
        return ""
    return f"{symbol_text(symbol, symbol.spread.low)} to {symbol_text(symbol, symbol.spread.high)}"
