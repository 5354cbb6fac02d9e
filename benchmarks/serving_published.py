"""Predicted against published serving: docs/serving-validation.md is what this prints.

    python benchmarks/serving_published.py PATH/TO/serving.csv -o docs/serving-validation.md

Rows that state a model, an accelerator, tensor parallelism, a format, a static batch and both
lengths get one prediction for each time they publish, with the plan's own assumptions. The
others are listed with the reason. Nothing is fitted here.
"""

from __future__ import annotations

import argparse
import csv
import statistics
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeAlias

from isoflop.arch import Arch, gpt
from isoflop.arch.zoo import entry
from isoflop.count.memory_weights import Format, Scale
from isoflop.errors import Infeasible
from isoflop.hardware import Cluster, find
from isoflop.plan import ServePlan, plan_serve
from isoflop.quantity import Expr, Node

Row: TypeAlias = dict[str, str]


class Skip(Exception):
    """Why a row has no prediction."""


@dataclass(frozen=True, slots=True)
class Result:
    """One published time, or time per token, beside the plan's."""

    row: str
    family: str
    group: str
    what: str
    published: float
    predicted: float
    low: float
    high: float

    @property
    def error(self) -> float:
        return self.predicted / self.published - 1

    @property
    def in_range(self) -> bool:
        return self.low <= self.published <= self.high


def nemo(name: str, d_model: int, n_layers: int, n_heads: int) -> Arch:
    return gpt(name, d_model=d_model, n_layers=n_layers, n_heads=n_heads, vocab_size=51200,
               max_seq_len=2048)  # fmt: skip


#: Models by the name in the table; the NeMo shapes are those of NVIDIA's launcher recipes.
MODELS = {
    "GPT-J 6B": entry("gpt-j-6b").arch,
    "LLaMA 7B": entry("llama-2-7b").arch,
    "LLaMA 70B": entry("llama-2-70b").arch,
    "llama_13b": entry("llama-2-13b").arch,
    "llama_70b": entry("llama-2-70b").arch,
    "Mistral 7B": entry("mistral-7b-v0.1").arch,
    "Llama-2-7B": entry("llama-2-7b").arch,
    "Llama-2-70B": entry("llama-2-70b").arch,
    "13B GPT (test-13b.json)": nemo("gpt-13b", 5120, 40, 40),
    "GPT-5B": nemo("gpt-5b", 4096, 24, 32),
    "GPT-20B": nemo("gpt-20b", 6144, 44, 48),
    "GPT-175B": entry("gpt3-175b").arch,
    "GPT-530B": nemo("gpt-530b", 20480, 105, 128),
} | {f"Qwen2.5-{size}-Instruct": entry(f"qwen2.5-{size.lower()}").arch
     for size in ("0.5B", "1.5B", "3B", "7B", "14B", "32B", "72B")}  # fmt: skip

CHIPS = {"H100 80GB SXM": "h100-sxm", "A100 80GB SXM": "a100-sxm-80gb", "H200 SXM": "h200-sxm",
         "A100 80GB SXM (330 W cap)": "a100-sxm-80gb", "A100 40GB SXM": "a100-sxm-40gb"}  # fmt: skip

#: Groups of 32 with a scale and a zero point of 16 bits each (gpt-fast).
INT4_G32 = Format("int4-g32", 4, (Scale(32, 32),), ends=False)
FORMATS: dict[str, Format | str] = {
    "gptq-int8": "int8", "gptq-int4": "int4-zero", "awq": "int4-zero", "int4-g32": INT4_G32,
    **{name: name for name in ("fp32", "bf16", "fp16", "fp8", "int8")},
}  # fmt: skip

ENGINES = {"HF transformers 4.46 + FA2": "transformers"}
SMALL = {f"Qwen2.5-{size}-Instruct" for size in ("0.5B", "1.5B", "3B")}


def plan_of(row: Row) -> ServePlan:
    """The plan of a row's settings; one copy on as many accelerators as the row used."""
    if row["source_family"] == "trtllm-v1.0":
        raise Skip("in-flight batching of a queue, no static batch")
    if row["gpu_type"] not in CHIPS:
        raise Skip("the accelerator is not in the catalogue, or is part of one, or is not sure")
    if not row["input_len"] or not (row["output_len"] or row["ttft_ms"]):
        raise Skip("a length is not stated")
    if row["model"] not in MODELS or row["weight_precision"] not in FORMATS:
        raise Skip("the model's shape or the format is not stated")
    arch, tp = MODELS[row["model"]], int(row["tp"])
    lengths = int(row["input_len"]), int(row["output_len"] or 1)
    # Served beyond the length of the config (YaRN), or a reference's round numbers.
    arch = replace(arch, max_seq_len=max(arch.max_seq_len, sum(lengths)))
    try:
        return plan_serve(
            arch,
            Cluster(find(CHIPS[row["gpu_type"]]), tp * int(row["pp"] or 1)),
            input_tokens=lengths[0],
            output_tokens=lengths[1],
            batch=int(row["batch_or_concurrency"]),
            precision=FORMATS[row["weight_precision"]],
            kv_precision="fp8" if row["weight_precision"] == "fp8" else None,
            tp=tp,
        )
    except Infeasible:
        raise Skip("does not fit by our memory") from None


