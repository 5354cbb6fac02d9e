"""What a chip reaches of its link and its network, and what a message costs beside its bytes.

The constants are few and physical. They are what a benchmark of collectives alone reaches;
a training step reaches less, because kernels share the chip with what they wait for, and the
step-time model puts the constants of a software stack in their place (`dataclasses.replace`).
"""

from __future__ import annotations

from dataclasses import dataclass

from isoflop.errors import InputError, Problem
from isoflop.hardware.cluster import Cluster
from isoflop.hardware.join import Bus, Join, Mesh, Switch, Torus
from isoflop.quantity import Basis, Expr, Interval, Symbol, maximum, minimum, number, total, where

#: Machines in one scalable unit of a DGX SuperPOD, joined by one layer of leaf switches.
MACHINES_PER_LEAF = 32

_BENCH = "stas00/ml-engineering network/README.md and network/benchmarks, read 2026-11"
_NCCL = "NCCL src/graph/tuning.cc: the latencies it chooses algorithms by"


def _assumed(name: str, value: float, low: float, high: float, meaning: str, source: str) -> Symbol:
    return Symbol(name, value, Basis.ASSUMED, Interval(low, high), source, meaning)


def _efficiency_link(value: float, low: float, high: float, source: str) -> Symbol:
    meaning = "bus bandwidth of a large all-reduce inside a domain over the link's own"
    return _assumed("efficiency_link", value, low, high, meaning, source)


def _seconds_call(value: float, low: float, high: float, source: str) -> Symbol:
    meaning = "a collective's start and end, whatever its size"
    return _assumed("seconds_call", value, low, high, meaning, source)


def _seconds_hop(value: float, low: float, high: float, source: str) -> Symbol:
    meaning = "one step from a chip to the next inside a domain"
    return _assumed("seconds_hop_link", value, low, high, meaning, source)


EFFICIENCY_LINK: dict[type[Join], Symbol] = {
    Switch: _efficiency_link(
        0.8, 0.75, 0.93, f"235 of 300 GB/s on 8 A100, 368 of 450 on 8 H200 by ring; {_BENCH}"
    ),
    Mesh: _efficiency_link(
        0.7, 0.6, 0.8, f"313 of 448 GB/s on 8 MI300X, 48 of 64 on two of them; {_BENCH}"
    ),
    Torus: _efficiency_link(0.9, 0.75, 1.0, "no published measurement at hand; a guess"),
    Bus: _efficiency_link(
        0.6, 0.3, 0.75, "35 to 45 of 64 GB/s on 8 H100 PCIe, docs.alayanew.com, nccl-tests"
    ),
}
SECONDS_CALL: dict[type[Join], Symbol] = {
    Switch: (_call := _seconds_call(20e-6, 8e-6, 50e-6, f"18 us for 32 KiB, 50 us for 4 MiB on 8 H200; {_BENCH}")),
    Mesh: _call,
    Torus: _seconds_call(3e-6, 1e-6, 10e-6, "compiled into the program (XLA); a guess"),
    Bus: _call,
}  # fmt: skip
SECONDS_HOP_LINK: dict[type[Join], Symbol] = {
    Switch: (_hop := _seconds_hop(1.5e-6, 0.5e-6, 3.4e-6, f"{_NCCL}: NVLink, ring, 0.5 to 3.4 us by protocol")),
    Mesh: _hop,
    Torus: _seconds_hop(1e-6, 0.5e-6, 2e-6, "about 1 us per hop, as remembered from the scaling book"),
    Bus: _seconds_hop(2.5e-6, 1e-6, 5.7e-6, f"{_NCCL}: PCI, ring, 1.0 to 5.7 us by protocol"),
}  # fmt: skip
EFFICIENCY_IN_SWITCH = _assumed(
    "efficiency_in_switch",
    0.65,
    0.58,
    0.72,
    "share of the link that a reduction inside the switch reaches",
    f"276 GB/s of an all-reduce on 8 H200 is 0.69, 479 on 8 B200 0.60 of (n + 1) / n; {_BENCH}",
)
EFFICIENCY_NETWORK = _assumed(
    "efficiency_network",
    0.9,
    0.8,
    0.97,
    "bus bandwidth of a large all-reduce between domains over the adapters' own",
    f"377 of 400 GB/s on 4 machines of 8 B200, 340 of 400 Gb/s with EFA; {_BENCH}",
)
SECONDS_HOP_NETWORK = _assumed(
    "seconds_hop_network",
    8e-6,
    2.7e-6,
    18e-6,
    "one step from a chip to one of another domain",
    f"{_NCCL}: network, ring, 2.7 to 18 us by protocol and release",
)
FULL_BISECTION = Symbol(
    "oversubscription",
    1,
    Basis.ASSUMED,
    source="non-blocking fabric, as clusters for training are built",
    meaning="bandwidth below the leaf switches over that above them",
)


