"""Counted against published parameters: docs/counts-validation.md is what this prints.

    python benchmarks/counts_published.py PATH/TO/model_specs.csv -o docs/counts-validation.md

A row is counted by the zoo's entry for that model, or else by a spec made from the row's own
shape; its parameters are compared with what its authors published and, where the table has
one, with the table's independent arithmetic.
"""

from __future__ import annotations

import argparse
import csv
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from decimal import Decimal
from pathlib import Path
from typing import TypeAlias

from isoflop.arch import Arch, gpt, llama
from isoflop.arch.families import stablelm
from isoflop.arch.zoo import entry, names
from isoflop.count import params

Row: TypeAlias = dict[str, str]

# --- which model a row means ------------------------------------------------------------------

#: The table's names and the zoo's, where they are not the same but for case and "-hf".
ZOO = {
    "Llama-3.3-70B-Instruct": "llama-3.3-70b",
    "tiny-llama-1.1b": "tinyllama-1.1b",
    "Mistral-Large-Instruct-2407": "mistral-large-2407",
    "Mixtral-8x7B-v0.1": "mixtral-8x7b",
    "Mixtral-8x22B-v0.1": "mixtral-8x22b",
    "Gopher-280B": "gopher-280b",
    "Chinchilla-70B": "chinchilla-70b",
    **{f"LLaMA-{n}": f"llama-1-{n.lower()}" for n in ("7B", "13B", "33B", "65B")},
    **{f"GPT-3 {n}": f"gpt3-{n.lower()}" for n in ("Small", "Medium", "Large", "XL", "2.7B",
                                                  "6.7B", "13B", "175B")},
    **{f"GPT-{n}B": f"megatron-{n}b" for n in ("1.7", "3.6", "7.5", "18.4", "39.1", "76.1",
                                              "145.6", "310.1", "529.6")},
    "GPT-1008B": "megatron-1t",
}  # fmt: skip


def zoo_name(row: Row) -> str | None:
    """The zoo's entry for a row; None where it has none."""
    name = ZOO.get(row["model"], row["model"].lower().removesuffix("-hf"))
    return name if name in names() else None


def whole(row: Row, *keys: str) -> int:
    """The first of several columns that is filled."""
    return int(next(row[key] for key in keys if row[key]))


def of_llama(row: Row) -> Arch:
    return llama(row["model"], d_model=whole(row, "hidden"), n_layers=whole(row, "layers"),
                 n_heads=whole(row, "heads"), n_kv_heads=whole(row, "kv_heads"),
                 d_ff=whole(row, "ffn"), vocab_size=whole(row, "padded_vocab", "vocab"),
                 max_seq_len=whole(row, "max_pos"))  # fmt: skip


def of_gpt(row: Row) -> Arch:
    return gpt(row["model"], d_model=whole(row, "hidden"), n_layers=whole(row, "layers"),
               n_heads=whole(row, "heads"), vocab_size=whole(row, "vocab"),
               d_ff=whole(row, "ffn"), max_seq_len=whole(row, "max_pos"))  # fmt: skip


def of_stablelm(row: Row) -> Arch:
    return stablelm(row["model"], d_model=whole(row, "hidden"), n_layers=whole(row, "layers"),
                    n_heads=whole(row, "heads"), n_kv_heads=whole(row, "kv_heads"),
                    d_ff=whole(row, "ffn"), vocab_size=whole(row, "padded_vocab"),
                    max_seq_len=whole(row, "max_pos"))  # fmt: skip


#: How a row that the zoo lacks is built, by the table's family.
BUILDERS: dict[str, Callable[[Row], Arch]] = {
    **dict.fromkeys(("open_llama_3b", "open_llama_7b", "open_llama_13b", "CodeLlama", "Mistral"), of_llama),
    **dict.fromkeys(("NeMo-GPT3", "Megatron", "llm-foundry-MPT"), of_gpt),
    "stable": of_stablelm,
}  # fmt: skip

