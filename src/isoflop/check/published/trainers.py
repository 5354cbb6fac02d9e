"""What each source of published memory was running: one prediction per row.

What is known of a trainer is in its scripts, its documents and the code of its release;
docs/memory-validation.md says which choices followed a look at the errors.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cache
from typing import TypeAlias, cast

from isoflop.arch import Arch, gpt, llama
from isoflop.arch.zoo import entry
from isoflop.check.published.shapes import Skip
from isoflop.count import (
    KERNELS,
    STACKS,
    TRAINING_STATES,
    Kernels,
    Lora,
    Only,
    Precision,
    Shards,
    Trained,
    Workload,
    bytes_kv_cache,
    finetune_memory,
    memory_inference,
    memory_rank,
    memory_training,
    overhead,
)
from isoflop.count.memory_saved import Recompute
from isoflop.count.memory_stack import BYTES_COMMUNICATOR, BYTES_CONTEXT
from isoflop.count.memory_weights import FORMATS
from isoflop.plan.memory.shard import bytes_boundary
from isoflop.quantity import Basis, Node, Symbol, branch, leaf

Row: TypeAlias = Mapping[str, str]


@dataclass(frozen=True, slots=True)
class Predicted:
    """What a row's numbers come to.

    `own` are the model's own bytes, `beside` the tree of what the software of one accelerator
    holds beside them (None: what was measured leaves it out, or it is no measurement).
    """

    own: float
    beside: Node | None = None
    kind: str = "allocator"
    n_accelerators: int = 1


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


def korthikanti(row: Row) -> Predicted:
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
        return Predicted(sum(float(c.value) for c in rank.children[:3]), kind="formula")
    kept = layers(_recompute(row), row["sequence_parallel"] == "yes")
    if row["component"] == "activations ratio":
        kept *= 100 / layers("none", sequence_parallel=False)
    return Predicted(kept, kind="formula")


def _recompute(row: Row) -> Recompute:
    if row["recompute"] not in ("none", "selective", "full"):
        raise Skip("recomputation is not stated")
    return cast(Recompute, row["recompute"])


def _measured(symbol: Symbol, size: int) -> Symbol:
    """A constant as a host of this kind has it."""
    return replace(symbol, given=size, basis=Basis.MEASURED)


#: What a process that has done nothing yet shows in nvidia-smi, as BigScience measured it on its
#: own machines (tr3m-1B3.md, calibration; tr11-176B-ml/chronicles-prequel.md), and NCCL's buffers
#: by its channels (`BYTES_COMMUNICATOR`).
ON_A100 = replace(STACKS["deepspeed"], context=_measured(BYTES_CONTEXT, 1573 * 2**20))
ON_V100 = replace(
    STACKS["deepspeed"],
    context=_measured(BYTES_CONTEXT, 1113 * 2**20),
    communicator=_measured(BYTES_COMMUNICATOR, 688 * 2**20 * 12 // 24),
)


def bigscience(row: Row) -> Predicted:
    """Megatron-DeepSpeed: fp16 Adam whose step makes fp32 gradients, ZeRO-1, no flash attention,
    no sequence parallelism; cross entropy in fp32 beside logits in fp16.

    BLOOM's rows give the most of the first and last stage. The table of V100 must give the first:
    two of its runs ran out of memory on 16 GB where the same, on 32 GB, is given 13 and 15 GB.
    Layers that a row leaves out are the multiple of pp nearest to its size label over 12 h^2.
    """
    kernels = replace(KERNELS["korthikanti"], statistics=True, loss="eager")
    work = Workload.train(int(row["micro_batch"]), 2048)
    state = TRAINING_STATES["fp16-fp32-main-grads"]
    job = Trained(_megatron(row), work, state, _recompute(row), kernels)
    dp, pp = int(row["dp"]), int(row["pp"])
    shards = Shards(tp=int(row["tp"]), pp=pp, dp=dp, zero=0 if row["sharding"] == "ZeRO-0" else 1,
                    sequence_parallel=False)  # fmt: skip
    n_micro = max(1, int(row["batch_or_grad_accum"].split()[-1]) // (dp * int(row["micro_batch"])))
    stack = ON_V100 if row["gpu_type"].startswith("V100") else ON_A100

    def held(stage: int) -> Predicted:
        rank = memory_rank(job, shards, n_micro=n_micro, stage=stage)
        outputs = shards.in_flight(stage, n_micro) * bytes_boundary(job, shards) if pp > 1 else 0
        return Predicted(float(rank.value), overhead(stack, rank, shards, outputs))

    # Uneven stages are short at the ends.
    stages = {0, min(1, pp - 1), pp - 1} if row["source_family"] == "bloom-tr11" else {0}
    return max(map(held, stages), key=_whole)


def _whole(by: Predicted) -> float:
    return by.own + float(by.beside.value if by.beside else 0)


def _megatron(row: Row) -> Arch:
    shape = dict(re.findall(r"(layers|hidden|heads)=(\d+)", row["notes"]))
    hidden, pp = int(shape["hidden"]), int(row["pp"])
    label = float(row["params"]) / (12 * hidden**2)
    bloom = row["source_family"] == "bloom-tr11"
    return gpt(row["model"], d_model=hidden, n_layers=int(shape.get("layers") or pp * round(label / pp)),
               n_heads=int(shape.get("heads") or 96), vocab_size=250880 if bloom else 50304,
               max_seq_len=2048, dropout=0.0 if bloom else 0.1)  # fmt: skip


#: Longest samples of Alpaca in each model's tokens, from the table's notes.
LONGEST = {"phi-1.5 1.3B": 1044, "StableLM Alpha 3B": 1034, "Llama 2 7B": 1304, "Llama 2 13B": 1304,
           "Falcon 40B": 1079}  # fmt: skip


#: Lightning's BitsandbytesPrecision quantises every linear layer, the head too.
NF4, NF4_DQ = (replace(FORMATS[name], head=True) for name in ("nf4", "nf4-dq"))


def litgpt(row: Row) -> Predicted:
    """bf16-true: weights, updates and AdamW's moments in bf16; LoRA of rank 8 on q and v.

    It prints torch.cuda.max_memory_allocated() / 1e9: what the allocator handed out.
    """
    if row["model"] not in LONGEST:
        raise Skip("the fine-tuning method is not stated")
    arch, work = (
        models()[row["model"]],
        Workload.train(int(row["micro_batch"]), LONGEST[row["model"]]),
    )
    if row["task"] == "finetune_lora":
        method: Lora | Only = Lora(8, dropout=True)  # finetune/lora.py: lora_dropout = 0.05
    elif row["task"] == "finetune_adapter":
        raise Skip("LLaMA-Adapter's prompts are not modelled")
    else:
        raise Skip("adapter v2 scales every matrix's output, which is not modelled")
    base = {"None": None, "bnb.nf4": NF4, "bnb.nf4-dq": NF4_DQ}[row["quantization"]]
    kernels = replace(KERNELS["huggingface"], fused_qkv=True, frozen_inputs=base is not None)
    tree = finetune_memory(arch, work, method, TRAINING_STATES["bf16-pure"], base=base,
                           kernels=kernels)  # fmt: skip
    return Predicted(float(tree.value))


ALL_LINEAR = ("q", "k", "v", "out", "gate", "up", "down")

#: PyTorch 2.0's foreach AdamW makes two copies, later ones make one.
TORCH_2_0 = replace(STACKS["pytorch"], step_copies=1)
#: Qwen's finetune/ds_config_zero2.json: buckets of 2e8, two for reducing (overlap_comm).
ZERO_2 = replace(STACKS["deepspeed"], bucket=2 * 10**8, reduce_buckets=2)
#: ZeRO-3 gathers unit by unit, which `memory_rank` counts; its buckets are small ("auto").
ZERO_3 = replace(STACKS["deepspeed"], bucket=0, reduce_buckets=0, gathers=False, flat=False)


def qwen(row: Row) -> Predicted:
    """Qwen's scripts: gradient checkpointing, flash attention; LoRA of rank 64 on every matrix.

    LoRA and what trains whole run under autocast; Q-LoRA is fp16 on DeepSpeed. What trains whole
    is in the model's bf16, moments too. Weights of all parameters are ZeRO-2's on one
    accelerator, ZeRO-3's on two.
    """
    arch = models()[row["model"]]
    work = Workload.train(int(row["micro_batch"]), int(row["seq_len"]))
    kernels = replace(KERNELS["huggingface"], loss="autocast")
    match row["task"]:
        case "LoRA (multinode)":
            raise Skip("sharded fine-tuning is not modelled")
        case "Full-parameter":
            n = int(row["num_gpus"])
            state = TRAINING_STATES["bf16" if n > 1 else "fp16-fp32-main-grads"]
            state, plain = replace(state, activation=Precision.BF16), KERNELS["huggingface"]
            shards = Shards(dp=n, zero=3 if n > 1 else 0)
            tree = memory_rank(Trained(arch, work, state, "full", plain), shards)
            beside = overhead(ZERO_3 if n > 1 else ZERO_2, tree, shards)
            return Predicted(n * float(tree.value), beside, n_accelerators=n)
        case "Q-LoRA":
            half = replace(TRAINING_STATES["bf16"], activation=Precision.FP16)
            tree = finetune_memory(arch, work, Lora(64, ALL_LINEAR, dropout=True), half, base="int4-zero",
                                   kernels=replace(kernels, loss="same"), recompute="full")  # fmt: skip
            return Predicted(float(tree.value), overhead(ZERO_2, tree, Shards()))
    whole = ("embedding/tokens", "head") if row["task"] == "LoRA (emb)" else ()
    state = TRAINING_STATES["bf16-pure" if whole else "bf16"]
    tree = finetune_memory(arch, work, Lora(64, ALL_LINEAR, whole, dropout=True), state, kernels=kernels,
                           recompute="full")  # fmt: skip
    return Predicted(float(tree.value), overhead(TORCH_2_0, tree, Shards()))


def qwen_kv(row: Row) -> Predicted:
    """Generating with transformers of 2023: weights, the last logits, and the cache twice.

    Each new token's cache is the old one joined with it, and the old one of all layers is held
    until the forward pass is over. What was read is not stated: a whole process, as above.
    """
    arch, work = models()["Qwen-7B"], Workload.decode(int(row["micro_batch"]), int(row["seq_len"]))
    held = memory_inference(arch, work, Precision.BF16)
    process = branch("bytes_overhead", "bytes", [leaf("context", "bytes", BYTES_CONTEXT)])
    old = float(bytes_kv_cache(arch, work, Precision.BF16).value)
    return Predicted(float(held.value) + old, process)


COMPILED = Kernels("compiled", "torch.compile: norms and gates fused, cross entropy eager",
                   gate_factor=False, loss="eager")  # fmt: skip


def torchtune(row: Row) -> Predicted:
    """Full fine-tuning in bf16 throughout; each row adds one switch to the one before.

    Memory is "active": what tensors take, without the process or fragments.
    """
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
    return Predicted(float(tree.value))


def qlora(_row: Row) -> Predicted:
    """The paper's claim: 65B on one 48 GB card; rank 64 on every matrix, 512 tokens."""
    tree = finetune_memory(models()["LLaMA-65B"], Workload.train(1, 512), Lora(64, ALL_LINEAR, dropout=True),
                           TRAINING_STATES["bf16"], base="nf4-dq", recompute="full",
                           kernels=KERNELS["huggingface"])  # fmt: skip
    return Predicted(float(tree.value))


SOURCES: dict[str, Callable[[Row], Predicted]] = {
    "korthikanti-2022": korthikanti, "bloom-tr11": bigscience, "bigscience-v100": bigscience,
    "litgpt": litgpt, "qwen-finetune": qwen, "qwen-kv": qwen_kv, "torchtune": torchtune, "qlora": qlora,
}  # fmt: skip


def trainer_of(row: Row) -> Callable[[Row], Predicted]:
    """How the row's source predicts a row.

    Raises:
        Skip: the source is not known.
    """
    if row["source_family"] not in SOURCES:
        raise Skip(f"how {row['source_family'] or 'its source'} trains is not known")
    return SOURCES[row["source_family"]]