@dataclass(frozen=True, slots=True)
class Fabric:
    """The two levels that chips are joined by: a fast link inside a domain, a network between.

    Attributes:
        domain: chips that the fast link joins; 1 where there is none.
        links_to: others that a chip of a mesh has a link to, used or not.
        joined: how; None where there is no link.
        bytes_per_second_link, bytes_per_second_network: of one chip, one direction.
        efficiency_link, efficiency_in_switch, efficiency_network: shares of these reached.
        seconds_call: of each collective; seconds_hop_link, seconds_hop_network: of each step.
        oversubscription: of what is above a leaf switch, which joins `domains_per_leaf`.
    """

    domain: int
    links_to: int
    joined: Join | None
    bytes_per_second_link: Symbol | None
    bytes_per_second_network: Symbol | None
    efficiency_link: Expr
    efficiency_in_switch: Expr
    efficiency_network: Expr
    seconds_call: Symbol
    seconds_hop_link: Symbol
    seconds_hop_network: Symbol
    oversubscription: Symbol = FULL_BISECTION
    domains_per_leaf: int = MACHINES_PER_LEAF

    def rate_link(self, members: Expr) -> Expr:
        """Bytes per second of one of `members` chips of a domain that talk to each other.

        Behind a switch all links serve any pair. In a mesh only those to the members do:
        two MI300X of eight have a seventh (ml-engineering: 48 against 313 GB/s). On a
        torus those along the axes that the members fill do, and an axis that does not
        close carries both directions of a ring.
        """
        return self._link * self._share(members)

    def hops(self, members: Expr) -> Expr:
        """Links that a byte crosses to a random one of `members` chips of its domain.

        On a closed ring a quarter of its length, along each axis of a torus that the
        members fill (scaling book, all-to-all on a torus); elsewhere one.
        """
        match self.joined:
            case Torus(side=side):
                return maximum(self._axes(members) * minimum(members, side) / 4, 1)
            case _:
                return number(1)

    @property
    def rate_neighbour(self) -> Expr:
        """Bytes per second from one chip to one other of its domain."""
        match self.joined:
            case Torus(axes=axes):
                return self._link / (2 * axes)
            case _:
                return self.rate_link(number(2))

    @property
    def rate_in_switch(self) -> Expr:
        """Bytes per second of one chip into a switch that reduces."""
        assert self.bytes_per_second_link is not None, "a switch joins by a link"
        return self.bytes_per_second_link * self.efficiency_in_switch

    def rate_network(self, domains: Expr) -> Expr:
        """Bytes per second of one chip to those of other domains, `domains` in all."""
        if self.bytes_per_second_network is None:
            rule = "is stated where ranks are in several domains"
            hint = "name a machine, such as dgx-h100: `isoflop hardware` lists them"
            problem = Problem("bytes_per_second_network", "not stated", rule, hint)
            raise InputError("fabric", [problem])
        rate = self.bytes_per_second_network * self.efficiency_network
        if self.oversubscription.given == 1:
            return rate
        return rate / where(domains - self.domains_per_leaf, self.oversubscription, 1)

    @property
    def _link(self) -> Expr:
        assert self.bytes_per_second_link is not None, "a domain of several chips has a link"
        return self.bytes_per_second_link * self.efficiency_link

    def _share(self, members: Expr) -> Expr:
        match self.joined:
            case Mesh():
                return maximum(members - 1, 1) / self.links_to
            case Torus(axes=axes, side=side):
                return self._axes(members) * where(members - side + 1, 2, 1) / (2 * axes)
            case _:
                return number(1)

    def _axes(self, members: Expr) -> Expr:
        """Axes of a torus that `members` chips fill."""
        assert isinstance(self.joined, Torus), "only a torus has axes"
        axes, side = self.joined.axes, self.joined.side
        return total([1, *(where(members - side**i, 1, 0) for i in range(1, axes))])


def fabric_of(cluster: Cluster) -> Fabric:
    """The fabric of a cluster, with the constants of benchmarks.

    >>> from isoflop.hardware import parse_cluster
    >>> fabric = fabric_of(parse_cluster("16xdgx-h100"))
    >>> fabric.domain, round(float(fabric.rate_link(number(8)).value / 1e9))
    (8, 360)
    """
    chip = cluster.chip
    kind = type(chip.joined) if chip.joined is not None else Bus
    return Fabric(
        domain=cluster.per_node or chip.per_node,
        links_to=max(chip.per_node - 1, 1),
        joined=chip.joined,
        bytes_per_second_link=chip.bytes_per_second_link,
        bytes_per_second_network=chip.bytes_per_second_network,
        efficiency_link=EFFICIENCY_LINK[kind],
        efficiency_in_switch=EFFICIENCY_IN_SWITCH,
        efficiency_network=EFFICIENCY_NETWORK,
        seconds_call=SECONDS_CALL[kind],
        seconds_hop_link=SECONDS_HOP_LINK[kind],
        seconds_hop_network=SECONDS_HOP_NETWORK,
    )
