"""Seconds of the collectives, by algorithm, as formulas of bytes, group and fabric.

Each is a time per call plus a time per hop plus bytes over bandwidth (Hockney's model, with
which NCCL itself chooses: src/graph/tuning.cc). `size` is the whole buffer: what an
all-reduce adds up, what an all-gather ends and a reduce-scatter begins with, what one rank
of an all-to-all hands out, its own part included.

>>> from isoflop.hardware import parse_cluster
>>> from isoflop.hardware.fabric import fabric_of
>>> from isoflop.plan.network.group import group_of
>>> from isoflop.plan.layout import Layout
>>> fabric = fabric_of(parse_cluster("4xdgx-b200"))
>>> group = group_of(Layout(dp=32), fabric, "dp")
>>> size = number(2**34)
>>> chosen(group, fabric, size), round(2**34 / float(seconds("all_reduce", group, fabric, size).value) / 1e9)
('ring', 186)
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Literal, TypeAlias, get_args

from isoflop.hardware.fabric import Fabric
from isoflop.hardware.join import Switch
from isoflop.plan.network.group import Group
from isoflop.quantity import Expr, maximum, minimum, number, where

#: send: to the next rank of a pipeline.
Collective: TypeAlias = Literal[
    "all_reduce", "reduce_scatter", "all_gather", "all_to_all", "broadcast", "send"
]
COLLECTIVES: tuple[Collective, ...] = get_args(Collective)
Algorithm: TypeAlias = Callable[[Group, Fabric, Expr], Expr]


def ring_pass(group: Group, fabric: Fabric, size: Expr) -> Expr:
    """n - 1 steps of size / n around a ring: a reduce-scatter or an all-gather.

    Enough rings run side by side that every adapter of a domain carries one (Patarasuk 2009,
    JPDC 69:2; NCCL's rings): a border between domains is as wide as their adapters together.
    """
    n = group.size
    moved = (n - 1) / n * size * _seconds_per_byte(group, fabric)
    return moved + _hops(group, fabric, n - group.domains, group.domains - 1)


def ring(group: Group, fabric: Fabric, size: Expr) -> Expr:
    """An all-reduce: a reduce-scatter, then an all-gather; 2 (n - 1) / n of the bytes."""
    return 2 * ring_pass(group, fabric, size)


def tree(group: Group, fabric: Fabric, size: Expr) -> Expr:
    """An all-reduce up and down two binary trees over domains, a chain inside each.

    Every rank sends twice the bytes; the depth is logarithmic (Sanders 2009, Parallel
    Computing 35:12; NCCL's double binary trees).
    """
    moved = 2 * size * _seconds_per_byte(group, fabric)
    return moved + _hops(group, fabric, 2 * (group.per_domain - 1), 2 * group.depth)


def two_level(group: Group, fabric: Fabric, size: Expr) -> Expr:
    """Reduce-scatter inside, all-reduce of each shard over its own rail, all-gather inside."""
    return 2 * two_level_pass(group, fabric, size)


def two_level_pass(group: Group, fabric: Fabric, size: Expr) -> Expr:
    """A reduce-scatter or an all-gather, first on one level, then on the other."""
    m, d = group.per_domain, group.domains
    moved = (m - 1) / m * size * _link(group, fabric)
    moved += (d - 1) / d * size / m * _network(group, fabric)
    return moved + _hops(group, fabric, m - 1, d - 1)


def in_switch(group: Group, fabric: Fabric, size: Expr) -> Expr:
    """An all-reduce in the switch, and trees over rails where there are several domains.

    Each chip sends its part to be added up and one share of the sum to be copied: (m + 1) / m
    of the bytes, not 2 (m - 1) / m (NCCL's NVLS and NVLSTree).
    """
    m = group.per_domain
    moved = where(m - 1, (m + 1) / m / fabric.rate_in_switch, 0) * size
    moved += 2 * size / m * _network(group, fabric)
    return moved + _hops(group, fabric, where(m - 1, 2, 0), 2 * group.depth)


def direct(group: Group, fabric: Fabric, size: Expr) -> Expr:
    """An all-to-all: each rank sends each other its part at once, over link and network."""
    n, m = group.size, group.per_domain
    return _both(group, fabric, (m - 1) / n * size, (n - m) / n * size)


def relayed(group: Group, fabric: Fabric, size: Expr, crossing: Expr | None = None) -> Expr:
    """An all-to-all that crosses domains on its own rail and is dealt out over the link.

    `crossing` bytes leave the domain: fewer than what arrives, where one copy serves
    several receivers there (DeepSeek-V3, 2412.19437, section 3.2.2).
    """
    n, m = group.size, group.per_domain
    over = (n - m) / n * size if crossing is None else crossing
    return _both(group, fabric, (m - 1) / m * size, over)


def pipelined(group: Group, fabric: Fabric, size: Expr) -> Expr:
    """A broadcast around a ring, in pieces."""
    moved = size * _seconds_per_byte(group, fabric)
    return moved + _hops(group, fabric, group.size - group.domains, group.domains - 1)


def neighbour(group: Group, fabric: Fabric, size: Expr) -> Expr:
    """From one rank to the next; where any two neighbours are in different domains, by network."""
    n, d = group.size, group.domains
    near = number(0)
    if not group.alone:
        near = where(n - 1, 1, 0) * (size / fabric.rate_neighbour + fabric.seconds_hop_link)
    if group.together:
        return near
    return where(d - 1, size / fabric.rate_network(d) + fabric.seconds_hop_network, near)


#: What each collective may be done by, and its names in NCCL's words where it has one.
ALGORITHMS: Mapping[Collective, Mapping[str, Algorithm]] = {
    "all_reduce": {"ring": ring, "tree": tree, "two_level": two_level, "in_switch": in_switch},
    "reduce_scatter": {"ring": ring_pass, "two_level": two_level_pass},
    "all_gather": {"ring": ring_pass, "two_level": two_level_pass},
    "all_to_all": {"direct": direct, "relayed": relayed},
    "broadcast": {"ring": pipelined},
    "send": {"neighbour": neighbour},
}
#: What libraries choose among on their own. NCCL gathers and scatters by ring; an all-to-all
#: is relayed only by libraries made for it.
CHOSEN_AMONG: Mapping[Collective, tuple[str, ...]] = {
    "all_reduce": ("ring", "tree", "two_level", "in_switch"),
    "reduce_scatter": ("ring",),
    "all_gather": ("ring",),
    "all_to_all": ("direct",),
    "broadcast": ("ring",),
    "send": ("neighbour",),
}


def seconds(kind: Collective, group: Group, fabric: Fabric, size: Expr) -> Expr:
    """Seconds of one collective by the fastest algorithm that a library would choose.

    Zero for a group of one.

    Raises:
        InputError: the group spans domains and the chip's network is not stated.
    """
    ways = [ALGORITHMS[kind][name] for name in _offered(kind, group, fabric)]
    times = [way(group, fabric, size) for way in ways]
    return called(group, fabric, times[0] if len(times) == 1 else minimum(*times))


def called(group: Group, fabric: Fabric, moving: Expr) -> Expr:
    """What moving takes and the call itself, where there is anyone to talk to."""
    return where(group.size - 1, fabric.seconds_call + moving, 0)


def chosen(group: Group, fabric: Fabric, size: Expr) -> str:
    """The algorithm that an all-reduce of `size` bytes is done by."""
    times = {
        name: float(ALGORITHMS["all_reduce"][name](group, fabric, size).value)
        for name in _offered("all_reduce", group, fabric)
    }
    return min(times, key=lambda name: times[name])


def share_sent(kind: Collective, group: Group) -> Expr:
    """Bytes that each rank sends per byte of the buffer, by the ring or directly."""
    n = group.size
    match kind:
        case "all_reduce":
            return 2 * (n - 1) / n
        case "reduce_scatter" | "all_gather" | "all_to_all":
            return (n - 1) / n
        case "broadcast" | "send":
            return where(n - 1, 1, 0)


def _offered(kind: Collective, group: Group, fabric: Fabric) -> tuple[str, ...]:
    reduces = fabric.joined == Switch(reduces=True) and not group.alone
    return tuple(name for name in CHOSEN_AMONG[kind] if reduces or name != "in_switch")


def _link(group: Group, fabric: Fabric) -> Expr:
    """Seconds per byte over a chip's link; zero where no two ranks share a domain."""
    if group.alone:
        return number(0)
    return where(group.per_domain - 1, 1 / fabric.rate_link(group.per_domain), 0)


def _network(group: Group, fabric: Fabric) -> Expr:
    """Seconds per byte over a chip's adapters; zero where all ranks share a domain."""
    if group.together:
        return number(0)
    return where(group.domains - 1, 1 / fabric.rate_network(group.domains), 0)


def _seconds_per_byte(group: Group, fabric: Fabric) -> Expr:
    """Of the narrowest place on rings through all ranks."""
    within, between = _link(group, fabric), _network(group, fabric)
    if group.alone or group.together:
        return between if group.alone else within
    return maximum(within, between / group.per_domain)


def _hops(group: Group, fabric: Fabric, within: Expr, between: Expr) -> Expr:
    """Seconds of so many steps inside domains and between them."""
    near = number(0) if group.alone else within * fabric.seconds_hop_link
    return near if group.together else near + between * fabric.seconds_hop_network


def _both(group: Group, fabric: Fabric, inside: Expr, outside: Expr) -> Expr:
    """Bytes to ranks inside and outside the domain, at the same time."""
    m, d = group.per_domain, group.domains
    near = inside * fabric.hops(m) * _link(group, fabric)
    moved = maximum(near, outside * _network(group, fabric))
    return moved + _hops(group, fabric, where(m - 1, 1, 0), where(d - 1, 1, 0))
