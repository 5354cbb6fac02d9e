"""The named models: zoo.toml, read when first asked for.

Each entry gives its family's numbers in our vocabulary, the count its authors or its
hub published, and where both come from. The count that isoflop derives is never
stored: a test puts it beside the published one.
"""

from __future__ import annotations

import re
import tomllib
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from isoflop.arch.families import FAMILIES
from isoflop.arch.spec import Arch, LinearScaling, Llama3Scaling, RopeScaling, YarnScaling
from isoflop.errors import UnknownName

_HEADER = re.compile(r'^\["?(?P<name>[^"\]]+)"?\]$', re.MULTILINE)

#: The kinds of rotary scaling by name; a table without `kind` is Llama 3's.
SCALINGS: dict[str, Callable[..., RopeScaling]] = {
    "linear": LinearScaling,
    "llama3": Llama3Scaling,
    "yarn": YarnScaling,
}


@dataclass(frozen=True, slots=True)
class ZooEntry:
    """A named model and what is published about its size.

    Attributes:
        published: parameters, as the authors or the hub state them; None where nobody does.
        published_to: what the last digit of `published` is worth; 1 for an exact count.
        source: where the shape is from.
        published_source: where the published count is from.
        note: why the published count and the spec's differ, or what the source leaves open.
    """

    name: str
    arch: Arch
    published: int | None
    published_to: int
    source: str
    published_source: str
    note: str = ""

    def agrees(self, params: int) -> bool:
        """Whether a count equals the published one to the digit that was published."""
        return self.published is not None and 2 * abs(params - self.published) <= self.published_to


def names() -> tuple[str, ...]:
    """The names of all models, in the order of zoo.toml.

    >>> "llama-3-8b" in names()
    True
    """
    return tuple(_sections())


@cache
def entry(name: str) -> ZooEntry:
    """The model called `name`.

    Raises:
        UnknownName: no such model; lists the near names.

    >>> entry("gpt3-175b").arch.n_layers
    96
    """
    if name not in _sections():
        raise UnknownName("model", name, _sections(), "`isoflop models` lists them")
    row = tomllib.loads(_sections()[name])
    family = FAMILIES[row.pop("family")]
    usual = {"published": None, "published_to": 1, "published_source": "", "note": ""}
    facts = {key: row.pop(key, default) for key, default in usual.items()}
    source = row.pop("source")
    if "scaling" in row:
        said = dict(row["scaling"])
        row["scaling"] = SCALINGS[said.pop("kind", "llama3")](**said)
    return ZooEntry(name=name, arch=family(name, **row), source=source, **facts)


@cache
def _sections() -> dict[str, str]:
    """Each model's own lines: parsing those of all takes longer than counting one."""
    text = Path(__file__).with_name("zoo.toml").read_text(encoding="utf-8")
    headers = list(_HEADER.finditer(text))
    ends = [*(header.start() for header in headers[1:]), len(text)]
    return {h["name"]: text[h.end() : end] for h, end in zip(headers, ends, strict=True)}