# --- what differs, and why --------------------------------------------------------------------

_NORM = "the paper's formula (12 l h^2 (1 + 13 / (12 h) + (V + s) / (12 l h))) leaves out the last norm: 2 h"
#: By row and column; a difference without a reason here is an error of this script.
WHY = {
    ("H003", "arithmetic"): "the arithmetic has 50,254 rows of embedding and head, the shape 50,304 (padded): 2 x 50 x 2,560",
    ("H025", "arithmetic"): "the arithmetic has 128,000 rows of embedding and head; the model, and the hub's count, 128,256: 2 x 256 x 8,192",
    ("H084", "published"): "the table's 350M is cut, not rounded",
    ("H086", "published"): "24 heads of 128, as printed, are wider than the model's 2,048; 16 heads would count 1.316B",
    ("H089", "published"): "as printed, 40 heads of 128 make 5,120 on a width of 5,140; square projections would count 12.953B, which rounds to it",
    ("H090", "published"): "printed 175.0B; the shape, with learned positions, biases and a tied head, does not reach it",
    ("H093", "published"): "540.356B: the paper's 540.35B is cut, not rounded",
    ("H126", "published"): "recalled; the 82,944 more fit no tensor of the model's config, and the name says 30B",
    **{(f"H{n}", "arithmetic"): _NORM for n in range(143, 153)},
}  # fmt: skip

#: Published active parameters, in units of the last digit printed, and what they count.
ACTIVE = {
    "mixtral-8x7b": ("13B", "Jiang 2024 (2401.04088), section 1"),
    "mixtral-8x22b": ("39B", "Mistral AI's announcement of Mixtral 8x22B"),
    "deepseek-v2-lite": ("2.4B", "the model's card; 2.45B here without the input embedding"),
    "deepseek-v2": ("21B", "DeepSeek 2024 (2405.04434), section 1"),
    "deepseek-v3": ("37B", "DeepSeek 2024 (2412.19437), section 1; 36.6B here without the input embedding, which rounds to it"),
    "qwen1.5-moe-a2.7b": ("2.7B", "the name of the model"),
    "qwen2-57b-a14b": ("14B", "Yang 2024 (2407.10671), table 1: the name of the model"),
    "qwen3-30b-a3b": ("3B", "Qwen 2025 (2505.09388), table 2: the name of the model; its card says 3.3B"),
    "qwen3-235b-a22b": ("22B", "Qwen 2025 (2505.09388), table 2: the name of the model"),
    "gpt-oss-20b": ("3.61B", "OpenAI 2025 (2508.10925), table 1, without the input embedding (0.58B)"),
    "gpt-oss-120b": ("5.13B", "OpenAI 2025 (2508.10925), table 1, without the input embedding (0.58B)"),
}  # fmt: skip
#: Those that count active parameters without the input embedding.
WITHOUT_EMBEDDING = frozenset({"gpt-oss-20b", "gpt-oss-120b"})


@dataclass(frozen=True, slots=True)
class Stated:
    """A count as somebody stated it; `unit` is what its last digit is worth."""

    text: str
    count: int
    unit: int

    @property
    def exact(self) -> bool:
        return self.unit == 1

    def holds(self, ours: int) -> bool:
        return 2 * abs(ours - self.count) <= self.unit if not self.exact else ours == self.count


def stated(text: str) -> Stated | None:
    """A count as the table writes it: 124439808, 6.7B, 8.63e9; None where there is none.

    >>> stated("8.63e9"), stated("350M").unit
    (Stated(text='8.63e9', count=8630000000, unit=10000000), 1000000)
    """
    if not text:
        return None
    value = Decimal(text.replace("B", "e9").replace("M", "e6"))
    exponent = value.as_tuple().exponent
    assert isinstance(exponent, int)
    return Stated(text, int(value), 10**exponent)


