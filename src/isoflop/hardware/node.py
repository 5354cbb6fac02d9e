"""A machine that holds chips, as it is sold or rented: dgx-h100, p4d, gb200-nvl72."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from isoflop.errors import InputError, Problem
from isoflop.hardware.chip import Chip, number_json
from isoflop.hardware.host import Host
from isoflop.hardware.join import Join
from isoflop.quantity import Symbol

#: Above any machine built; keeps every product of a plan printable.
MOST_CHIPS = 1_000_000


@dataclass(frozen=True, slots=True)
class Node:
    """A machine as it is sold or rented: so many chips, their fast link, their network.

    Attributes:
        chips: in one machine.
        domain: chips that the fast link joins. More than `chips` where the link leaves the
            machine (a host of a TPU pod), fewer where cards are bridged in pairs.
        bytes_per_second_network: to chips outside the domain, one direction, per chip;
            None where it is not stated.
        joined: how the link joins chips in this machine, where not as the chip's row says.
        host: its processors, where not those of the chip's row.

    Raises:
        InputError: chips or domain is not a whole number from 1.
    """

    name: str
    chip: Chip
    chips: int
    domain: int
    bytes_per_second_network: Symbol | None
    source: str
    joined: Join | None = None
    host: Host | None = None

    def __post_init__(self) -> None:
        rule = f"is a whole number from 1 to {MOST_CHIPS:,}"
        sizes = {"chips": self.chips, "domain": self.domain}
        broken = [Problem(field, n, rule) for field, n in sizes.items() if not whole(n)]
        if broken:
            raise InputError(self.name, broken)

    @property
    def chip_inside(self) -> Chip:
        """The chip with the link and the network that it has in this machine.

        >>> from isoflop.hardware import find_node
        >>> find_node("dgx-2").chip_inside.per_node, find_node("dgx-2").chip.per_node
        (16, 8)
        """
        return replace(
            self.chip,
            per_node=self.domain,
            bytes_per_second_network=self.bytes_per_second_network,
            joined=self.joined or self.chip.joined,
            host=self.host or self.chip.host,
        )

    def to_json(self) -> dict[str, Any]:
        network = self.bytes_per_second_network
        return {
            "name": self.name,
            "chip": self.chip.name,
            "chips": self.chips,
            "domain": self.domain,
            "bytes_per_second_network": None if network is None else number_json(network),
            "source": self.source,
        }


def whole(value: object) -> bool:
    """A number of chips that some machine could have.

    >>> whole(8), whole(0), whole(True)
    (True, False, False)
    """
    return isinstance(value, int) and not isinstance(value, bool) and 1 <= value <= MOST_CHIPS
