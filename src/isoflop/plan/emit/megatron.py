"""A plan in the words of Megatron-LM, and the torchrun command that starts it on every node."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from itertools import groupby

from isoflop.arch.spec import Experts
from isoflop.errors import Problem
from isoflop.hardware.stack import find_stack
from isoflop.plan.emit.asked import (
    about_learning_rate,
    layers_by_chunk,
    n_replicas,
    n_steps,
    on_every_node,
    refuse,
    shards_contexts,
)
from isoflop.plan.emit.megatron_limits import unsaid_model
from isoflop.plan.emit.megatron_model import Flags, biases, model_flags
from isoflop.plan.layout import Layout
from isoflop.plan.training.plan import TrainPlan


def megatron(plan: TrainPlan, learning_rate: float | None = None) -> str:
    """Arguments of Megatron-LM's pretrain_gpt.py, one per line (megatron/training/arguments.py).

    Data, tokenizer, initialisation and schedule are neither a plan's nor a spec's: what is not
    said is Megatron's own default.
    """
    refuse("megatron", _unsaid_megatron(plan))
    lines = map(_flag, megatron_flags(plan, learning_rate).items())
    return "\n".join([*about_learning_rate(plan, learning_rate), *lines]) + "\n"


def megatron_flags(plan: TrainPlan, learning_rate: float | None = None) -> Flags:
    """The flags with their values, the model's first; None where a flag has none."""
    layout, ask = plan.layout, plan.ask
    flags: Flags = {
        **model_flags(ask.work.arch, layout.tp),
        "--tensor-model-parallel-size": layout.tp,
        "--pipeline-model-parallel-size": layout.pp,
        "--context-parallel-size": layout.cp,
        "--micro-batch-size": layout.micro_batch,
        "--global-batch-size": ask.global_batch,
        "--seq-length": ask.work.seq_len,
        "--train-iters": n_steps(plan),
    }
    if layout.tp > 1 and layout.sequence_parallel:
        flags["--sequence-parallel"] = None
    if layout.cp > 1:
        flags["--cp-comm-type"] = _MEGATRON_CONTEXT[layout.cp_by]
    if _has_experts(plan):
        flags["--expert-model-parallel-size"] = layout.ep
        flags["--expert-tensor-parallel-size"] = layout.tp
        flags["--moe-token-dispatcher-type"] = "alltoall"  # as the plan's messages are
    if learning_rate is not None:
        flags["--lr"] = learning_rate
    return {**flags, **_split(plan), **_MEGATRON_ZERO[layout.zero],
            **_replicas(layout), **_offload(plan),
            **_MEGATRON_AGAIN[ask.work.recompute], **_MEGATRON_PRECISION[ask.precision]}  # fmt: skip


def _has_experts(plan: TrainPlan) -> bool:
    return any(isinstance(k.feed_forward, Experts) for k in plan.ask.work.arch.kinds.values())


def _replicas(layout: Layout) -> Flags:
    """How often what ZeRO splits is there, where more than once."""
    if layout.shard is None:
        return {}
    flags: Flags = {"--num-distributed-optimizer-instances": n_replicas(layout)}
    return flags if layout.zero == 1 else {**flags, "--outer-dp-sharding-strategy": "no_shard"}


def _offload(plan: TrainPlan) -> Flags:
    """The optimizer's state whole, and every layer's activations but the last one's."""
    flags: Flags = {}
    if "optimizer" in plan.layout.offload:
        flags = {"--optimizer-cpu-offload": None, "--optimizer-offload-fraction": 1.0,
                 "--use-precision-aware-optimizer": None}  # fmt: skip
    if "activations" in plan.layout.offload:
        flags["--cpu-offloading-num-layers"] = plan.ask.work.arch.n_layers - 1
    return flags


def _split(plan: TrainPlan) -> Flags:
    """Where the pipeline is cut: evenly, or chunk by chunk (Megatron-Core's layout text)."""
    chunks = layers_by_chunk(plan)
    if len(set(chunks)) > 1:
        return {"--pipeline-model-parallel-layout": _layout_text(chunks)}
    if plan.layout.virtual > 1:
        return {"--num-virtual-stages-per-pipeline-rank": plan.layout.virtual}
    return {}


