"""How published runs were made, where their table leaves it out: layouts, batches, software.

Single facts, each read at its source; none of them is a rate, and none is derived from the hours
that a prediction is held against.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from isoflop.check.published.table import Cells


@dataclass(frozen=True, slots=True)
class Recipe:
    """Cells by column, and where they were read. `instead` replaces what a table recalls."""

    source: str
    cells: dict[str, str] = field(default_factory=dict)
    instead: dict[str, str] = field(default_factory=dict)


_PYTHIA = {"global_batch_seqs": "1024", "seq_len": "2048", "precision": "fp16", "pp": "1",
           "recompute": "full", "zero_fsdp": "zero-1", "stack": "gpt-neox-2023"}  # fmt: skip
_NEOX = "EleutherAI/pythia models/*/*.yml: checkpoint-activations, ZeRO 1, attention flash"


def _pythia(tp: int, micro_batch: int, **more: str) -> Recipe:
    cells = {**_PYTHIA, "tp": str(tp), "micro_batch": str(micro_batch), **more}
    return Recipe(_NEOX, cells)


def _llama(source: str, seqs: int, seq_len: int, **more: str) -> Recipe:
    cells = {"global_batch_seqs": str(seqs), "seq_len": str(seq_len), **more}
    return Recipe(source, cells)


_LLAMA_1 = _llama(
    "Touvron 2023 (2302.13971), 2.3 and 2.4: batches of 4 M tokens, the outputs of linear layers "
    "are kept; 2,048 A100 (stated of the 65B)",
    2048, 2048, num_gpus="2048", recompute="selective",
)  # fmt: skip
_LLAMA_2 = _llama("meta-llama/llama-models models/llama2: batches of 4 M tokens", 1024, 4096)

#: Recipes by the model of a row, in lower case.
RECIPES: dict[str, Recipe] = {
    "llama-7b": _LLAMA_1,
    "llama-33b": _LLAMA_1,
    "llama-2-7b": _LLAMA_2,
    "llama-2-70b": _LLAMA_2,
    "opt-175b": Recipe(
        "facebookresearch/metaseq projects/OPT/chronicles/final_update.md: 300 B tokens of a corpus "
        "of 180 B, 4.30e23 FLOPs, which is 8 N D; Zhang 2022 (2205.01068), 2.4: 992 A100, FSDP with "
        "Megatron-LM's tensor parallelism, fp16, batches of 2 M tokens",
        {"num_gpus": "992", "seq_len": "2048", "global_batch_seqs": "992", "precision": "fp16",
         "tp": "8", "pp": "1", "micro_batch": "8", "recompute": "full", "zero_fsdp": "fsdp",
         "stack": "metaseq"},
        {"tokens": "300e9"},
    ),
    "gpt-3-175b": Recipe(
        "Brown 2020 (2005.14165), table 2.1: batches of 3.2 M tokens; V100 have no FlashAttention 2, so "
        "the software is taken to be of 2021",
        {"seq_len": "2048", "global_batch_seqs": "1600", "precision": "fp16", "stack": "deepspeed-2021"},
    ),
    "palm-540b": Recipe(
        "Chowdhery 2022 (2204.02311), section 4: rematerialization, batches of 2,048 sequences",
        {"seq_len": "2048", "global_batch_seqs": "2048", "recompute": "full"},
    ),
    "mpt-7b": Recipe(
        "mosaicml/mpt-7b: 440 A100, FSDP; mosaicml/llm-foundry scripts/train/benchmarking: full shards "
        "and full recomputation for a 7B on A100 40GB; four sequences each, the table's own batch unstated",
        {"seq_len": "2048", "global_batch_seqs": "1760", "tp": "1", "pp": "1", "micro_batch": "4",
         "recompute": "full", "zero_fsdp": "fsdp", "stack": "llm-foundry-2023-05"},
    ),
    "pythia-12b": _pythia(4, 8),
    "pythia-2.8b": _pythia(1, 16),
    "pythia-1.4b": _pythia(1, 16),
    "pythia-160m": _pythia(1, 32),
    "pythia-70m": _pythia(1, 32, stack="gpt-neox-2022"),
}  # fmt: skip


def with_run_recipe(cells: Cells) -> Cells:
    """The row with what its recipe says, where the row itself does not.

    >>> row = {"model": "Pythia-12B", "num_gpus": "256", "micro_batch": "4"}
    >>> found = with_run_recipe(Cells(row, 1))
    >>> found.text("tp"), found.text("micro_batch")
    ('4', '4')
    """
    recipe = RECIPES.get(cells.text("model").casefold())
    if recipe is None:
        return cells
    told = {name: text for name, text in recipe.cells.items() if not cells.text(name)}
    recalled = (
        {}
        if cells.text("verified") == "yes" and "recalled" not in cells.text("notes")
        else recipe.instead
    )
    told |= {name: text for name, text in recalled.items() if cells.text(name)}
    if not told:
        return cells
    filled = replace(cells, row={**cells.row, **told})
    filled.assume(f"{', '.join(told)}: {recipe.source}")
    return filled
