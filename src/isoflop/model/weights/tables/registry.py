"""The table of every `model_type`."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from isoflop.arch.spec import Arch
from isoflop.errors import InputError, Problem
from isoflop.model.weights.table import Table
from isoflop.model.weights.tables import gpt, llama, moe, t5

TABLES: Mapping[str, Table | Callable[[Arch], Table]] = {
    name: table for module in (gpt, llama, moe, t5) for name, table in module.TABLES.items()
}


def table_of(model_type: str, arch: Arch) -> Table:
    """A family's table, as it is for a spec.

    Raises:
        InputError: the family's tensors are not known.
    """
    if model_type not in TABLES:
        rule = f"is a type whose tensors are read: {', '.join(sorted(TABLES))}"
        raise InputError(arch.name, [Problem("model_type", model_type, rule)])
    found = TABLES[model_type]
    return found if isinstance(found, Table) else found(arch)