def _layout_text(chunks: list[int]) -> str:
    """Embedding, layers and loss by chunk.

    >>> _layout_text([1, 2, 2, 1])
    'Et|(tt|)*2tL'
    """
    last = len(chunks) - 1
    stages = [f"{'E' * (i == 0)}{'t' * n}{'L' * (i == last)}" for i, n in enumerate(chunks)]
    text = ""
    for stage, alike in groupby(stages[:-1]):
        count = len(list(alike))
        text += f"{stage}|" if count == 1 else f"({stage}|)*{count}"
    return text + stages[-1]


#: What Megatron-FSDP's guide asks for, and the one kind of checkpoint that it writes.
_MEGATRON_FSDP: Flags = {
    "--use-megatron-fsdp": None,
    "--use-distributed-optimizer": None,
    "--no-gradient-accumulation-fusion": None,
    "--ckpt-format": "fsdp_dtensor",
}
_MEGATRON_ZERO: Mapping[int, Flags] = {
    0: {},
    1: {"--use-distributed-optimizer": None},
    2: {**_MEGATRON_FSDP, "--data-parallel-sharding-strategy": "optim_grads"},
    3: {**_MEGATRON_FSDP, "--data-parallel-sharding-strategy": "optim_grads_params"},
}
_MEGATRON_AGAIN: Mapping[str, Flags] = {
    "none": {},
    "selective": {"--recompute-granularity": "selective", "--recompute-modules": "core_attn"},
    "full": {"--recompute-granularity": "full", "--recompute-method": "uniform", "--recompute-num-layers": 1},
}  # fmt: skip
_MEGATRON_CONTEXT: Mapping[str, str] = {"ring": "p2p", "gather": "all_gather", "all_to_all": "a2a"}
_MEGATRON_PRECISION: Mapping[str, Flags] = {
    "fp32": {},
    "bf16": {"--bf16": None},
    "fp16": {"--fp16": None},
    "fp8": {"--bf16": None, "--fp8-format": "hybrid"},
}


def _unsaid_megatron(plan: TrainPlan) -> list[Problem]:
    layout, arch, again = plan.layout, plan.ask.work.arch, plan.ask.work.recompute
    rules = [
        ("precision", plan.ask.precision, "has a flag: " + ", ".join(_MEGATRON_PRECISION),
         plan.ask.precision in _MEGATRON_PRECISION),
        ("zero", layout.zero, "is 0 or 1 where pp is above 1", layout.zero < 2 or layout.pp == 1),
        ("schedule", layout.schedule, "is 1f1b: Megatron-Core runs no other",
         layout.schedule == "1f1b"),
        ("recompute", again, "is none or full where attention keeps no scores: Megatron's selective "
         "drops scores, the plan's the outputs of activation functions",
         again != "selective" or _keeps_scores(plan)),
        shards_contexts(layout),
        ("offload", layout.offload, "is of activations only where pp is 1 and recompute none",
         "activations" not in layout.offload or (layout.pp == 1 and again == "none")),
        ("offload", layout.offload, "is of the optimizer only where zero is 1: the distributed optimizer",
         "optimizer" not in layout.offload or layout.zero == 1),
        ("tp", layout.tp, "is 1 where experts have biases",
         layout.tp == 1 or not any("router" in biases(k) for k in arch.kinds.values())),
    ]  # fmt: skip
    bad = [Problem(field, value, rule) for field, value, rule, holds in rules if not holds]
    return [*bad, *unsaid_model(arch, layout.tp)]


def _keeps_scores(plan: TrainPlan) -> bool:
    return plan.ask.stack is not None and find_stack(plan.ask.stack).attention == "unfused"


def _flag(item: tuple[str, str | int | float | None]) -> str:
    name, value = item
    return name if value is None else f"{name} {shlex.quote(str(value))}"


# --- torchrun ---------------------------------------------------------------------------------


def torchrun(plan: TrainPlan, learning_rate: float | None = None) -> str:
    """The command that starts Megatron-LM on every node; HEAD_NODE is an address of one."""
    start = on_every_node("torchrun", plan)
    refuse("torchrun", _unsaid_megatron(plan))
    flags = map(_flag, megatron_flags(plan, learning_rate).items())
    command = " \\\n  ".join([*start, "pretrain_gpt.py", *flags])
    return (
        "\n".join([*about_learning_rate(plan, learning_rate), _environment(plan) + command]) + "\n"
    )


def _environment(plan: TrainPlan) -> str:
    """What the parser asks for on GPUs before Blackwell: kernels of one queue start in order."""
    split = plan.layout.tp * plan.layout.cp > 1 and plan.layout.zero < 2
    return "CUDA_DEVICE_MAX_CONNECTIONS=1 " if split else ""
