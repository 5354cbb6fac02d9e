"""A foreign config while it is read: typed access, and a memory of what was asked.

The memory is what lets the reader say which keys it did not understand, and which
values came from the defaults of the class that the config names.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Self, TypeVar

from isoflop.arch.rules import LARGEST_SIZE
from isoflop.arch.spec import Arch
from isoflop.errors import InputError, Problem

Value = TypeVar("Value")


class Config:
    """One table of keys. A value of the wrong type is noted, and its default stands in
    until `close` raises everything that was noted.

    >>> config = Config({"n_head": 8, "extra": 1}, "config.json")
    >>> config.size("n_head", 12), config.size("n_layer", 12)
    (8, 12)
    >>> sorted(config.unread()), config.defaulted
    (['extra'], ['n_layer=12'])
    """

    def __init__(
        self, keys: dict[str, Any], where: str, path: str = "", parent: Config | None = None
    ) -> None:
        self.keys = keys
        self.where = where
        self.path = path
        self.asked: set[str] = set()
        self.defaulted: list[str] = [] if parent is None else parent.defaulted
        self.broken: list[Problem] = [] if parent is None else parent.broken
        self.tables: list[Config] = []

    def has(self, key: str) -> bool:
        """Whether the key is given and not null; asking counts as reading it."""
        self.asked.add(key)
        return self.keys.get(key) is not None

    def size(self, key: str, default: int) -> int:
        return self._whole(key, default, 1, LARGEST_SIZE)

    def count(self, key: str, default: int) -> int:
        """A size that may be nothing."""
        return self._whole(key, default, 0, LARGEST_SIZE)

    def layers(self, key: str, default: int) -> int:
        """A number of layers: lists of that length are made from it, so it is bounded here."""
        return self._whole(key, default, 1, Arch.MAX_LAYERS)

    def size_or_none(self, key: str, default: int | None = None) -> int | None:
        """A size or null; absent is `default`."""
        if key not in self.keys and default is not None:
            return self.size(key, default)
        return self.size(key, default or 1) if self.has(key) else None

    def real(self, key: str, default: float) -> float:
        value = self._given(key, default)
        return float(value) if _is_real(value) else self._wrong(key, "is a finite number", default)

    def real_or_none(self, key: str, default: float | None = None) -> float | None:
        """A number or null; absent is `default`."""
        if key not in self.keys and default is not None:
            return self.real(key, default)
        return self.real(key, default or 0.0) if self.has(key) else None

    def needed(self, key: str, instead: float = 1.0) -> float:
        """A number without a default; `instead` stands in where it is missing."""
        if self.has(key):
            return self.real(key, instead)
        return float(self._wrong(key, "is given", instead))

    def wholes(self, key: str) -> tuple[int, ...]:
        """A list of whole numbers; absent or null is none of them."""
        given = self.keys[key] if self.has(key) else ()
        if isinstance(given, (list, tuple)) and all(_is_whole(x) for x in given):
            return tuple(given)
        return self._wrong(key, "is a list of whole numbers", ())

    def choices(self, key: str, choices: Mapping[str, Value]) -> tuple[Value, ...] | None:
        """The meanings of a list of words; None where it is absent or null."""
        if not self.has(key):
            return None
        given = self.keys[key]
        if isinstance(given, (list, tuple)) and all(
            isinstance(word, str) and word in choices for word in given
        ):
            return tuple(choices[word] for word in given)
        return self._wrong(key, f"is a list of {', '.join(sorted(choices))}", None)

    def reals(self, key: str) -> tuple[float, ...]:
        given = self.keys[key] if self.has(key) else None
        if isinstance(given, (list, tuple)) and all(map(_is_real, given)):
            return tuple(float(x) for x in given)
        return self._wrong(key, "is a list of finite numbers", ())

    def flag(self, key: str, default: bool) -> bool:
        value = self._given(key, default)
        return value if isinstance(value, bool) else self._wrong(key, "is true or false", default)

    def choice(self, key: str, choices: Mapping[str, Value], default: str) -> Value:
        """The meaning of one of several words."""
        value = self._given(key, default)
        if isinstance(value, str) and value in choices:
            return choices[value]
        rule = f"is one of {', '.join(sorted(choices))}"
        return self._wrong(key, rule, choices[default])

    def table(self, key: str) -> Config | None:
        """The table under a key; None where it is absent, null or empty."""
        if not self.has(key):
            return None
        value = self.keys[key]
        if not isinstance(value, dict) or not all(isinstance(name, str) for name in value):
            self._wrong(key, "is a table of keys and values", None)
            return None
        if not value:
            return None
        path = f"{self.path}{key}."
        if (asked := next((x for x in self.tables if x.path == path), None)) is not None:
            return asked
        self.tables.append(Config(value, self.where, path, self))
        return self.tables[-1]

    def inner(self, key: str) -> Config:
        """The table under a key; an empty one where it is absent, so that defaults are told."""
        return self.table(key) or Config({}, self.where, f"{self.path}{key}.", self)

    def only(self, key: str, value: object, why: str) -> None:
        """A key for which the spec can say one value only."""
        if self.has(key) and self.keys[key] != value:
            self._wrong(key, f"is {str(value).lower()}", None, why)

    def rename(self, error: InputError, names: Mapping[str, str]) -> InputError:
        """A broken rule of the spec, said of the key that the config has for it."""
        problems = [
            Problem(names.get(p.field, p.field), p.value, p.rule, p.hint) for p in error.problems
        ]
        return InputError(self.where, problems)

    def unread(self) -> list[str]:
        """The keys nobody asked for, those of inner tables too. Null and empty say nothing."""
        own = [
            f"{self.path}{key}"
            for key, value in self.keys.items()
            if key not in self.asked and value is not None and value not in ({}, [], "")
        ]
        return own + [key for table in self.tables for key in table.unread()]

    def close(self) -> Self:
        """Raise everything that was noted."""
        if self.broken:
            raise InputError(self.where, self.broken)
        return self

    def _whole(self, key: str, default: int, least: int, most: int) -> int:
        value = self._given(key, default)
        if _is_whole(value) and least <= value <= most:
            return int(value)
        return self._wrong(key, f"is a whole number from {least} to {most:,}", default)

    def _given(self, key: str, default: Any) -> Any:
        self.asked.add(key)
        if key not in self.keys:
            self.defaulted.append(f"{self.path}{key}={default}")
            return default
        return self.keys[key]

    def _wrong(self, key: str, rule: str, default: Value, hint: str = "") -> Value:
        value = self.keys.get(key)
        shown = "null" if value is None else f'"{value}"' if isinstance(value, str) else value
        self.broken.append(Problem(f"{self.path}{key}", shown, rule, hint))
        return default


def _is_whole(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_real(value: object) -> bool:
    """A finite number; 1e30 as in rules.py, and the comparison is false for NaN."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) <= 1e30
