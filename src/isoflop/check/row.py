"""One number, derived from the spec and found on the built module."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from isoflop.quantity import Node


@dataclass(frozen=True, slots=True)
class Row:
    """`path` begins with the quantity; the quantity alone is the sum of its paths.

    Attributes:
        reason: why the two differ, where that is known.
        allowed: the part of the built number by which they may differ; None: any, for a reason.
    """

    path: str
    derived: int
    built: int
    reason: str = ""
    allowed: float | None = 0.0

    @property
    def quantity(self) -> str:
        return self.path.partition("/")[0]

    @property
    def is_total(self) -> bool:
        return "/" not in self.path

    @property
    def equal(self) -> bool:
        return self.derived == self.built

    @property
    def agrees(self) -> bool:
        """Equal, or apart by no more than is allowed.

        >>> Row("saved", 99, 100, allowed=0.02).agrees, Row("params", 99, 100).agrees
        (True, False)
        """
        if self.allowed is None:
            return True
        return abs(self.derived - self.built) <= self.allowed * self.built

    def to_json(self) -> dict[str, Any]:
        return {
            "path": self.path,
            "derived": self.derived,
            "built": self.built,
            "equal": self.equal,
            "agrees": self.agrees,
            "reason": self.reason,
        }


def rows(quantity: str, derived: Mapping[str, int], built: Mapping[str, int]) -> Iterator[Row]:
    """Each path of either side, then their sums, all to be equal."""
    for path in [*derived, *(p for p in built if p not in derived)]:
        yield Row(f"{quantity}/{path}", derived.get(path, 0), built.get(path, 0))
    yield Row(quantity, sum(derived.values()), sum(built.values()))


def leaf_values(root: Node) -> dict[str, int]:
    """Every leaf of a tree with all its copies."""
    return {path: int(leaf.value * root.copies(path)) for path, leaf in root.leaves().items()}
