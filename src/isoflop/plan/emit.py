"""A plan's layout in the words of the trainers that run it.

Each writer says what the layout fixes: sizes of the groups, batches, precision, what is run
again. The model's own arguments, data and learning rate are not part of a plan. What a trainer
cannot say is refused by name.
"""

from __future__ import annotations

import shlex
from collections.abc import Callable, Iterable, Mapping
from itertools import groupby
from typing import TypeAlias

from isoflop.arch import Experts
from isoflop.arch.zoo import entry, names
from isoflop.count.stages import layers_of_stage
from isoflop.errors import InputError, Problem, UnknownName
from isoflop.hardware.stack import find_stack
from isoflop.plan.schedule import (
    DualPipeV,
    GPipe,
    Interleaved,
    OneFOneB,
    Schedule,
    n_stages,
)
from isoflop.plan.training.plan import TrainPlan

Flags: TypeAlias = dict[str, str | int | None]


def emitted(kind: str, plan: TrainPlan) -> str:
    """The plan as text for one trainer: a name of `KINDS`.

    Raises:
        UnknownName: no such trainer.
        InputError: what the trainer has no words for; everything is listed.

    >>> from isoflop.arch import gpt
    >>> from isoflop.hardware import parse_cluster
    >>> from isoflop.plan import Layout, plan_train
    >>> small = gpt("gpt2", d_model=768, n_layers=12, n_heads=12, vocab_size=50257, max_seq_len=1024)
    >>> plan = plan_train(small, 10**9, parse_cluster("8xa100-sxm-80gb"), seq_len=1024,
    ...                   global_batch=64, layout=Layout(tp=2, dp=4, micro_batch=4, zero=1))
    >>> "--tensor-model-parallel-size 2" in emitted("megatron", plan)
    True
    """
    if kind not in KINDS:
        raise UnknownName("trainer", kind, KINDS, hint=f"choose one of {', '.join(KINDS)}")
    return KINDS[kind](plan)


def _refuse(trainer: str, problems: Iterable[Problem]) -> None:
    if bad := list(problems):
        raise InputError(f"plan train --emit {trainer}", bad)


