"""isoflop compare"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from isoflop.arch import Arch
from isoflop.cli.options import Count, Json, Stored, load_model
from isoflop.cli.output import emit, say
from isoflop.count import (
    Precision,
    Workload,
    bytes_kv_cache,
    bytes_weights,
    flops_forward,
    flops_training,
    params,
)
from isoflop.errors import InputError, Problem
from isoflop.quantity.node import plain
from isoflop.quantity.units import format_bytes, format_count, format_si
from isoflop.report.text import table


def compare(
    *models: str,
    seq_len: Count = 2048,
    batch: Count = 1,
    precision: Stored = Precision.BF16,
    as_json: Json = False,
) -> None:
    """Hold models side by side: parameters, FLOPs per token, bytes.

    Parameters
    ----------
    models
        Two or more: zoo names, config.json files or folders, TOML specs, hf:ORG/NAME.
    seq_len
        Tokens per sequence, the same for all.
    batch
        Sequences at once.
    precision
        How weights are stored; keys and values are stored in 16 bits at least.
    """
    if len(models) < 2:
        rule = "names at least two models"
        raise InputError("compare", [Problem("models", len(models), rule)])
    work = Workload.train(batch, seq_len)
    rows = [measure_of(load_model(name), work, precision) for name in models]
    if as_json:
        return emit(
            "compare",
            {"seq_len": seq_len, "batch": batch, "precision": precision.value, "models": rows},
        )
    return say(render(rows, work, precision))


def measure_of(arch: Arch, work: Workload, precision: Precision) -> dict[str, Any]:
    """The numbers that models are held against each other by."""
    cached = precision if precision in (Precision.FP32, Precision.FP16) else Precision.BF16
    tokens = work.tokens
    return {
        "name": arch.name,
        "params": plain(params(arch).value),
        "params_active": plain(params(arch, active=True).value),
        "n_layers": arch.n_layers,
        "d_model": arch.d_model,
        "max_seq_len": arch.max_seq_len,
        "flops_forward_per_token": plain((flops_forward(arch, work).total / tokens).value),
        "flops_training_per_token": plain((flops_training(arch, work) / tokens).value),
        "bytes_weights": plain(bytes_weights(arch, precision).value),
        "bytes_kv_cache": plain(bytes_kv_cache(arch, work, cached).value),
    }


def render(rows: list[dict[str, Any]], work: Workload, precision: Precision) -> str:
    """One column per model."""
    shown: dict[str, Callable[[dict[str, Any]], str]] = {
        "parameters": lambda r: format_count(r["params"]),
        "active per token": lambda r: format_count(r["params_active"]),
        "layers x width": lambda r: f"{r['n_layers']} x {r['d_model']}",
        "context": lambda r: f"{r['max_seq_len']:,}",
        "forward, per token": lambda r: format_si(r["flops_forward_per_token"], "FLOP"),
        "training, per token": lambda r: format_si(r["flops_training_per_token"], "FLOP"),
        "weights": lambda r: format_bytes(r["bytes_weights"]),
        "key-value cache": lambda r: format_bytes(r["bytes_kv_cache"]),
    }
    body = [[name, *(tell(row) for row in rows)] for name, tell in shown.items()]
    title = f"{work.batch} x {work.seq_len:,} tokens, weights in {precision.value}"
    return table(body, [title, *(row["name"] for row in rows)], "l" + "r" * len(rows))
