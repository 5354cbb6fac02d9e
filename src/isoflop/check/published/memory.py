"""Published memory: one prediction per row, by what is known of each source's trainer.

No constant is fitted to these rows; docs/memory-validation.md says which two choices followed
a first look at the errors.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import TypeAlias, cast

from isoflop.arch import Arch, gpt, llama
from isoflop.arch.zoo import entry
from isoflop.check.published.score import Judged
from isoflop.check.published.shapes import Skip
from isoflop.check.published.table import Table
from isoflop.count import (
    KERNELS,
    TRAINING_STATES,
    Kernels,
    Lora,
    Only,
    Precision,
    Shards,
    Trained,
    Workload,
    bytes_runtime,
    finetune_memory,
    memory_inference,
    memory_rank,
    memory_training,
)
from isoflop.count.memory_saved import Recompute
from isoflop.errors import InputError, Problem

GB, GIB = 10**9, 2**30
Row: TypeAlias = Mapping[str, str]


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
        runtime = self.n_accelerators * float(bytes_runtime(self.stack).value)
        return (self.predicted + runtime) / self.published - 1

    @property
    def missing(self) -> float:
        """Bytes per accelerator that were there and are not predicted."""
        assert self.published is not None
        return (self.published - self.predicted) / self.n_accelerators

    @property
    def in_range(self) -> bool:
        """Whether a plan's range, that of the runtime's memory, holds the published number."""
        spread = bytes_runtime(self.stack).spread
        assert spread is not None
        return self.missing in spread

    @property
    def stack(self) -> str:
        """BigScience's runs, and Qwen's of all parameters, were on DeepSpeed."""
        engine = self.family in ("bloom-tr11", "bigscience-v100") or self.group == "Full-parameter"
        return "deepspeed" if engine else "pytorch"


@cache
def models() -> dict[str, Arch]:
    """Models by their name in the tables: the zoo's, others from their config.json or paper."""
    in_zoo = {
        "phi-1.5 1.3B": "phi-1.5",
        "StableLM Alpha 3B": "stablelm-base-alpha-3b",
        "Falcon 40B": "falcon-40b",
        "Llama 2 7B": "llama-2-7b",
        "Llama 2 13B": "llama-2-13b",
        "Llama-3.2-3B (see README)": "llama-3.2-3b",
        "LLaMA-65B": "llama-1-65b",
    }
    return {text: entry(name).arch for text, name in in_zoo.items()} | {
        "Qwen-1.8B": qwen_1("qwen-1.8b", 2048, 24, 16, 5504),
        "Qwen-7B": qwen_1("qwen-7b", 4096, 32, 32, 11008),
        "megatron-22B": dropped("megatron-22b", 6144, 48, 64),
        "turing-530B": dropped("turing-530b", 20480, 105, 128),
    }


def qwen_1(name: str, d_model: int, n_layers: int, n_heads: int, d_ff: int) -> Arch:
    return llama(name, d_model=d_model, n_layers=n_layers, n_heads=n_heads, d_ff=d_ff,
                 vocab_size=151936, max_seq_len=8192, bias_attention=True)  # fmt: skip


def dropped(name: str, d_model: int, n_layers: int, n_heads: int) -> Arch:
    return gpt(name, d_model=d_model, n_layers=n_layers, n_heads=n_heads, vocab_size=51200,
               max_seq_len=2048, dropout=0.1)  # fmt: skip


# --- one prediction per source ----------------------------------------------------------------


