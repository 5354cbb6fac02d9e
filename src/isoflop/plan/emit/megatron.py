"""A plan in the words of Megatron-LM, and the torchrun command that starts it on every node."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from itertools import groupby
from typing import TypeAlias

from isoflop.arch import Experts
from isoflop.errors import Problem
from isoflop.hardware.stack import find_stack
from isoflop.plan.emit.asked import layers_by_chunk, n_steps, refuse
from isoflop.plan.training.plan import TrainPlan

Flags: TypeAlias = dict[str, str | int | None]


def megatron(plan: TrainPlan) -> str:
    """Arguments of Megatron-LM's pretrain_gpt.py, one per line (megatron/training/arguments.py)."""
    refuse("megatron", _unsaid_megatron(plan))
    return "\n".join(map(_flag, megatron_flags(plan).items())) + "\n"


def megatron_flags(plan: TrainPlan) -> Flags:
    """The flags with their values; None where a flag has none."""
    layout, ask = plan.layout, plan.ask
    flags: Flags = {
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
    if any(isinstance(k.feed_forward, Experts) for k in ask.work.arch.kinds.values()):
        flags["--expert-model-parallel-size"] = layout.ep
        flags["--expert-tensor-parallel-size"] = layout.tp
    return {**flags, **_split(plan), **_MEGATRON_ZERO[layout.zero],
            **_MEGATRON_AGAIN[ask.work.recompute], **_MEGATRON_PRECISION[ask.precision]}  # fmt: skip


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


_MEGATRON_ZERO: Mapping[int, Flags] = {
    0: {},
    1: {"--use-distributed-optimizer": None},
    2: {"--use-megatron-fsdp": None, "--data-parallel-sharding-strategy": "optim_grads"},
    3: {"--use-megatron-fsdp": None, "--data-parallel-sharding-strategy": "optim_grads_params"},
}
_MEGATRON_AGAIN: Mapping[str, Flags] = {
    "none": {},
    "selective": {"--recompute-granularity": "selective", "--recompute-modules": "core_attn"},
    "full": {"--recompute-granularity": "full", "--recompute-method": "uniform", "--recompute-num-layers": 1},
}  # fmt: skip
_MEGATRON_PRECISION: Mapping[str, Flags] = {
    "fp32": {},
    "bf16": {"--bf16": None},
    "fp16": {"--fp16": None},
    "fp8": {"--bf16": None, "--fp8-format": "hybrid"},
}


def _unsaid_megatron(plan: TrainPlan) -> list[Problem]:
    layout, again = plan.layout, plan.ask.work.recompute
    rules = [
        ("precision", plan.ask.precision, "has a flag: " + ", ".join(_MEGATRON_PRECISION),
         plan.ask.precision in _MEGATRON_PRECISION),
        ("zero", layout.zero, "is 0 or 1 where pp is above 1", layout.zero < 2 or layout.pp == 1),
        ("recompute", again, "is none or full where attention keeps no scores: Megatron's selective "
         "drops scores, the plan's the outputs of activation functions",
         again != "selective" or _keeps_scores(plan)),
    ]  # fmt: skip
    return [Problem(field, value, rule) for field, value, rule, holds in rules if not holds]


def _keeps_scores(plan: TrainPlan) -> bool:
    return plan.ask.stack is not None and find_stack(plan.ask.stack).attention == "unfused"


def _flag(item: tuple[str, str | int | None]) -> str:
    name, value = item
    return name if value is None else f"{name} {shlex.quote(str(value))}"


# --- torchrun ---------------------------------------------------------------------------------


def torchrun(plan: TrainPlan) -> str:
    """The command that starts Megatron-LM on every node; HEAD_NODE is an address of one."""
    nodes, each = _nodes("torchrun", plan)
    refuse("torchrun", _unsaid_megatron(plan))
    start = [
        "torchrun", f"--nnodes {nodes}", f"--nproc-per-node {each}", "--rdzv-backend c10d",
        '--rdzv-endpoint "$HEAD_NODE:29500"', "pretrain_gpt.py",
    ]  # fmt: skip
    return " \\\n  ".join([*start, *map(_flag, megatron_flags(plan).items())]) + "\n"


def _nodes(trainer: str, plan: TrainPlan) -> tuple[int, int]:
    """Nodes, and processes on each."""
    used, node = plan.layout.n_accelerators, plan.cluster.size_node
    if used <= node:
        return 1, used
    rule = f"fills nodes of {node}: torchrun starts as many processes on each"
    refuse(trainer, [Problem("accelerators", used, rule)] if used % node else [])
    return used // node, node
