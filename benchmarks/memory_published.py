"""Predicted against published memory: docs/memory-validation.md is what this prints.

    python benchmarks/memory_published.py PATH/TO/memory.csv -o docs/memory-validation.md

Each source's settings are turned into one prediction per row by what is known of its
trainer; no constant is fitted. Two choices were made after a first look at the errors, and
the page says which. Rows whose settings are not
stated, or whose method isoflop does not model, are listed with the reason instead.
"""

from __future__ import annotations

import argparse
import csv
import re
import statistics
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeAlias

from isoflop.arch import Arch, gpt, llama
from isoflop.arch.spec import Embedding, Head, Rope, Wiring
from isoflop.arch.zoo import entry
from isoflop.count import (
    BYTES_RUNTIME,
    KERNELS,
    TRAINING_STATES,
    Kernels,
    Lora,
    Only,
    Precision,
    Shards,
    Trained,
    Workload,
    finetune_memory,
    memory_inference,
    memory_rank,
    memory_training,
)

GB, GIB = 10**9, 2**30
Row: TypeAlias = dict[str, str]


class Skip(Exception):
    """Why a row has no prediction."""


@dataclass(frozen=True, slots=True)
class Result:
    """One row: bytes predicted and published (None: a bound or an out-of-memory)."""

    row: str
    family: str
    group: str
    kind: str
    predicted: float
    published: float | None
    stated: str
    n_accelerators: int = 1

    @property
    def error(self) -> float:
        assert self.published is not None
        return self.predicted / self.published - 1

    @property
    def error_with_runtime(self) -> float:
        """With what each plan adds for the context, libraries and buffers of an accelerator."""
        assert self.published is not None
        runtime = self.n_accelerators * float(BYTES_RUNTIME.value)
        return (self.predicted + runtime) / self.published - 1

    @property
    def missing(self) -> float:
        """Bytes per accelerator that were there and are not predicted."""
        assert self.published is not None
        return (self.published - self.predicted) / self.n_accelerators

    @property
    def in_range(self) -> bool:
        """Whether a plan's range, that of the runtime's memory, holds the published number."""
        assert BYTES_RUNTIME.spread is not None
        return self.missing in BYTES_RUNTIME.spread


# --- models that the zoo does not hold -------------------------------------------------------


def parallel(arch: Arch, wiring: Wiring, *, n_kv_heads: int | None = None, tied: bool = False,
             d_rotary: int | None = None) -> Arch:  # fmt: skip
    """A GPT with rotary positions and a parallel layer, as GPT-NeoX and Falcon have."""
    layer = arch.layers[0]
    attention = replace(layer.attention, position=Rope(d_rotary=d_rotary))
    if n_kv_heads:
        attention = replace(attention, n_kv_heads=n_kv_heads, bias_qkv=False, bias_out=False)
        layer = replace(layer, feed_forward=replace(layer.feed_forward, bias=False))
    layer = replace(layer, attention=attention, wiring=wiring)
    return replace(arch, layers=(layer,) * arch.n_layers, head=Head(tied=tied),
                   embedding=Embedding(arch.embedding.n_rows))  # fmt: skip


def models() -> dict[str, Arch]:
    """Shapes by the name in the table; sources are their config.json files."""
    phi = gpt("phi-1.5", d_model=2048, n_layers=24, n_heads=32, vocab_size=51200, max_seq_len=2048)
    stable = gpt("stablelm-base-alpha-3b", d_model=4096, n_layers=16, n_heads=32, vocab_size=50254,
                 n_rows=50688, max_seq_len=4096)  # fmt: skip
    falcon = gpt(
        "falcon-40b", d_model=8192, n_layers=60, n_heads=128, vocab_size=65024, max_seq_len=2048
    )
    qwen = {"n_heads": 16, "vocab_size": 151936, "max_seq_len": 8192, "bias_attention": True}
    return {
        "phi-1.5 1.3B": parallel(phi, Wiring.PARALLEL, d_rotary=32),
        "StableLM Alpha 3B": parallel(stable, Wiring.PARALLEL_TWO_NORMS, d_rotary=32),
        "Falcon 40B": parallel(falcon, Wiring.PARALLEL_TWO_NORMS, n_kv_heads=8),
        "Llama 2 7B": entry("llama-2-7b").arch,
        "Llama 2 13B": entry("llama-2-13b").arch,
        "Llama-3.2-3B (see README)": entry("llama-3.2-3b").arch,
        "Qwen-1.8B": llama("qwen-1.8b", d_model=2048, n_layers=24, d_ff=5504, **qwen),
        "Qwen-7B": llama("qwen-7b", d_model=4096, n_layers=32, d_ff=11008, **{**qwen, "n_heads": 32}),
        "LLaMA-65B": llama("llama-65b", d_model=8192, n_layers=80, n_heads=64, d_ff=22016,
                           vocab_size=32000, max_seq_len=2048),
        "megatron-22B": dropped("megatron-22b", 6144, 48, 64, 51200),
        "turing-530B": dropped("turing-530b", 20480, 105, 128, 51200),
    }  # fmt: skip


