"""What can go wrong, said so that it can be mended.

    IsoflopError                exit code
    ├── InputError       2      something the user said; carries every `Problem` found
    │   └── UnknownName  2      a name that is not in a catalogue, with the near ones
    ├── Infeasible       3      the input is fine, the plan or a stated limit is not
    └── Fault            1      ours: a broken promise inside isoflop

This module imports nothing of ours. Every other module may import it.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import ClassVar

#: Fields and places longer than this are cut in messages.
LONGEST_NAME = 200
#: The value of a field that was to be given and was not.
MISSING = "missing"
#: How rules begin: what a right value does, and what a wrong one must do.
_REGULAR = (
    "begin belong come count divide end equal exceed fill find fit give hold leave lie name nest run "
    "stand start take use"
)
_VERBS = {"is": "be", "are": "be", "has": "have", "goes": "go"} | {
    f"{verb}s": verb for verb in _REGULAR.split()
}


@dataclass(frozen=True, slots=True)
class Problem:
    """One thing wrong with one field, and how to mend it.

    >>> print(Problem("n_kv_heads", 4, "divides n_heads=6", "choose one of 1, 2, 3, 6"))
    n_kv_heads=4: must divide n_heads=6 (choose one of 1, 2, 3, 6)
    >>> print(Problem("budget", MISSING, "is given as --flops or --dollars"))
    budget is missing: must be given as --flops or --dollars
    """

    field: str
    value: object
    rule: str
    hint: str = ""

    def __str__(self) -> str:
        hint = f" ({clean(self.hint)})" if self.hint else ""
        field = shorten(self.field, LONGEST_NAME)
        missing = isinstance(self.value, str) and self.value == MISSING
        said = f"{field} is missing" if missing else f"{field}={shorten(self.value)}"
        return f"{said}: {clean(_must(self.rule))}{hint}"

    def to_json(self) -> dict[str, str]:
        return {
            "field": self.field,
            "value": shorten(self.value),
            "rule": self.rule,
            "hint": self.hint,
        }


def _must(rule: str) -> str:
    """A rule as an order.

    >>> _must("is at most 4"), _must("divides n_heads=6"), _must("is not given twice")
    ('must be at most 4', 'must divide n_heads=6', 'must not be given twice')
    >>> _must("times 2 is at most 4")
    'must hold: times 2 is at most 4'
    """
    verb, _, rest = rule.partition(" ")
    if verb not in _VERBS:
        return f"must hold: {rule}"
    denied = rest.startswith("not ")
    return f"must {'not ' * denied}{_VERBS[verb]} {rest.removeprefix('not ')}"


class IsoflopError(Exception):
    """Base of everything isoflop raises on purpose."""

    exit_code: ClassVar[int] = 1


class InputError(IsoflopError):
    """The user's input breaks one rule or several; all of them are listed.

    `where` says which input: a file, a zoo name, an option.
    """

    exit_code = 2

    def __init__(self, where: str, problems: Sequence[Problem]) -> None:
        self.where = where
        self.problems = tuple(problems)
        super().__init__(where, *self.problems)

    def __str__(self) -> str:
        where = shorten(self.where, LONGEST_NAME)
        return "\n".join(f"{where}: {problem}" for problem in self.problems)


class UnknownName(InputError):
    """A name that no catalogue holds; never replaced by a default.

    >>> print(UnknownName("accelerator", "h100-sxn", ["h100-sxm", "a100-sxm-80gb"]))
    accelerator h100-sxn: not known (did you mean h100-sxm?)
    """

    def __init__(self, kind: str, name: str, known: Iterable[str], hint: str = "") -> None:
        near = nearest(name, known)
        mend = f"did you mean {' or '.join(near)}?" if near else hint
        super().__init__(kind, [Problem("name", name, f"is a known {kind}", mend)])

    def __str__(self) -> str:
        (problem,) = self.problems
        mend = f" ({clean(problem.hint)})" if problem.hint else ""
        return f"{shorten(self.where, LONGEST_NAME)} {shorten(problem.value)}: not known{mend}"


class Infeasible(IsoflopError):
    """The input is legal but cannot be done within the stated limits."""

    exit_code = 3


class Fault(IsoflopError):
    """A promise isoflop made to itself is broken; please report it."""


def nearest(name: str, known: Iterable[str], most: int = 3) -> list[str]:
    """The known names that begin with a cut one, else those closest to a mistyped one; best first.

    >>> nearest("h100", ["hgx-h100", "h100-sxm", "h100-pcie"])
    ['h100-sxm', 'h100-pcie', 'hgx-h100']
    """
    folded = {k.casefold(): k for k in known}
    typed = name.casefold()[:200]
    begun = [k for k in folded if len(typed) > 1 and k.startswith(typed)]
    close = difflib.get_close_matches(typed, folded, n=most, cutoff=0.6)
    return [folded[k] for k in dict.fromkeys((*begun, *close))][:most]


def clean(text: str) -> str:
    """Text without control characters: one line stays one line, and a terminal stays itself."""
    return "".join(c if c.isprintable() else "�" for c in text)


def shorten(value: object, most: int = 60) -> str:
    """A value as an error prints it: one line, no control characters, bounded.

    Integers too long for Python's digit limit are described, not printed.
    """
    if isinstance(value, int) and not isinstance(value, bool) and abs(value) >= 10**most:
        return f"an integer of {value.bit_length()} bits"
    try:
        text = value if isinstance(value, str) else repr(value)
    except ValueError:  # a container that holds an integer past Python's digit limit
        text = f"a {type(value).__name__} with an integer too long to print"
    text = clean(text[: most + 1])
    return text if len(text) <= most else text[: most - 1] + "…"
