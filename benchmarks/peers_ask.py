"""Other planners asked for the seconds of training steps: run by benchmarks/peers.py.

    VENV/bin/python benchmarks/peers_ask.py < ask.json > answer.json

This file runs in an interpreter that has the peers and not isoflop, so it imports nothing of
isoflop. Each peer is called as its documentation shows; what it has no word for is skipped with
the reason. Input: rows, and the efficiencies to ask for; output: for each peer its version, its
answers in seconds or the reason for none, and how many answers it gave per second of the
processor.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial
from importlib.metadata import version
from typing import Any, TypeAlias

from llm_analysis.analysis import ActivationRecomputation, DSZeRO, LLMAnalysis
from llm_analysis.config import (
    ModelConfig,
    ParallelismConfig,
    get_dtype_config_by_name,
    get_gpu_config_by_name,
)
from llm_analysis.logger import logger
from mlsysim import Hardware, Systems
from mlsysim.core.units import Q_
from mlsysim.models.types import TransformerWorkload
from mlsysim.solvers import DistributedModel, ParallelismOptimizer
from mlsysim.systems.types import Fleet, Node

Row: TypeAlias = dict[str, Any]
PASSES = 5


class Skip(Exception):
    """Why a peer cannot be asked a row."""


# --- llm-analysis ------------------------------------------------------------------------------

GPUS = {
    "a100-sxm-40gb": "a100-sxm-40gb", "a100-sxm-80gb": "a100-sxm-80gb", "h100-sxm": "h100-sxm-80gb",
    "v100-sxm-16gb": "v100-sxm-16gb", "v100-sxm-32gb": "v100-sxm-32gb",
}  # fmt: skip
#: It has no FP8; the rate of its 8-bit integers is that of FP8 on an H100.
DTYPES = {"fp16": "w16a16e16", "bf16": "w16a16e16", "fp8": "w8a8e16"}


def llm_analysis(row: Row, efficiency: float | None, _recommended: bool) -> float:
    """Seconds of a step by LLMAnalysis.training; `None` leaves its own efficiency of 1."""
    if row["chip"] not in GPUS:
        raise Skip(f"{row['chip']} is not in its catalogue")
    if row["compute"] not in DTYPES:
        raise Skip(f"no word for {row['compute']}")
    if row["tp"] > 8:
        raise Skip("tensor parallel over more than a node")
    width = row["d_ff"] / row["d_model"]
    model = ModelConfig(
        row["id"], row["n_layers"], row["n_heads"], row["d_model"], row["vocab_size"],
        max_seq_len=row["seq_len"], num_key_value_heads=row["n_kv_heads"],
        ffn_embed_dim=row["d_ff"], expansion_ratio=width,
    )  # fmt: skip
    tp = row["tp"]
    split = ParallelismConfig(
        tp, row["pp"], row["dp"], sp_size=tp if row["sequence_parallel"] else 1
    )
    analysis = LLMAnalysis(
        model,
        get_gpu_config_by_name(GPUS[row["chip"]]),
        get_dtype_config_by_name(DTYPES[row["compute"]]),
        split,
        flops_efficiency=efficiency,
    )
    found = analysis.training(
        batch_size_per_gpu=row["micro_batch"],
        global_batch_size=row["global_batch"],
        seq_len=row["seq_len"],
        activation_recomputation=ActivationRecomputation[row["recompute"].upper()],
        ds_zero=DSZeRO(row["zero"]),
        mlp_gated_linear_units=row["gated"],
    )
    return float(found["latency_per_iter"])


# --- mlsysim -----------------------------------------------------------------------------------


def node(name: str, like: Node, chip: Any) -> Node:
    """A node that it does not ship, from its own chip and another of its nodes."""
    return Node(
        name=name, accelerator=chip, accelerators_per_node=8, intra_node_bw=like.intra_node_bw
    )


HDR, NDR = Systems.Fabrics.InfiniBand_HDR, Systems.Fabrics.InfiniBand_NDR
NODES = {
    "a100-sxm-80gb": (Systems.Nodes.DGX_A100, HDR),
    "a100-sxm-40gb": (node("8 x A100 40GB", Systems.Nodes.DGX_A100, Hardware.Cloud.A100_40GB), HDR),
    "h100-sxm": (Systems.Nodes.DGX_H100, NDR),
    "b200-sxm": (Systems.Nodes.DGX_B200, NDR),
}


def workload(row: Row, given_flops: bool = False) -> TransformerWorkload:
    flops = Q_(row["flops_forward_per_token"], "flop") if given_flops else None
    return TransformerWorkload(
        name=row["id"], architecture="Transformer", parameters=Q_(row["params"], "count"),
        layers=row["n_layers"], hidden_dim=row["d_model"], heads=row["n_heads"],
        kv_heads=row["n_kv_heads"], vocab_size=row["vocab_size"],
        inference_flops=flops,
    )  # fmt: skip


def fleet(row: Row) -> Fleet:
    if row["chip"] not in NODES:
        raise Skip(f"no node of {row['chip']} in its catalogue")
    count = row["tp"] * row["pp"] * row["dp"]
    if count % 8:
        raise Skip("not a whole number of its nodes")
    built, fabric = NODES[row["chip"]]
    return Fleet(name="fleet", node=built, count=count // 8, fabric=fabric)


def mlsysim(
    row: Row, efficiency: float | None, recommended: bool, given_flops: bool = False
) -> float:
    """Seconds of a step by DistributedModel; `None` leaves its own efficiency of 0.5.

    With `given_flops` it is told the FLOPs of a token, which else it takes from the parameters.
    """
    if row["compute"] not in ("fp16", "bf16", "fp8"):
        raise Skip(f"no word for {row['compute']}")
    chosen = {} if efficiency is None else {"efficiency": efficiency}
    found = DistributedModel().solve(
        workload(row, given_flops), fleet(row), batch_size=row["global_batch"], precision=row["compute"],
        tp_size=row["tp"], pp_size=row["pp"], v_stages=row["virtual"],
        microbatch_count=row["n_micro_batches"], zero_stage=row["zero"],
        gradient_accumulation_steps=row["n_micro_batches"] if row["pp"] == 1 else 1,
        activation_recomputation=row["recompute"] == "full", overlap_comm=recommended,
        seq_len=row["seq_len"], **chosen,
    )  # fmt: skip
    return float(found.step_latency_total.m_as("second"))


def searched(row: Row) -> dict[str, float]:
    """Layouts that its own search priced, and the processor's seconds, for the row's question."""
    priced, seconds = 0, []
    solve = DistributedModel.solve

    def counted(*given: Any, **named: Any) -> Any:
        nonlocal priced
        priced += 1
        return solve(*given, **named)

    DistributedModel.solve = counted
    try:
        for _ in range(PASSES):
            start = time.process_time()
            ParallelismOptimizer().solve(
                workload(row), fleet(row), batch_size=row["global_batch"], seq_len=row["seq_len"],
                activation_recomputation=True,
            )  # fmt: skip
            seconds.append(time.process_time() - start)
        return {"layouts": priced / PASSES, "seconds": statistics.median(seconds)}
    finally:
        DistributedModel.solve = solve


# --- both --------------------------------------------------------------------------------------

Peer: TypeAlias = Callable[[Row, float | None, bool], float]


def answer(peer: Peer, row: Row, efficiency: float | None, recommended: bool) -> float | str:
    """Seconds, or the reason why there are none."""
    if row["experts"]:
        return "mixture of experts: left out of this page"
    if row["cp"] > 1:
        return "context parallelism: no word for it"
    try:
        return peer(row, efficiency, recommended)
    except Skip as why:
        return str(why)
    except (AssertionError, ValueError) as error:
        return f"refused: {error or 'its own assertion'}"


def speed(peer: Peer, rows: list[Row]) -> dict[str, float]:
    """Answers per second of the processor: the first pass, and the median of later ones."""
    seconds = []
    for _ in range(1 + PASSES):
        start = time.process_time()
        for row in rows:
            peer(row, None, False)
        seconds.append(time.process_time() - start)
    return {"first": len(rows) / seconds[0], "again": len(rows) / statistics.median(seconds[1:])}


def asked(name: str, peer: Peer, given: dict[str, Any]) -> dict[str, Any]:
    rows = given["rows"]
    common = [r for r in rows if not any(isinstance(answer(p, r, None, False), str)
                                         for p in (llm_analysis, mlsysim))]  # fmt: skip
    return {
        "version": version(name.partition(" ")[0]),
        "speed": speed(peer, common),
        "default": {r["id"]: answer(peer, r, None, False) for r in rows},
        "at": {
            str(share): {r["id"]: answer(peer, r, share, True) for r in rows}
            for share in given["efficiencies"][name]
        },
    }


def main() -> None:
    logger.setLevel("ERROR")
    given = json.load(sys.stdin)
    found = {
        "python": sys.version.split()[0],
        "llm-analysis": asked("llm-analysis", llm_analysis, given),
        "mlsysim": asked("mlsysim", mlsysim, given),
        "mlsysim given FLOPs": asked(
            "mlsysim given FLOPs", partial(mlsysim, given_flops=True), given
        ),
        "searched": searched(given["search"]),
    }
    json.dump(found, sys.stdout)


if __name__ == "__main__":
    main()
