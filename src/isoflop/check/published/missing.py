"""What physics predictions are known to lack, told where the errors of a family show it.

`missing.toml` holds what is known and from where. Nothing of it is told of a family that meets
its aim without a bias, and no entry whose own rows do not err in its direction.
"""

from __future__ import annotations

import re
import tomllib
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import cache
from importlib import resources
from typing import Any

from isoflop.check.published.score import Judged, Score, score

#: A mean of signed errors farther from zero than this many of its standard errors is a bias.
SHOWN = 2.0
#: Below zero predictions are too small.
DIRECTIONS = {"fast": -1, "low": -1, "slow": 1, "high": 1}
NOT_KNOWN = "not known"


@dataclass(frozen=True, slots=True)
class Miss:
    """One thing that a family's numbers show: a mean error above its aim, or a bias.

    `beyond` is the aim, or twice the standard error of the bias; `of` the sort of rows.
    """

    what: str
    of: str
    n: int
    value: float
    beyond: float


@dataclass(frozen=True, slots=True)
class Missing:
    """What is missing, with the rows that show it and their mean signed error.

    One that says "not known" stands where a family misses and no reason is known.
    """

    what: str
    source: str
    rows: int
    bias: float


@dataclass(frozen=True, slots=True)
class Lacking:
    """A family's misses and what explains them; both empty where it meets its aim."""

    misses: tuple[Miss, ...] = ()
    missing: tuple[Missing, ...] = ()

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def lacking(rows: Sequence[Judged]) -> Lacking:
    """What the rows of one family show, and what is known to be missing.

    >>> fast = [Judged(str(i), "mine", "h100-sxm bf16", "m", "seconds", 1.0, 0.7 + i / 100, sort="dense")
    ...         for i in range(8)]
    >>> [miss.what for miss in lacking(fast).misses], lacking(fast).missing[0].what
    (['mean', 'bias'], 'not known')
    >>> lacking([Judged("a", "mine", "g", "m", "seconds", 1.0, 1.01, sort="dense")])
    Lacking(misses=(), missing=())
    """
    misses = tuple(_misses(rows))
    if not misses:
        return Lacking()
    whole = score("", rows)
    assert whole.bias is not None
    unknown = Missing(NOT_KNOWN, "", whole.n, whole.bias)
    return Lacking(misses, tuple(_reasons(rows)) or (unknown,))


def _misses(rows: Sequence[Judged]) -> Iterator[Miss]:
    for sort in dict.fromkeys(row.sort for row in rows):
        found, aim = score(sort, [r for r in rows if r.sort == sort]), _table()["aim"].get(sort)
        if aim is not None and found.mape is not None and found.mape > aim:
            yield Miss("mean", sort, found.n, found.mape, aim)
    found = score("", rows)
    if found.bias is not None and _biased(found):
        assert found.bias_error is not None
        yield Miss("bias", "all", found.n, found.bias, SHOWN * found.bias_error)


def _biased(found: Score) -> bool:
    error = found.bias_error
    return found.bias is not None and error is not None and abs(found.bias) > SHOWN * error


def _reasons(rows: Sequence[Judged]) -> Iterator[Missing]:
    """What is known of these rows and shown by them."""
    for entry in _table()["known"]:
        own = score("", [row for row in rows if _meant(entry, row)])
        if own.bias is not None and _biased(own) and own.bias * DIRECTIONS[entry["direction"]] > 0:
            yield Missing(entry["what"], entry["source"], own.n, own.bias)


def _meant(entry: dict[str, str], row: Judged) -> bool:
    patterns = ((entry.get("model", ""), row.model), (entry.get("on", ""), row.group))
    same = row.family == entry["family"] and (row.sort == "memory") is (entry.get("of") == "memory")
    return same and all(re.search(pattern, text) for pattern, text in patterns)


@cache
def _table() -> dict[str, Any]:
    text = resources.files("isoflop.check.published").joinpath("missing.toml").read_text("utf-8")
    return tomllib.loads(text)