@dataclass(frozen=True, slots=True)
class Result:
    """One row, counted; `of` is the column it is compared with."""

    row: Row
    of: str
    ours: int
    theirs: Stated

    @property
    def error(self) -> float:
        return self.ours / self.theirs.count - 1

    @property
    def kind(self) -> str:
        if self.of == "arithmetic":
            return self.of
        return "exact" if self.theirs.exact else "rounded"


def arch_of(row: Row) -> tuple[Arch, bool]:
    """A row's spec, and whether the zoo has it."""
    if row["family"] != "NeMo-GPT3" and (name := zoo_name(row)) is not None:
        return entry(name).arch, True
    return BUILDERS[row["family"]](row), False


def results(rows: list[Row]) -> Iterator[Result]:
    """Each row against each column that it fills."""
    columns = {"published": "total_params_published", "arithmetic": "total_params_arith"}
    for row in rows:
        ours = int(params(arch_of(row)[0]).value)
        for of, column in columns.items():
            if (theirs := stated(row[column])) is not None:
                yield Result(row, of, ours, theirs)


# --- the page ---------------------------------------------------------------------------------


def cells(found: list[Result]) -> list[str]:
    """n, how many hold, and the largest difference of some rows."""
    if not found:
        return ["0", "", ""]
    worst = max(found, key=lambda r: abs(r.error))
    off = f"{worst.error:+.4%} ({worst.row['row_id']})" if worst.error else "0"
    return [str(len(found)), str(sum(r.theirs.holds(r.ours) for r in found)), off]


def families(rows: list[Row], found: list[Result]) -> str:
    names_of = [*dict.fromkeys(row["family"] for row in rows), "**every family**"]
    lines = []
    for name in names_of:
        own = [r for r in found if name in (r.row["family"], "**every family**")]
        n = sum(name in (row["family"], "**every family**") for row in rows)
        kinds: dict[str, list[Result]] = defaultdict(list)
        for r in own:
            kinds[r.kind].append(r)
        numbers = [
            cell for kind in ("exact", "rounded", "arithmetic") for cell in cells(kinds[kind])
        ]
        lines.append(f"| {' | '.join([name, str(n), *numbers])} |")
    return "\n".join(lines)


def differences(found: list[Result]) -> str:
    return "\n".join(
        f"| {r.row['row_id']} | {r.row['model']} | {r.ours:,} | {shown(r.theirs)} | {r.of} "
        f"| {r.error:+.4%} | {WHY[r.row['row_id'], r.of]} |"
        for r in found
        if not r.theirs.holds(r.ours)
    )


def shown(theirs: Stated) -> str:
    return f"{theirs.count:,}" if theirs.exact else theirs.text


def active() -> str:
    lines = []
    for name, (text, source) in ACTIVE.items():
        tree, theirs = params(entry(name).arch, active=True), stated(text)
        assert theirs is not None
        ours = tree.value - (tree.find("embedding").value if name in WITHOUT_EMBEDDING else 0)
        off = "rounds to it" if theirs.holds(int(ours)) else f"{ours / theirs.count - 1:+.1%}"
        lines.append(f"| {name} | {int(ours):,} | {text} | {off} | {source} |")
    return "\n".join(lines)


def page(rows: list[Row]) -> str:
    found = list(results(rows))
    n_zoo = sum(in_zoo for _, in_zoo in map(arch_of, rows))
    text = Path(__file__).with_name("counts_published.md").read_text(encoding="utf-8")
    return text.format(n_rows=len(rows), n_zoo=n_zoo, n_shape=len(rows) - n_zoo, active=active(),
                       families=families(rows, found), differences=differences(found))  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("rows", type=Path, help="a table of published models, one row each")
    parser.add_argument("-o", "--output", type=Path)
    given = parser.parse_args()
    with given.rows.open(encoding="utf-8") as file:
        text = page(list(csv.DictReader(file)))
    if given.output:
        given.output.write_text(text, encoding="utf-8")
    else:
        print(text)


if __name__ == "__main__":
    main()
