"""Recipes that a source published beside its table, for cells that the table leaves out."""

from __future__ import annotations

from dataclasses import replace

from isoflop.check.published.table import Cells

#: Micro-batch and chunks per stage of Narayanan 2021 (2104.04473), table 1, by model.
SC21 = "NVIDIA/Megatron-LM examples/sc21/run_table_1.sh"
_TABLE_1: dict[str, tuple[int, int]] = {
    "GPT-1.7B": (16, 1), "GPT-3.6B": (16, 1), "GPT-7.5B": (16, 1), "GPT-18.4B": (8, 1),
    "GPT-39.1B": (4, 1), "GPT-76.1B": (2, 3), "GPT-145.6B": (2, 2), "GPT-310.1B": (1, 2),
    "GPT-529.6B": (1, 3), "GPT-1008.0B": (1, 1),
}  # fmt: skip


def with_recipe(cells: Cells) -> Cells:
    """The row with what its source's recipe says, where the row itself does not.

    Table 1 states no micro-batch; table 2 of the same paper states it, and is left alone.

    >>> row = {"source_family": "megatron-2021", "model": "GPT-7.5B"}
    >>> with_recipe(Cells(row, 1)).text("micro_batch")
    '16'
    """
    found = _TABLE_1.get(cells.text("model"))
    stated = cells.text("micro_batch")
    if cells.text("source_family") != "megatron-2021" or found is None or stated:
        return cells
    micro_batch, chunks = found
    told = {"micro_batch": str(micro_batch), "virtual_pp": str(chunks)}
    filled = replace(cells, row={**cells.row, **told})
    filled.assume(f"micro_batch, virtual_pp: {SC21}")
    return filled