def korthikanti(row: Row) -> tuple[float, str]:
    """The paper's own formulas: 18 bytes per parameter, layers' activations of stage 0."""

    def layers(recompute: Recompute, sequence_parallel: bool) -> float:
        shards = Shards(tp=8, pp=int(row["pp"]), virtual=int(row["virtual_pp"]),
                        sequence_parallel=sequence_parallel)  # fmt: skip
        rank = memory_rank(replace(job, recompute=recompute), shards, n_micro=10**6)
        return float(rank.find("bytes_activations/layer").value)

    arch = models()[row["model"]]
    work = Workload.train(int(row["micro_batch"]), 2048)
    job = Trained(arch, work, TRAINING_STATES["bf16-fp32-grads"], kernels=KERNELS["korthikanti"])
    if row["component"].startswith("params"):
        shards = Shards(tp=8, pp=int(row["pp"]), virtual=int(row["virtual_pp"]))
        rank = memory_rank(job, shards, stage=int(row["pp"]) // 2)
        return sum(float(c.value) for c in rank.children[:3]), "formula"
    kept = layers(_recompute(row), row["sequence_parallel"] == "yes")
    if row["component"] == "activations ratio":
        return kept / layers("none", sequence_parallel=False) * 100, "formula"
    return kept, "formula"


def _recompute(row: Row) -> Recompute:
    if row["recompute"] not in ("none", "selective", "full"):
        raise Skip("recomputation is not stated")
    return cast(Recompute, row["recompute"])


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
    job = Trained(arch, work, TRAINING_STATES["fp16-fp32-main-grads"], _recompute(row), kernels)
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
        models()[row["model"]],
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
    arch = models()[row["model"]]
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
    return float(memory_inference(models()["Qwen-7B"], work, Precision.BF16).value), "allocator"


COMPILED = Kernels("compiled", "torch.compile: norms and gates fused, cross entropy eager",
                   gate_factor=False, loss="eager")  # fmt: skip


def torchtune(row: Row) -> tuple[float, str]:
    """Full fine-tuning in bf16 throughout; each row adds one switch to the one before."""
    switches: dict[str, tuple[Kernels, Recompute]] = {
        "+ Packed dataset": (KERNELS["huggingface"], "none"),
        "+ Compile": (COMPILED, "none"),
        "+ Chunked cross entropy": (KERNELS["fused"], "none"),
        "+ Activation checkpointing": (KERNELS["fused"], "full"),
    }
    if row["task"] not in switches:
        raise Skip("lengths or switches are not stated, or tensors are offloaded to the host")
    kernels, recompute = switches[row["task"]]
    work = Workload.train(int(row["micro_batch"]), int(row["seq_len"]))
    tree = memory_training(models()[row["model"]], work, TRAINING_STATES["bf16-pure"], kernels=kernels,
                           recompute=recompute)  # fmt: skip
    return float(tree.value), "allocator"


def qlora(_row: Row) -> tuple[float, str]:
    """The paper's claim: 65B on one 48 GB card; rank 64 on every matrix, 512 tokens."""
    tree = finetune_memory(models()["LLaMA-65B"], Workload.train(1, 512), Lora(64, ALL_LINEAR),
                           TRAINING_STATES["bf16"], base="nf4-dq", recompute="full",
                           kernels=KERNELS["huggingface"])  # fmt: skip
    return float(tree.value), "allocator"


SOURCES: dict[str, Callable[[Row], tuple[float, str]]] = {
    "korthikanti-2022": korthikanti, "bloom-tr11": bigscience, "bigscience-v100": bigscience,
    "litgpt": litgpt, "qwen-finetune": qwen, "qwen-kv": qwen_kv, "torchtune": torchtune, "qlora": qlora,
}  # fmt: skip


def _trainer(row: Row) -> Callable[[Row], tuple[float, str]]:
    if row["source_family"] not in SOURCES:
        raise Skip(f"how {row['source_family'] or 'its source'} trains is not known")
    return SOURCES[row["source_family"]]


def unit(row: Row) -> float:
    if row["unit"].startswith("percent"):
        return 1
    return GIB if row["unit"].startswith("GiB") else GB


def results(rows: Sequence[Row]) -> Iterator[Result | tuple[Row, str]]:
    """Each row as a result, or as the reason why there is none."""
    for row in rows:
        try:
            predicted, kind = _trainer(row)(row)
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


def judge_memory(table: Table) -> tuple[Judged, ...]:
    """Every row of a table of memory beside its prediction.

    What the process holds besides is added as plans do, with its range, where a machine
    reported the number; a paper's own formulas are met as they are.

    Raises:
        InputError: a row of a known source has a cell that cannot be read.
    """
    found = []
    for row, line in zip(table.rows, table.lines, strict=True):
        try:
            (item,) = results([row])
        except (ValueError, LookupError, ArithmeticError) as error:
            rule = f"has the cells that {row['source_family']} needs, numbers readable"
            raise InputError(
                table.name, [Problem(f"row {line}", row["row_id"], rule, str(error))]
            ) from None
        found.append(_judged(row, item))
    return tuple(found)


def _judged(row: Row, item: Result | tuple[Row, str]) -> Judged:
    if not isinstance(item, Result):
        return Judged(row["row_id"], row["source_family"], row["task"], row["model"], "bytes",
                      None, skipped=item[1])  # fmt: skip
    if item.published is None:
        return Judged(row["row_id"], item.family, item.group, row["model"], "bytes", None,
                      skipped=f"a bound is stated, {item.stated}")  # fmt: skip
    what = "percent" if row["unit"].startswith("percent") else "bytes"
    judged = Judged(
        row["row_id"], item.family, item.group, row["model"], what, item.published, item.predicted
    )
    if item.kind == "formula":
        return judged
    spread = bytes_runtime(item.stack).spread
    assert spread is not None
    runtime = float(bytes_runtime(item.stack).value)
    return replace(
        judged,
        predicted=item.predicted + item.n_accelerators * runtime,
        low=item.predicted + item.n_accelerators * spread.low,
        high=item.predicted + item.n_accelerators * spread.high,
    )
