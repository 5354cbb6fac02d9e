"""The table of every `model_type`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from isoflop.arch.spec import Arch
from isoflop.errors import InputError, Problem
from isoflop.model.weights.table import Table
from isoflop.model.weights.tables import gpt, llama, moe, t5, vision

_LANGUAGES: Mapping[str, Table | Callable[[Arch], Table]] = {
    name: table for module in (gpt, llama, moe, t5) for name, table in module.TABLES.items()
}
#: Every type that is read and written.
TYPES = frozenset((*_LANGUAGES, *vision.TABLES))


def table_of(config: Mapping[str, Any], arch: Arch) -> Table:
    """A family's table, as it is for a spec.

    Raises:
        InputError: the family's tensors are not known.
    """
    model_type = str(config.get("model_type"))
    if model_type in vision.TABLES:
        with_tower = vision.TABLES[model_type]
        return with_tower(_table(vision.language_of(config), arch), arch)
    return _table(model_type, arch)


def _table(model_type: str, arch: Arch) -> Table:
    if model_type not in _LANGUAGES:
        rule = f"is a type whose tensors are read: {', '.join(sorted(TYPES))}"
        raise InputError(arch.name, [Problem("model_type", model_type, rule)])
    found = _LANGUAGES[model_type]
    return found if isinstance(found, Table) else found(arch)
