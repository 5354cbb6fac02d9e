"""Bytes of a pipeline's rank as formulas over the sizes of a layout: one for each kind of rank."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

from isoflop.plan.memory.flight import Share


class Content(NamedTuple):
    """What a rank holds, but for how many layers of each kind."""

    first: bool
    last: bool
    kinds: tuple[str, ...]
    mirrored: tuple[str, ...]

    @classmethod
    def of(cls, share: Share) -> Content:
        return cls(
            share.first, share.last, tuple(sorted(share.layers)), tuple(sorted(share.mirrored))
        )

    @property
    def share(self) -> Share:
        """Of one layer of each kind; how many there are is put in later."""
        own, mirrored = (dict.fromkeys(kinds, 1) for kinds in (self.kinds, self.mirrored))
        return Share(own, mirrored, self.first, self.last)

    @property
    def counts(self) -> tuple[str, ...]:
        """The names of how many layers of each kind there are."""
        own = [f"n_{kind}_stage" for kind in self.kinds]
        return (*own, *(f"n_{kind}_mirror" for kind in self.mirrored))

    def counted(self, share: Share) -> dict[str, int]:
        """How many there are in a rank of this content, by `counts`."""
        own = [share.layers[kind] for kind in self.kinds]
        mirrored = [share.mirrored[kind] for kind in self.mirrored]
        return dict(zip(self.counts, [*own, *mirrored], strict=True))


class Stages(NamedTuple):
    """Ranks of equal content, one for each shape of pipeline: its index and its layers."""

    content: Content
    stage: dict[int, int]
    shares: dict[int, Share]


def stages_by_content(shapes: Sequence[Mapping[int, Share]]) -> Iterable[Stages]:
    """The ranks of every shape that may hold most, those of equal content together.

    A shape with two ranks of one content (of eight and of seven layers) comes twice.

    >>> one = {0: Share({"layer": 3}, {}, True, False), 1: Share({"layer": 4}, {}, False, False)}
    >>> [(found.content.first, found.stage) for found in stages_by_content([one, one])]
    [(True, {0: 0, 1: 0}), (False, {0: 1, 1: 1})]
    """
    found: dict[tuple[Content, int], Stages] = {}
    for shape, shares in enumerate(shapes):
        met: Counter[Content] = Counter()
        for rank, share in shares.items():
            content = Content.of(share)
            key = content, met[content]
            met[content] += 1
            one = found.setdefault(key, Stages(content, {}, {}))
            one.stage[shape], one.shares[shape] = rank, share
    return found.values()
