"""Pieces of formulas that many settings share, each made once."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, TypeVar, cast

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Made:
    """Pieces by name: of settings alike but for what their names say."""

    pieces: dict[object, Any] = field(default_factory=dict)

    def once(self, name: object, make: Callable[[], T]) -> T:
        """The piece of this name, made where it is not there.

        >>> made = Made()
        >>> made.once("a", lambda: 1), made.once("a", lambda: 2)
        (1, 1)
        """
        if name not in self.pieces:
            self.pieces[name] = make()
        return cast("T", self.pieces[name])