def _n_steps(plan: TrainPlan) -> int:
    """Steps that read all tokens; the last may read some more."""
    return -(-plan.ask.work.tokens // (plan.ask.global_batch * plan.ask.work.seq_len))


def _chunks(plan: TrainPlan) -> list[int]:
    """Layers of each chunk of the pipeline, in the order of the model."""
    n, layout = plan.ask.work.arch.n_layers, plan.layout
    total = n_stages(layout.pipeline, layout.pp)
    return [len(layers_of_stage(n, total, chunk)) for chunk in range(total)]


# --- Megatron-LM ------------------------------------------------------------------------------


def megatron(plan: TrainPlan) -> str:
    """Arguments of Megatron-LM's pretrain_gpt.py, one per line (megatron/training/arguments.py)."""
    _refuse("megatron", _unsaid_megatron(plan))
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
        "--train-iters": _n_steps(plan),
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
    chunks = _chunks(plan)
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
        ("schedule", layout.schedule, "is 1f1b: Megatron-Core runs no other",
         layout.schedule == "1f1b"),
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
    _refuse("torchrun", _unsaid_megatron(plan))
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
    _refuse(trainer, [Problem("accelerators", used, rule)] if used % node else [])
    return used // node, node


# --- torchtitan -------------------------------------------------------------------------------


def torchtitan(plan: TrainPlan) -> str:
    """A torchtitan job's TOML: training, parallelism, activation_checkpoint (config/job_config.py).

    ZeRO 2 keeps weights gathered from forward to backward, ZeRO 3 gathers them again; with a
    pipeline, a local batch is all micro-batches of a step.
    """
    _refuse("torchtitan", _unsaid_torchtitan(plan))
    layout, ask = plan.layout, plan.ask
    n_micro = layout.n_micro_batches(ask.global_batch)
    tables: dict[str, dict[str, str | int]] = {
        "training": {
            "local_batch_size": layout.micro_batch * (n_micro if layout.pp > 1 else 1),
            "global_batch_size": ask.global_batch,
            "seq_len": ask.work.seq_len,
            "steps": _n_steps(plan),
            "mixed_precision_param": _TITAN_PRECISION[ask.precision],
        },
        "parallelism": {
            "data_parallel_replicate_degree": 1 if layout.zero else layout.dp,
            "data_parallel_shard_degree": layout.dp if layout.zero else 1,
            "fsdp_reshard_after_forward": "always" if layout.zero == 3 else "never",
            "tensor_parallel_degree": layout.tp,
            "context_parallel_degree": layout.cp,
            "expert_parallel_degree": layout.ep,
            "pipeline_parallel_degree": layout.pp,
            **(_titan_pipeline(plan) if layout.pp > 1 else {}),
        },
        "activation_checkpoint": {"mode": ask.work.recompute},
    }
    return "\n".join(map(_table, tables.items()))


def _titan_pipeline(plan: TrainPlan) -> dict[str, str | int]:
    """Schedule and split; the ends may count as a layer each."""
    chunks, layout = _chunks(plan), plan.layout
    return {
        "pipeline_parallel_schedule": _TITAN_SCHEDULE[type(layout.pipeline)],
        "pipeline_parallel_microbatch_size": layout.micro_batch,
        "pipeline_parallel_layers_per_stage": max(chunks),
        "pipeline_parallel_first_stage_less_layers": max(chunks) - chunks[0],
        "pipeline_parallel_last_stage_less_layers": max(chunks) - chunks[-1],
    }


#: Those of torch/distributed/pipelining/schedules.py. Its zero-bubble schedules take two stages
#: or more on each rank (ZBVZeroBubble two, in a V), which ZB-H1 and ZB-H2 do not.
_TITAN_SCHEDULE: Mapping[type[Schedule], str] = {
    OneFOneB: "1F1B",
    Interleaved: "Interleaved1F1B",
    GPipe: "GPipe",
    DualPipeV: "DualPipeV",
}
_TITAN_PRECISION: Mapping[str, str] = {"fp32": "float32", "bf16": "bfloat16"}


def _unsaid_torchtitan(plan: TrainPlan) -> list[Problem]:
    layout, ask, chunks = plan.layout, plan.ask, _chunks(plan)
    alone = layout.dp * layout.cp == 1
    rules = [
        ("precision", ask.precision, "is fp32 or bf16", ask.precision in _TITAN_PRECISION),
        ("zero", layout.zero, "is 0, 2 or 3: FSDP splits gradients with the optimizer's state",
         layout.zero != 1 or alone),
        ("zero", layout.zero, "is 2 or 3 where cp is above 1: FSDP splits over context ranks",
         layout.zero >= 2 or layout.cp == 1),
        ("zero", layout.zero, "is 2 or 3 where ep is above 1: experts are dealt over FSDP's ranks",
         layout.zero >= 2 or layout.ep == 1),
        ("sequence_parallel", layout.sequence_parallel, "is on where tp is above 1",
         layout.sequence_parallel or layout.tp == 1),
        ("recompute", ask.work.recompute, "is none or full: its selective is another policy",
         ask.work.recompute != "selective"),
        ("schedule", layout.schedule, "is 1f1b, gpipe or dualpipev: PyTorch has no other of ours",
         type(layout.pipeline) in _TITAN_SCHEDULE),
        ("pp", layout.pp, "gives all chunks but the two ends equally many layers",
         len(set(chunks[1:-1])) < 2 and (len(chunks) < 3 or max(chunks) == chunks[1])),
    ]  # fmt: skip
    return [Problem(field, value, rule) for field, value, rule, holds in rules if not holds]


def _table(item: tuple[str, Mapping[str, str | int]]) -> str:
    name, values = item
    lines = [f"{key} = {_toml(value)}" for key, value in values.items()]
    return "\n".join([f"[{name}]", *lines, ""])


def _toml(value: str | int) -> str:
    return f'"{value}"' if isinstance(value, str) else str(value)


# --- isoflop's own trainer --------------------------------------------------------------------


def recipe(plan: TrainPlan) -> str:
    """A recipe of `isoflop train`, but for its learning rate, which a plan does not say."""
    _refuse("recipe", _unsaid_recipe(plan))
    ask = plan.ask
    values: dict[str, str | int] = {
        "model": ask.work.arch.name,
        "seq_len": ask.work.seq_len,
        "batch_size": ask.global_batch,
        "steps": _n_steps(plan),
        "precision": ask.precision,
    }
    lines = [f"{key} = {_toml(value)}" for key, value in values.items()]
    return "\n".join([*lines, "# learning_rate = ...  a plan does not say it", ""])


def _unsaid_recipe(plan: TrainPlan) -> list[Problem]:
    """What the single-process trainer does not do."""
    ask, layout = plan.ask, plan.layout
    name = ask.work.arch.name
    n_micro = layout.n_micro_batches(ask.global_batch)
    rules = [
        ("model", name, "is a name of the zoo, as recipes read it",
         name in names() and entry(name).arch == ask.work.arch),
        ("accelerators", layout.n_accelerators, "is 1: the trainer runs one process",
         layout.n_accelerators == 1),
        ("micro-batches per step", n_micro, "is 1: the trainer runs a batch at once", n_micro == 1),
        ("recompute", ask.work.recompute, "is none", ask.work.recompute == "none"),
        ("precision", ask.precision, "is fp32 or bf16", ask.precision in ("fp32", "bf16")),
    ]  # fmt: skip
    return [Problem(field, value, rule) for field, value, rule, holds in rules if not holds]


#: The trainers that a plan can be written for.
KINDS: Mapping[str, Callable[[TrainPlan], str]] = {
    "recipe": recipe,
    "torchrun": torchrun,
    "megatron": megatron,
    "torchtitan": torchtitan,
}
