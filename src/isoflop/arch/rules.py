"""Checks that collect every broken rule before they raise."""

from __future__ import annotations

import math
from typing import Any, Self, get_args

from isoflop.errors import InputError, Problem

#: Beyond any real model, small enough that every product of a few sizes stays printable.
LARGEST_SIZE = 10**12


class Rules:
    """The rules of one value, checked field by field; `close` raises what was broken.

    >>> class Box: width = 0
    >>> Rules(Box(), where="box").size("width").close()
    Traceback (most recent call last):
    isoflop.errors.InputError: box: width=0: must be a whole number from 1 to 1,000,000,000,000
    """

    def __init__(self, value: object, where: str | None = None) -> None:
        self.value = value
        self.where = where or type(value).__name__
        self.broken: list[Problem] = []

    def _get(self, field: str) -> Any:
        return getattr(self.value, field)

    def must(
        self, field: str, rule: str, holds: bool, hint: str = "", value: object = None
    ) -> Self:
        """A rule between fields."""
        if not holds:
            shown = value if value is not None else self._get_nested(field)
            self.broken.append(Problem(field, shown, rule, hint))
        return self

    def _get_nested(self, field: str) -> Any:
        value: Any = self.value
        for name in field.split("."):
            value = getattr(value, name, None)
        return value

    def size(self, field: str, least: int = 1) -> Self:
        """A whole number; booleans and floats are not whole numbers here."""
        value = self._get(field)
        whole = isinstance(value, int) and not isinstance(value, bool)
        rule = f"is a whole number from {least} to {LARGEST_SIZE:,}"
        return self.must(
            field, rule, whole and least <= value <= LARGEST_SIZE, value=repr_of(value)
        )

    def real(self, field: str, *, least: float | None = None, above: float | None = None) -> Self:
        """A finite real number."""
        value = self._get(field)
        real = isinstance(value, (int, float)) and not isinstance(value, bool)
        finite = real and abs(value) <= 1e30 and not math.isnan(value)
        rule = "is a finite number"
        if least is not None:
            rule, finite = f"{rule} of at least {least:g}", finite and value >= least
        if above is not None:
            rule, finite = f"{rule} above {above:g}", finite and value > above
        return self.must(field, rule, finite, value=repr_of(value))

    def share(self, field: str) -> Self:
        """A probability below one."""
        value = self._get(field)
        real = isinstance(value, (int, float)) and not isinstance(value, bool)
        return self.must(field, "lies from 0 up to, not including, 1", real and 0 <= value < 1,
                         value=repr_of(value))  # fmt: skip

    def one_of(self, field: str, choices: Any) -> Self:
        """One of a `Literal`'s or an enum's values."""
        allowed = get_args(choices) or tuple(choices)
        value = self._get(field)
        return self.must(field, f"is one of {', '.join(map(str, allowed))}", value in allowed,
                         value=repr_of(value))  # fmt: skip

    def text(self, field: str) -> Self:
        value = self._get(field)
        fine = isinstance(value, str) and 1 <= len(value) <= 128 and value.isprintable()
        return self.must(field, "is 1 to 128 printable characters", fine, value=repr_of(value))

    def identifier(self, field: str) -> Self:
        value = self._get(field)
        fine = isinstance(value, str) and value.isidentifier() and len(value) <= 64
        return self.must(
            field, "is a plain name of letters, digits and _", fine, value=repr_of(value)
        )

    def divides(self, part: str, whole: str) -> Self:
        """`part` divides `whole`; the hint lists the parts that would."""
        a, b = self._get(part), self._get(whole)
        near = [d for d in range(1, min(b, 4096) + 1) if b % d == 0][:24]
        hint = f"choose one of {', '.join(map(str, near))}"
        return self.must(part, f"divides {whole}={b}", b % a == 0, hint)

    def close(self) -> None:
        """Raise everything that was broken."""
        if self.broken:
            raise InputError(self.where, self.broken)


def repr_of(value: object) -> object:
    """A value to show even when it is None or empty."""
    return repr(value) if value is None or value == "" else value