def dropped(name: str, d_model: int, n_layers: int, n_heads: int, vocab_size: int) -> Arch:
    return gpt(name, d_model=d_model, n_layers=n_layers, n_heads=n_heads, vocab_size=vocab_size,
               max_seq_len=2048, dropout=0.1)  # fmt: skip


MODELS = models()

# --- one prediction per source ----------------------------------------------------------------


def korthikanti(row: Row) -> tuple[float, str]:
    """The paper's own formulas: 18 bytes per parameter, layers' activations of stage 0."""

    def layers(recompute: str, sequence_parallel: bool) -> float:
        shards = Shards(tp=8, pp=int(row["pp"]), virtual=int(row["virtual_pp"]),
                        sequence_parallel=sequence_parallel)  # fmt: skip
        rank = memory_rank(replace(job, recompute=recompute), shards, n_micro=10**6)
        return float(rank.find("bytes_activations/layer").value)

    arch = MODELS[row["model"]]
    work = Workload.train(int(row["micro_batch"]), 2048)
    job = Trained(arch, work, TRAINING_STATES["bf16-fp32-grads"], kernels=KERNELS["korthikanti"])
    if row["component"].startswith("params"):
        shards = Shards(tp=8, pp=int(row["pp"]), virtual=int(row["virtual_pp"]))
        rank = memory_rank(job, shards, stage=int(row["pp"]) // 2)
        return sum(float(c.value) for c in rank.children[:3]), "formula"
    kept = layers(row["recompute"], row["sequence_parallel"] == "yes")
    if row["component"] == "activations ratio":
        return kept / layers("none", sequence_parallel=False) * 100, "formula"
    return kept, "formula"


def bigscience(row: Row) -> tuple[float, str]:
    """Megatron-DeepSpeed: fp16 Adam whose step makes fp32 gradients, ZeRO-1, no flash attention,
    no sequence parallelism.

    Layers that a row leaves out are the multiple of pp nearest to its size label over 12 h^2.
    """
    shape = dict(re.findall(r"(layers|hidden|heads)=(\d+)", row["notes"]))
    hidden, pp = int(shape["hidden"]), int(row["pp"])
    label = float(row["params"]) / (12 * hidden**2)
    n_layers = int(shape.get("layers") or pp * round(label / pp))
    bloom = row["source_family"] == "bloom-tr11"
    n_heads = int(shape.get("heads") or 96)
    arch = gpt(row["model"], d_model=hidden, n_layers=n_layers, n_heads=n_heads,
               vocab_size=250880 if bloom else 50304, max_seq_len=2048,
               dropout=0.0 if bloom else 0.1)  # fmt: skip
    kernels = replace(KERNELS["korthikanti"], statistics=True)
    work = Workload.train(int(row["micro_batch"]), 2048)
    job = Trained(arch, work, TRAINING_STATES["fp16-fp32-main-grads"], row["recompute"], kernels)
    dp = int(row["dp"])
    shards = Shards(tp=int(row["tp"]), pp=pp, dp=dp, zero=0 if row["sharding"] == "ZeRO-0" else 1,
                    sequence_parallel=False)  # fmt: skip
    n_micro = max(1, int(row["batch_or_grad_accum"].split()[-1]) // (dp * int(row["micro_batch"])))
    ends = {0, min(1, pp - 1), pp - 1}  # uneven stages are short at the ends
    return max(
        float(memory_rank(job, shards, n_micro=n_micro, stage=s).value) for s in ends
    ), "allocator"


#: Longest samples of Alpaca in each model's tokens, from the table's notes.
LONGEST = {"phi-1.5 1.3B": 1044, "StableLM Alpha 3B": 1034, "Llama 2 7B": 1304, "Llama 2 13B": 1304,
           "Falcon 40B": 1079}  # fmt: skip


def litgpt(row: Row) -> tuple[float, str]:
    """bf16-true: weights, updates and AdamW's moments in bf16; LoRA of rank 8 on q and v."""
    if row["model"] not in LONGEST:
        raise Skip("the fine-tuning method is not stated")
    arch, work = (
        MODELS[row["model"]],
        Workload.train(int(row["micro_batch"]), LONGEST[row["model"]]),
    )
    if row["task"] == "finetune_lora":
        method: Lora | Only = Lora(8)
    elif row["task"] == "finetune_adapter":
        raise Skip("LLaMA-Adapter's prompts are not modelled")
    else:
        raise Skip("adapter v2 scales every matrix's output, which is not modelled")
    base = {"None": None, "bnb.nf4": "nf4", "bnb.nf4-dq": "nf4-dq"}[row["quantization"]]
    tree = finetune_memory(arch, work, method, TRAINING_STATES["bf16-pure"], base=base,
                           kernels=KERNELS["huggingface"])  # fmt: skip
    return float(tree.value), "allocator"


ALL_LINEAR = ("q", "k", "v", "out", "gate", "up", "down")


def qwen(row: Row) -> tuple[float, str]:
    """Qwen's scripts: rank 64 on every matrix, gradient checkpointing, flash attention."""
    arch = MODELS[row["model"]]
    work = Workload.train(int(row["micro_batch"]), int(row["seq_len"]))
    state, kernels = TRAINING_STATES["bf16"], KERNELS["huggingface"]
    match row["task"]:
        case "Full-parameter" if int(row["num_gpus"]) == 1:
            tree = memory_training(arch, work, state, kernels=kernels, recompute="full")
            return float(tree.value), "allocator"
        case "Full-parameter":
            rank = memory_rank(Trained(arch, work, state, "full", kernels), Shards(dp=2, zero=3))
            return 2 * float(rank.value), "allocator"
        case "LoRA (multinode)":
            raise Skip("sharded fine-tuning is not modelled")
    whole = ("embedding/tokens", "head") if row["task"] == "LoRA (emb)" else ()
    base = "int4-zero" if row["task"] == "Q-LoRA" else None
    tree = finetune_memory(arch, work, Lora(64, ALL_LINEAR, whole), state, base=base, kernels=kernels,
                           recompute="full")  # fmt: skip
    return float(tree.value), "allocator"


def qwen_kv(row: Row) -> tuple[float, str]:
    """Generating with transformers: weights, the cache of all tokens, the last logits."""
    work = Workload.decode(int(row["micro_batch"]), int(row["seq_len"]))
    return float(memory_inference(MODELS["Qwen-7B"], work, Precision.BF16).value), "allocator"


COMPILED = Kernels("compiled", "torch.compile: norms and gates fused, cross entropy eager",
                   gate_factor=False, loss="eager")  # fmt: skip


def torchtune(row: Row) -> tuple[float, str]:
    """Full fine-tuning in bf16 throughout; each row adds one switch to the one before."""
    switches: dict[str, tuple[Kernels, str]] = {
        "+ Packed dataset": (KERNELS["huggingface"], "none"),
        "+ Compile": (COMPILED, "none"),
        "+ Chunked cross entropy": (KERNELS["fused"], "none"),
        "+ Activation checkpointing": (KERNELS["fused"], "full"),
    }
    if row["task"] not in switches:
        raise Skip("lengths or switches are not stated, or tensors are offloaded to the host")
    kernels, recompute = switches[row["task"]]
    work = Workload.train(int(row["micro_batch"]), int(row["seq_len"]))
    tree = memory_training(MODELS[row["model"]], work, TRAINING_STATES["bf16-pure"], kernels=kernels,
                           recompute=recompute)  # type: ignore[arg-type]  # fmt: skip
    return float(tree.value), "allocator"


def qlora(_row: Row) -> tuple[float, str]:
    """The paper's claim: 65B on one 48 GB card; rank 64 on every matrix, 512 tokens."""
    tree = finetune_memory(MODELS["LLaMA-65B"], Workload.train(1, 512), Lora(64, ALL_LINEAR),
                           TRAINING_STATES["bf16"], base="nf4-dq", recompute="full",
                           kernels=KERNELS["huggingface"])  # fmt: skip
    return float(tree.value), "allocator"


SOURCES: dict[str, Callable[[Row], tuple[float, str]]] = {
    "korthikanti-2022": korthikanti, "bloom-tr11": bigscience, "bigscience-v100": bigscience,
    "litgpt": litgpt, "qwen-finetune": qwen, "qwen-kv": qwen_kv, "torchtune": torchtune, "qlora": qlora,
}  # fmt: skip


# --- the table ----------------------------------------------------------------------------------


def unit(row: Row) -> float:
    if row["unit"].startswith("percent"):
        return 1
    return GIB if row["unit"].startswith("GiB") else GB


def results(rows: list[Row]) -> Iterator[Result | tuple[Row, str]]:
    """Each row as a result, or as the reason why there is none."""
    for row in rows:
        try:
            predicted, kind = SOURCES[row["source_family"]](row)
        except Skip as why:
            yield row, str(why)
            continue
        stated = row["peak_mem_per_gpu_gb"]
        published = float(stated) * unit(row) if stated[0].isdigit() else None
        group = row["task"] if row["task"] != "pretrain" else f"recompute {row['recompute']}"
        if row["source_family"] == "litgpt":
            group = f"LoRA, base {row['quantization'].replace('None', 'bf16')}"
        if row["source_family"] == "korthikanti-2022":
            group = row["component"]
        summed = int(row["num_gpus"] or 1) if "sum over" in row["unit"] else 1
        yield Result(
            row["row_id"], row["source_family"], group, kind, predicted, published, stated, summed
        )


def line(name: str, group: str, found: list[Result]) -> str:
    errors = [r.error for r in found]
    sizes = sorted(abs(e) for e in errors)
    worst = max(found, key=lambda r: abs(r.error))
    cells = [name, group, len(found), f"{statistics.mean(sizes):.1%}", f"{statistics.median(sizes):.1%}",
             f"{sizes[-1]:.1%} ({worst.row})", f"{statistics.mean(errors):+.1%}"]  # fmt: skip
    if found[0].kind == "allocator":
        sizes = [abs(r.error_with_runtime) for r in found]
        missing = sorted(r.missing / GB for r in found)
        cells += [f"{statistics.median(missing):.1f} ({missing[0]:.1f} to {missing[-1]:.1f})",
                  f"{statistics.mean(sizes):.1%}", sum(r.in_range for r in found)]  # fmt: skip
    return f"| {' | '.join(map(str, cells))} |"


HEADS = {
    "formula": """| source | rows of | n | mean | median | largest (row) | mean signed |
|---|---|--:|--:|--:|--:|--:|""",
    "allocator": """| source | rows of | n | mean | median | largest (row) | mean signed | GB missing, median (range) | mean + runtime | in range |
|---|---|--:|--:|--:|--:|--:|--:|--:|--:|""",
}


def table(found: list[Result], kind: str) -> str:
    of_kind = [r for r in found if r.kind == kind and r.published is not None]
    groups: dict[tuple[str, str], list[Result]] = defaultdict(list)
    families: dict[str, list[Result]] = defaultdict(list)
    for r in of_kind:
        groups[r.family, r.group].append(r)
        families[r.family].append(r)
    lines = []
    for name, rows in families.items():
        below = [(g, v) for (f, g), v in groups.items() if f == name]
        lines += [line(name, g, v) for g, v in below] if len(below) > 1 else []
        lines.append(line(f"**{name}**", "all", rows))
    return "\n".join([HEADS[kind], *lines, line("**every source**", "all", of_kind)])


def bounds(found: list[Result]) -> str:
    """Rows that state a bound: what ran out of memory, and what fitted."""
    lines = ["| row | source | stated | predicted | agrees |", "|---|---|---|--:|---|"]
    for r in found:
        if r.published is None:
            room = 40 * GB if r.stated == "OOM" else float(r.stated.lstrip("<")) * GB
            agrees = (r.predicted > room) == (r.stated == "OOM")
            stated = "out of memory at 40 GB" if r.stated == "OOM" else f"{r.stated} GB"
            lines.append(
                f"| {r.row} | {r.family} | {stated} | {r.predicted / GB:.1f} GB | {'yes' if agrees else 'no'} |"
            )
    return "\n".join(lines)


def page(rows: list[Row]) -> str:
    everything = list(results(rows))
    found = [r for r in everything if isinstance(r, Result)]
    left: dict[tuple[str, str], int] = defaultdict(int)
    for item in everything:
        if not isinstance(item, Result):
            left[item[0]["source_family"], item[1]] += 1
    skipped = "\n".join(f"- {name}: {count} rows, {why}" for (name, why), count in left.items())
    text = Path(__file__).with_name("memory_published.md").read_text(encoding="utf-8")
    return text.format(n_rows=len(rows), n_predicted=len(found), formula=table(found, "formula"),
                       allocator=table(found, "allocator"), bounds=bounds(found), skipped=skipped)  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument(
        "rows", type=Path, help="a table of published memory, one row per measurement"
    )
    parser.add_argument("-o", "--output", type=Path)
    parser.add_argument("--all", action="store_true", help="print every row")
    given = parser.parse_args()
    with given.rows.open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    if given.all:
        for r in results(rows):
            if isinstance(r, Result) and r.published is not None:
                print(
                    f"{r.row} {r.family:18} {r.group:28} {r.predicted / GB:8.2f} {r.published / GB:8.2f} {r.error:+.1%}"
                )
        return
    text = page(rows)
    if given.output:
        given.output.write_text(text, encoding="utf-8")
    else:
        print(text)


if __name__ == "__main__":
    main()
