"""How the chips of one domain are joined: who reaches whom at which share of the link."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeAlias


@dataclass(frozen=True, slots=True)
class Switch:
    """Any chip reaches any other with all its links (NVSwitch).

    `reduces`: the switch adds up and copies what passes through it, from the third
    generation on (NCCL's NVLS).
    """

    reduces: bool = False


@dataclass(frozen=True, slots=True)
class Mesh:
    """Each chip has a link of its own to each other (xGMI, NVLink without a switch)."""


@dataclass(frozen=True, slots=True)
class Torus:
    """Links to the neighbours along `axes` axes only.

    An axis closes to a ring from `side` chips on: 16 where a full axis alone does
    (TPU v5e, v6e), 4 where cubes of 4 x 4 x 4 are joined by optical switches (v4, v5p).
    """

    axes: int
    side: int


@dataclass(frozen=True, slots=True)
class Bus:
    """PCI Express through the host's bridges, which the cards of one processor share."""


Join: TypeAlias = Switch | Mesh | Torus | Bus


def read_join(entry: str | dict[str, int]) -> Join:
    """A join as catalog.toml writes it: a word, or a torus with its axes.

    >>> read_join("reducing switch"), read_join({"axes": 3, "side": 4})
    (Switch(reduces=True), Torus(axes=3, side=4))
    """
    return Torus(**entry) if isinstance(entry, dict) else WORDS[entry]


WORDS: dict[str, Join] = {
    "switch": Switch(),
    "reducing switch": Switch(reduces=True),
    "mesh": Mesh(),
    "bus": Bus(),
}
