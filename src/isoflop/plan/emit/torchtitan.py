"""A plan in the words of torchtitan."""

from __future__ import annotations

from collections.abc import Mapping

from isoflop.errors import Problem
from isoflop.plan.emit.asked import layers_by_chunk, n_steps, refuse, toml_value
from isoflop.plan.training.plan import TrainPlan


def torchtitan(plan: TrainPlan) -> str:
    """A torchtitan job's TOML: training, parallelism, activation_checkpoint (config/job_config.py).

    ZeRO 2 keeps weights gathered from forward to backward, ZeRO 3 gathers them again; with a
    pipeline, a local batch is all micro-batches of a step.
    """
    refuse("torchtitan", _unsaid_torchtitan(plan))
    layout, ask = plan.layout, plan.ask
    n_micro = layout.n_micro_batches(ask.global_batch)
    tables: dict[str, dict[str, str | int]] = {
        "training": {
            "local_batch_size": layout.micro_batch * (n_micro if layout.pp > 1 else 1),
            "global_batch_size": ask.global_batch,
            "seq_len": ask.work.seq_len,
            "steps": n_steps(plan),
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
    chunks, layout = layers_by_chunk(plan), plan.layout
    return {
        "pipeline_parallel_schedule": "Interleaved1F1B" if layout.virtual > 1 else "1F1B",
        "pipeline_parallel_microbatch_size": layout.micro_batch,
        "pipeline_parallel_layers_per_stage": max(chunks),
        "pipeline_parallel_first_stage_less_layers": max(chunks) - chunks[0],
        "pipeline_parallel_last_stage_less_layers": max(chunks) - chunks[-1],
    }


_TITAN_PRECISION: Mapping[str, str] = {"fp32": "float32", "bf16": "bfloat16"}


def _unsaid_torchtitan(plan: TrainPlan) -> list[Problem]:
    layout, ask, chunks = plan.layout, plan.ask, layers_by_chunk(plan)
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
        ("pp", layout.pp, "gives all chunks but the two ends equally many layers",
         len(set(chunks[1:-1])) < 2 and (len(chunks) < 3 or max(chunks) == chunks[1])),
    ]  # fmt: skip
    return [Problem(field, value, rule) for field, value, rule, holds in rules if not holds]


def _table(item: tuple[str, Mapping[str, str | int]]) -> str:
    name, values = item
    lines = [f"{key} = {toml_value(value)}" for key, value in values.items()]
    return "\n".join([f"[{name}]", *lines, ""])
