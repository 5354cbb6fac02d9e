"""A plan in the words of torchtitan 0.3, which reads a configuration's name and what to change."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TypeAlias

from isoflop.errors import Problem
from isoflop.plan.emit.asked import (
    about_learning_rate,
    layers_by_chunk,
    n_replicas,
    n_steps,
    on_every_node,
    refuse,
    shards_contexts,
)
from isoflop.plan.emit.flavours import EIGHT_BITS, FLAVOURS, Flavour, flavours_of
from isoflop.plan.schedule import DualPipeV, GPipe, Interleaved, OneFOneB, Schedule
from isoflop.plan.training.plan import TrainPlan

#: An option by its section and name; None where it is a switch.
Options: TypeAlias = dict[str, str | int | float | None]


def torchtitan(plan: TrainPlan, learning_rate: float | None = None) -> str:
    """The command that starts torchtitan on every node; HEAD_NODE is an address of one.

    ZeRO 2 keeps weights gathered from forward to backward, ZeRO 3 gathers them again; with a
    pipeline, a local batch is all micro-batches of a step.
    """
    refuse("torchtitan", _unsaid_torchtitan(plan))
    flavour = _flavour(plan)
    assert flavour is not None
    options = {"--module": flavour.module, "--config": flavour.config, **torchtitan_options(plan)}
    if learning_rate is not None:
        options["--optimizer.param_groups.0.optimizer_kwargs.lr"] = learning_rate
    words = [name if value is None else f"{name} {value}" for name, value in options.items()]
    start = [*on_every_node("torchtitan", plan), "-m torchtitan.train"]
    command = " \\\n  ".join([*start, *words, f"activation-checkpoint:{plan.ask.work.recompute}"])
    differs = f"{flavour.config} is not quite the spec: {flavour.differs}"
    notes = [f"# {differs}"] if flavour.differs else []
    return "\n".join([*notes, *about_learning_rate(plan, learning_rate), command]) + "\n"


def torchtitan_options(plan: TrainPlan) -> Options:
    """What the plan fixes, whatever the configuration said (torchtitan/config/configs.py)."""
    layout, ask = plan.layout, plan.ask
    n_micro = layout.n_micro_batches(ask.global_batch)
    replicas = n_replicas(layout) if layout.zero else layout.dp
    return {
        "--training.local_batch_size": layout.micro_batch * (n_micro if layout.pp > 1 else 1),
        "--training.global_batch_size": ask.global_batch,
        "--training.seq_len": ask.work.seq_len,
        "--training.steps": n_steps(plan),
        "--training.mixed_precision_param": _TITAN_PRECISION[ask.precision],
        # a graph holds neither a pipeline's schedule nor tokens dealt to experts
        **({"--training.disable_cuda_graphs": None} if layout.pp * layout.ep > 1 else {}),
        "--parallelism.data_parallel_replicate_degree": replicas,
        "--parallelism.data_parallel_shard_degree": layout.dp // replicas,
        "--parallelism.fsdp_reshard_after_forward": "always" if layout.zero == 3 else "never",
        "--parallelism.tensor_parallel_degree": layout.tp,
        **({} if layout.sequence_parallel else {"--parallelism.no_enable_sequence_parallel": None}),
        "--parallelism.context_parallel_degree": layout.cp,
        **({"--parallelism.context_parallel_load_balancer": "ptrr"} if layout.cp > 1 else {}),
        "--parallelism.expert_parallel_degree": layout.ep,
        "--parallelism.pipeline_parallel_degree": layout.pp,
        **(_titan_pipeline(plan) if layout.pp > 1 else {}),
    }


def _titan_pipeline(plan: TrainPlan) -> Options:
    """Schedule and split; the ends may count as a layer each."""
    chunks, layout = layers_by_chunk(plan), plan.layout
    return {
        "--parallelism.pipeline_parallel_schedule": _TITAN_SCHEDULE[type(layout.pipeline)],
        "--parallelism.pipeline_parallel_microbatch_size": layout.micro_batch,
        "--parallelism.pipeline_parallel_layers_per_stage": max(chunks),
        "--parallelism.pipeline_parallel_first_stage_less_layers": max(chunks) - chunks[0],
        "--parallelism.pipeline_parallel_last_stage_less_layers": max(chunks) - chunks[-1],
    }  # fmt: skip


#: Those of torch/distributed/pipelining/schedules.py. Its zero-bubble schedules take two stages
#: or more on each rank (ZBVZeroBubble two, in a V), which ZB-H1 and ZB-H2 do not.
_TITAN_SCHEDULE: Mapping[type[Schedule], str] = {
    OneFOneB: "1F1B",
    Interleaved: "Interleaved1F1B",
    GPipe: "GPipe",
    DualPipeV: "DualPipeV",
}
_TITAN_PRECISION: Mapping[str, str] = {
    "fp32": "float32",
    "bf16": "bfloat16",
    EIGHT_BITS: "bfloat16",
}


def _flavour(plan: TrainPlan) -> Flavour | None:
    """The configuration of the model's shape that multiplies in the plan's precision."""
    wanted = EIGHT_BITS if plan.ask.precision == EIGHT_BITS else None
    found = [f for f in flavours_of(plan.ask.work.arch) if f.precision == wanted]
    return found[0] if found else None


def _unsaid_model(plan: TrainPlan) -> list[Problem]:
    arch, flavour = plan.ask.work.arch, _flavour(plan)
    if flavour is None:
        there = list(flavours_of(arch))
        if there:
            rule = f"is what {there[0].config} computes in: {there[0].precision or 'fp32 or bf16'}"
            return [Problem("precision", plan.ask.precision, rule)]
        known = ", ".join(dict.fromkeys(f.model for f in FLAVOURS))
        return [Problem("model", arch.name, f"has the shape of a configuration: {known}")]
    cp, seq_len = plan.layout.cp, plan.ask.work.seq_len
    rules = [
        ("cp", cp, f"is 1 for {flavour.config}, whose attention is varlen",
         cp == 1 or flavour.attention != "varlen"),
        ("seq_len", seq_len, f"is at most {flavour.longest}, what {flavour.config} turns",
         seq_len <= flavour.longest),
    ]  # fmt: skip
    return [Problem(field, value, rule) for field, value, rule, holds in rules if not holds]


def _unsaid_torchtitan(plan: TrainPlan) -> list[Problem]:
    layout, ask, chunks = plan.layout, plan.ask, layers_by_chunk(plan)
    alone = layout.dp * layout.cp == 1
    rules = [
        ("precision", ask.precision, "is fp32, bf16 or fp8", ask.precision in _TITAN_PRECISION),
        ("zero", layout.zero, "is 0, 2 or 3: FSDP splits gradients with the optimizer's state",
         layout.zero != 1 or alone),
        ("zero", layout.zero, "is 2 or 3 where cp is above 1: FSDP splits over context ranks",
         layout.zero >= 2 or layout.cp == 1),
        ("zero", layout.zero, "is 2 or 3 where ep is above 1: experts are dealt over FSDP's ranks",
         layout.zero >= 2 or layout.ep == 1),
        shards_contexts(layout),
        ("cp_by", layout.cp_by, "is gather where cp is above 1: flex attention gathers keys and values",
         layout.cp == 1 or layout.cp_by == "gather"),
        ("offload", layout.offload, "is none: FSDP's own offloads weights and gradients too",
         layout.offload == "none"),
        ("recompute", ask.work.recompute, "is none or full: its selective is another policy",
         ask.work.recompute != "selective"),
        ("schedule", layout.schedule, "is 1f1b, gpipe or dualpipev: PyTorch has no other of ours",
         type(layout.pipeline) in _TITAN_SCHEDULE),
        ("pp", layout.pp, "gives all chunks but the two ends equally many layers",
         len(set(chunks[1:-1])) < 2 and (len(chunks) < 3 or max(chunks) == chunks[1])),
    ]  # fmt: skip
    bad = [Problem(field, value, rule) for field, value, rule, holds in rules if not holds]
    return [*bad, *_unsaid_model(plan)]
