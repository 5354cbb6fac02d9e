"""Checks of what a plan is asked for; each gives the problems it finds, none raises."""

from __future__ import annotations

from collections.abc import Collection

from isoflop.errors import Problem


def whole(field: str, value: object, most: int) -> list[Problem]:
    """A whole number from 1 to `most`.

    >>> print(*whole("batch", 0, 8))
    batch=0: must be a whole number from 1 to 8
    """
    fine = isinstance(value, int) and not isinstance(value, bool) and 1 <= value <= most
    return [] if fine else [Problem(field, value, f"is a whole number from 1 to {most:,}")]


def one_of(field: str, value: str, allowed: Collection[str]) -> list[Problem]:
    """One of the names allowed."""
    rule = f"is one of {', '.join(allowed)}"
    return [] if value in allowed else [Problem(field, value, rule)]


def at_most(field: str, value: float | None, most: float, what: str) -> list[Problem]:
    """Above zero and up to `most`, which is `what`; nothing given is fine."""
    if value is None or (isinstance(value, (int, float)) and 0 < value <= most):
        return []
    return [Problem(field, value, f"lies above 0 and up to {what}, {most:g}")]
