"""How a family names and stores its tensors, as one table that serves both ways.

Names stand without `.weight` and `.bias` where they have them in common with ours; a name in
full is matched as it is. What of a table a model lacks (a bias, a norm) is passed over, so one
table serves all shapes of a family.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TypeAlias

import torch

from isoflop.arch.spec import Arch
from isoflop.errors import Fault, InputError, Problem
from isoflop.model.weights.change import Change, Joined, Listed, Same, Tensors

#: A value, not a call: a frozen default may be shared.
_SAME = Same()


@dataclass(frozen=True, slots=True)
class Stored:
    """What a family calls a tensor, and how it stores it.

    A `{}` in the name counts what is stored one by one.
    """

    name: str
    change: Change = _SAME


#: Ours -> theirs. Several of ours are stored as one.
Names: TypeAlias = Mapping[str | tuple[str, ...], str | Stored]

QKV = ("attention.q", "attention.k", "attention.v")
GATE_UP = ("feed_forward.gate", "feed_forward.up")


def joined(name: str) -> Stored:
    """Several of ours, one after the other."""
    return Stored(name, Joined())


def listed(name: str) -> Stored:
    """One of ours, cut along its first axis."""
    return Stored(name, Listed())


@dataclass(frozen=True, slots=True)
class Stack:
    """A stack of layers: where layer {} stands with us and with them, and its tensors."""

    ours: str
    theirs: str
    names: Names


@dataclass(frozen=True, slots=True)
class Table:
    """A family's tensors.

    Attributes:
        whole: those outside of layers.
        stacks: those of layers.
        copies: names under which files may hold the token vectors again.
        prefix: what files of the bare model, without its head, leave away.
        older: patterns of names that other versions write, and what stands here for them; each
            is tried on what the one before left.
        ignored: patterns of names that hold nothing of ours: masks, frequencies, unused parts.
    """

    whole: Names
    stacks: tuple[Stack, ...]
    copies: tuple[str, ...] = ()
    prefix: str = ""
    older: tuple[tuple[str, str], ...] = ()
    ignored: tuple[str, ...] = ()

    def spelt(self, name: str) -> tuple[str, ...]:
        """What a file's name may be here: as it is, with the prefix, or put into today's words.

        >>> Table({}, (), prefix="model.", older=((r"^old", "new"),)).spelt("old.norm")
        ('old.norm', 'model.old.norm', 'new.norm')
        """
        today = name
        for pattern, replacement in self.older:
            today = re.sub(pattern, replacement, today)
        return name, f"{self.prefix}{name}", today

    def entries(self, arch: Arch) -> Iterator[tuple[tuple[str, ...], Stored]]:
        """Every entry in full names, those of layers once for each."""
        yield from _full(self.whole, "", "")
        for stack in self.stacks:
            for i in range(_n_layers(arch, stack.ours)):
                yield from _full(stack.names, stack.ours.format(i), stack.theirs.format(i))


def _n_layers(arch: Arch, ours: str) -> int:
    towers = {"encoder": arch.encoder, "vision": arch.vision}
    tower = towers.get(ours.partition(".")[0], arch)
    return 0 if tower is None else len(tower.layers)


def _full(
    names: Names, our_place: str, their_place: str
) -> Iterator[tuple[tuple[str, ...], Stored]]:
    """An entry as weights, as biases, and as it stands: which of them there are, the model says."""
    for said, kept in names.items():
        ours = (said,) if isinstance(said, str) else said
        stored = Stored(kept) if isinstance(kept, str) else kept
        for suffix in (".weight", ".bias", ""):
            full = tuple(f"{our_place}{name}{suffix}" for name in ours)
            yield full, Stored(f"{their_place}{stored.name}{suffix}", stored.change)


@dataclass(frozen=True, slots=True)
class Pair:
    """Tensors of ours, and those that hold the same numbers in a family's files."""

    ours: Mapping[str, torch.Size]
    theirs: Mapping[str, torch.Size]
    change: Change

    @classmethod
    def of(cls, ours: Mapping[str, torch.Size], stored: Stored) -> Pair:
        """What the family stores of `ours`, from shapes alone."""
        unborn = tuple(torch.empty(shape, device="meta") for shape in ours.values())
        kept = stored.change.join(unborn, _axis(ours))
        names = (stored.name.replace("{}", str(i)) for i in range(len(kept)))
        return cls(
            ours, {name: x.shape for name, x in zip(names, kept, strict=True)}, stored.change
        )

    def join(self, ours: Tensors) -> Tensors:
        """Ours to theirs."""
        return self.change.join(ours, _axis(self.ours))

    def split(self, theirs: Tensors) -> Tensors:
        """Theirs to ours."""
        axis = _axis(self.ours)
        return self.change.split(theirs, [shape[axis] for shape in self.ours.values()], axis)


def _axis(ours: Mapping[str, torch.Size]) -> int:
    """The axis of outputs: of a weight [..., out, in] the one before the last."""
    name, shape = next(iter(ours.items()))
    return -2 if name.endswith(".weight") and len(shape) > 1 else -1


def pairs(
    table: Table, arch: Arch, shapes: Mapping[str, torch.Size], most: int | None = None
) -> tuple[Pair, ...]:
    """Every tensor of a model, paired with the family's, in the order of the table.

    Args:
        shapes: of the model's parameters and lasting buffers, by name.
        most: how many the family's can be; lists of a billion experts are not made.

    Raises:
        InputError: the family has more tensors than `most`.
        Fault: the table does not have one place for each of the model's.
    """
    found, n_theirs = [], 0
    for ours, stored in table.entries(arch):
        if not all(name in shapes for name in ours):
            continue
        n_theirs += shapes[ours[0]][0] if isinstance(stored.change, Listed) else 1
        if most is not None and n_theirs > most:
            rule = f"is at most {most:,} for the files that there are"
            raise InputError(arch.name, [Problem("tensors", f"{n_theirs:,} or more", rule)])
        found.append(Pair.of({name: shapes[name] for name in ours}, stored))
    times = Counter(name for pair in found for name in pair.ours)
    if odd := [name for name in shapes if times[name] != 1]:
        raise Fault(f"{arch.name}: the family's table does not name {', '.join(odd)} once")
    return tuple(found)
