"""Laws from papers, each with its source: the rows of published.toml."""

from __future__ import annotations

import tomllib
from functools import cache
from importlib.resources import files

from isoflop.errors import UnknownName
from isoflop.laws.form import Law


def published_laws() -> dict[str, Law]:
    """Every published law by name, in the file's order.

    >>> list(published_laws())[:2]
    ['hoffmann-2022', 'hoffmann-2022-unrounded']
    """
    return dict(_rows())


def find_law(name: str) -> Law:
    """A published law by its name.

    Raises:
        UnknownName: no such law; the near names are in the message.

    >>> find_law("besiroglu-2024").E
    1.8172
    """
    laws = _rows()
    if name not in laws:
        raise UnknownName("law", name, laws, f"known: {', '.join(laws)}")
    return laws[name]


@cache
def _rows() -> dict[str, Law]:
    text = files("isoflop.laws").joinpath("published.toml").read_text(encoding="utf-8")
    return {name: Law(name=name, **row) for name, row in tomllib.loads(text).items()}
