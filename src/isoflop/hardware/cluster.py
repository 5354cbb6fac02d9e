"""Chips in nodes, and the text people write for them."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from isoflop.errors import InputError, Problem
from isoflop.hardware.catalog import look_up
from isoflop.hardware.chip import Chip
from isoflop.hardware.node import MOST_CHIPS, Node, whole
from isoflop.quantity import Symbol
from isoflop.quantity.units import GROUPED

_TEXT = re.compile(rf"(?:({GROUPED})x)?(\S.*)", re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class Cluster:
    """`count` equal chips; `per_node` of them share the fast link.

    `per_node` None means as many as the chip's own link joins. `node` is the machine that
    they come in, where it was named; `chip` is then the one inside it.

    Raises:
        InputError: count or per_node out of bounds, or a node that is not whole.
    """

    chip: Chip
    count: int
    per_node: int | None = None
    node: Node | None = None

    def __post_init__(self) -> None:
        broken = []
        if not whole(self.count):
            rule = f"is a whole number from 1 to {MOST_CHIPS:,}"
            broken.append(Problem("count", self.count, rule))
        elif self.node is not None and self.count % self.node.chips:
            rule = f"is a multiple of the {self.node.chips} chips of {self.node.name}"
            broken.append(Problem("count", self.count, rule))
        if self.node is not None and self.chip != self.node.chip_inside:
            rule = f"is the {self.node.chip.name} of {self.node.name}"
            broken.append(Problem("chip", self.chip.name, rule))
        if self.per_node is not None and not (
            whole(self.per_node) and self.per_node <= self.chip.per_node
        ):
            rule = f"is a whole number from 1 to {self.chip.per_node}, what the link joins"
            broken.append(Problem("per_node", self.per_node, rule))
        if broken:
            raise InputError(f"cluster of {self.chip.name}", broken)

    @property
    def size_node(self) -> int:
        """Chips that share the fast link.

        >>> parse_cluster("4xh100-sxm").size_node, parse_cluster("64xh100-sxm").size_node
        (4, 8)
        """
        return min(self.count, self.per_node or self.chip.per_node)

    @property
    def n_nodes(self) -> int:
        return -(-self.count // self.size_node)

    @property
    def n_accelerators(self) -> Symbol:
        return Symbol("n_accelerators", self.count, source="the cluster asked for")

    def __str__(self) -> str:
        if self.node is not None:
            return f"{self.count // self.node.chips}x{self.node.name}"
        return f"{self.count}x{self.chip.name}"

    def to_json(self) -> dict[str, Any]:
        return {
            "text": str(self),
            "chip": self.chip.name,
            "count": self.count,
            "per_node": self.size_node,
        }


def parse_cluster(text: str) -> Cluster:
    """A cluster as people write it: a chip or a node, or a count, an x and its name.

    Raises:
        InputError: the text or the count cannot be read.
        UnknownName: no such chip or node; the near names are listed.

    >>> str(parse_cluster("1024xa100-sxm-80gb")), parse_cluster("h100-sxm").count
    ('1024xa100-sxm-80gb', 1)
    >>> parse_cluster("16xdgx-h100").count
    128
    """
    match = _TEXT.fullmatch(text.strip()) if len(text) <= 80 else None
    if match is None:
        rule = "is the name of a chip or a node, with how many in front"
        raise InputError("cluster", [Problem("text", text, rule, "write it like 8xh100-sxm")])
    count = int(match[1].replace(",", "").replace("_", "")) if match[1] else 1
    found = look_up(match[2])
    if isinstance(found, Node):
        return Cluster(found.chip_inside, count * found.chips, node=found)
    return Cluster(found, count)