def published(row: Row, plan: ServePlan) -> Iterator[tuple[str, float, Node]]:
    """Each time that a row states, in seconds, and what the plan has for it."""
    whole = plan.asked.output_tokens * plan.batch
    if row["ttft_ms"]:
        yield "first token", float(row["ttft_ms"]) / 1000, plan.seconds_first_tokens
    if row["tpot_ms"] and not row["output_tok_per_s_total"]:
        yield "token", float(row["tpot_ms"]) / 1000, plan.seconds_per_token
    if row["e2e_latency_ms"]:
        yield "request", float(row["e2e_latency_ms"]) / 1000, _scaled(plan, whole)
    if row["output_tok_per_s_total"] and row["output_len"]:
        yield "tokens/s", 1 / float(row["output_tok_per_s_total"]), _scaled(plan, 1)


def _scaled(plan: ServePlan, tokens: int) -> Node:
    """Seconds that so many output tokens take, prompts included."""
    size: Expr = tokens / plan.tokens_per_second.total
    return replace(plan.tokens_per_second, size=size, unit="seconds")


def results(rows: list[Row]) -> Iterator[Result | tuple[Row, str]]:
    """Each row's times as results, or the reason why there is none."""
    for row in rows:
        try:
            plan = plan_of(row)
        except Skip as why:
            yield row, str(why)
            continue
        for what, seconds, node in published(row, plan):
            span = node.interval
            assert span is not None
            group = f"{ENGINES.get(row['engine'], row['engine'].split(' (')[0])}, {what}"
            if row["source_family"] == "qwen-speed":
                group += f", models of {'3B and less' if row['model'] in SMALL else '7B and more'}"
            yield Result(row["row_id"], row["source_family"], group, what, seconds,
                         float(node.value), span.low, span.high)  # fmt: skip


def line(name: str, group: str, found: list[Result]) -> str:
    sizes = sorted(abs(r.error) for r in found)
    worst = max(found, key=lambda r: abs(r.error))
    signed = statistics.mean(r.error for r in found)
    held = sum(r.in_range for r in found)
    cells = [name, group, len(found), f"{statistics.mean(sizes):.0%}", f"{statistics.median(sizes):.0%}",
             f"{worst.error:+.0%} ({worst.row})", f"{signed:+.0%}", f"{held} ({held / len(found):.0%})"]  # fmt: skip
    return f"| {' | '.join(map(str, cells))} |"


HEAD = """| source | times of | n | mean | median | largest (row) | mean signed | in range |
|---|---|--:|--:|--:|--:|--:|--:|"""


def table(found: list[Result]) -> str:
    families: dict[str, dict[str, list[Result]]] = defaultdict(lambda: defaultdict(list))
    for r in found:
        families[r.family][r.group].append(r)
    lines = []
    for family, groups in families.items():
        lines += [line(family, name, rows) for name, rows in sorted(groups.items())]
        if len(groups) > 1:
            lines.append(
                line(f"**{family}**", "all", [r for rows in groups.values() for r in rows])
            )
    return "\n".join([HEAD, *lines, line("**every source**", "all", found)])


def page(rows: list[Row]) -> str:
    everything = list(results(rows))
    found = [r for r in everything if isinstance(r, Result)]
    left: dict[tuple[str, str], int] = defaultdict(int)
    for item in everything:
        if not isinstance(item, Result):
            left[item[0]["source_family"], item[1]] += 1
    skipped = "\n".join(f"- {name}: {count} rows, {why}" for (name, why), count in left.items())
    text = Path(__file__).with_name("serving_published.md").read_text(encoding="utf-8")
    return text.format(n_rows=len(rows), n_times=len(found), n_predicted=len({r.row for r in found}),
                       table=table(found), skipped=skipped)  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("rows", type=Path, help="a table of published serving, a row per run")
    parser.add_argument("-o", "--output", type=Path)
    parser.add_argument("--all", action="store_true", help="print every time")
    given = parser.parse_args()
    with given.rows.open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    if given.all:
        for r in results(rows):
            if isinstance(r, Result):
                print(
                    f"{r.row} {r.group:44} {r.published:10.5f} {r.predicted:10.5f} {r.error:+.0%}"
                )
        return
    text = page(rows)
    if given.output:
        given.output.write_text(text, encoding="utf-8")
    else:
        print(text)


if __name__ == "__main__":
    main()
