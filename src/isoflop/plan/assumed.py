"""What a first-order plan assumes where the user says nothing, each with its 90 % range.

A number that the user gives replaces the assumption and has no range.
"""

from __future__ import annotations

import math
from typing import Any

from isoflop.errors import InputError, Problem
from isoflop.quantity import Basis, Interval, Symbol
from isoflop.quantity.node import plain


def _assumed(
    name: str, value: float, *, spread: tuple[float, float], meaning: str, source: str
) -> Symbol:
    return Symbol(name, value, Basis.ASSUMED, Interval(*spread), source=source, meaning=meaning)


UTILIZATION = _assumed(
    "utilization_of_roofline",
    0.5,
    spread=(0.25, 0.75),
    meaning=(
        "share of the roofline's rate that the steps of a training run reach: kernels, "
        "communication and pipeline bubbles together"
    ),
    source=(
        "199 published steps of dense models on A100 and H100 reach 0.43 to 0.73 of this "
        "roofline, median 0.59; those are tuned, and most runs reach less"
    ),
)

EFFICIENCY_COMPUTE = _assumed(
    "efficiency_compute",
    0.55,
    spread=(0.35, 0.75),
    meaning="share of peak FLOP/s that reading a prompt reaches",
    source=(
        "prompts of 512 to 2048 tokens on A100 reach 0.6 to 0.7 in FasterTransformer and "
        "TensorRT-LLM at batch 1; other engines and parallel servers less"
    ),
)

EFFICIENCY_BANDWIDTH = _assumed(
    "efficiency_bandwidth",
    0.6,
    spread=(0.3, 0.8),
    meaning="share of memory bandwidth that decoding reaches",
    source=(
        "7B to 72B models at batch 1 on A100 reach 0.54 to 0.76 in gpt-fast, vLLM and "
        "FasterTransformer, 0.27 for a small model split 8 ways"
    ),
)

SECONDS_LAYER = _assumed(
    "seconds_layer_launched",
    1.4e-4,
    spread=(5e-5, 4e-4),
    meaning="least time that a decoder layer takes, for its kernels have to start one by one",
    source=(
        "10 fused kernels of a captured graph at about 5 us each to 40 eager ones at 10 us, "
        "and the middle by ratio; a launch takes 4 to 6 us (susun-blog.com, pegainfer 3), an "
        "eager framework's 5 to 20 us"
    ),
)

SECONDS_ALL_REDUCE = _assumed(
    "seconds_all_reduce",
    1.2e-5,
    spread=(5e-6, 3e-5),
    meaning="time of one small all-reduce inside a node, of which a layer split by tensors has two",
    source=(
        "one-shot kernels of serving engines take 5 to 10 us, NCCL 18 us for 32 KiB on 8 H200, "
        "more on older machines; the middle by ratio"
    ),
)

WATTS_SHARE = _assumed(
    "watts_drawn_per_rated",
    1.0,
    spread=(0.7, 1.3),
    meaning="power drawn, with the chip's part of its host, over the chip's rated limit",
    source=(
        "model cards report the rated limit (Touvron 2023, table 15); "
        "Patterson 2021 (2104.10350) measured 330 W on 300 W chips"
    ),
)

PUE = _assumed(
    "pue",
    1.1,
    spread=(1.05, 1.5),
    meaning="energy of the building over energy of its machines",
    source="1.1 in Patterson 2021 (2104.10350) and Touvron 2023; the world's mean is about 1.5",
)

CARBON = _assumed(
    "kg_co2e_per_kwh",
    0.4,
    spread=(0.06, 0.6),
    meaning="greenhouse gas of the electricity used, by where the machines stand",
    source=(
        "means of the United States: 0.429 in Patterson 2021 (2104.10350), table 4, 0.385 in "
        "Touvron 2023 (2302.13971), table 15; the world's is about 0.48; sites on wind, water "
        "or nuclear power lie below 0.1 (0.057 for BLOOM, Luccioni 2022, 2211.02001)"
    ),
)

HOURS_BETWEEN_FAILURES = _assumed(
    "hours_between_failures",
    45_000,
    spread=(13_000, 80_000),
    meaning="mean accelerator-hours of training between failures that stop the run",
    source=(
        "Llama 3 (2407.21783, section 3.3.4): 419 unexpected interruptions of 16,384 H100 in "
        "54 days, 50,700 h; BLOOM (2211.05100, 3.4): 1 to 2 a week on 384 A100, 43,000 h; "
        "OPT-175B (2205.01068, 2.5): about 105 restarts of 992 A100 in 2 months, 13,600 h"
    ),
)

SECONDS_RESTART = _assumed(
    "seconds_restart",
    660,
    spread=(240, 2400),
    meaning="from a failure until the run trains again: found, replaced, started, loaded",
    source=(
        "Llama 3 (2407.21783, 3.3.4) trained over 90 % of the time through 466 interruptions in "
        "54 days: at most 17 min each, lost work included; a report on 504 B200 has a median of "
        "11 min between retries"
    ),
)

OVERRUN = _assumed(
    "overrun",
    1.25,
    spread=(1.0, 1.6),
    meaning=(
        "hours of a run over what its steps at a benchmark's pace, checkpoints and failures take: "
        "slower software and layouts, evaluation, data, steps run again, slow days"
    ),
    source=(
        "15 published runs of 6 sources took 1.25 times what is planned without it, the median of "
        "the sources' medians (docs/run-validation.md; 1.22 to 1.28 with one of them left out). "
        "Over a run's own measured rate it is 1.00 for LLaMA 65B (2302.13971, 2.4 and table 15), "
        "1.13 for BLOOM (1.083 M hours in 2211.02001, 150 TFLOP/s on its card), 1.17 for Llama 3.1 "
        "405B (30.84 M hours on its card, 3.8e25 FLOPs at 400 TFLOP/s in 2407.21783, table 4)"
    ),
)

STORAGE_RATE = _assumed(
    "bytes_per_second_storage",
    0.12e9,
    spread=(0.04e9, 1e9),
    meaning="rate at which each accelerator writes its part of a checkpoint to storage",
    source="Llama 3 (2407.21783, section 3.3.1): 2 TB/s sustained for 16,384 H100",
)

HOST_RATE = _assumed(
    "bytes_per_second_to_host",
    10e9,
    spread=(3e9, 25e9),
    meaning="rate at which each accelerator copies its part of a checkpoint to host memory",
    source="PCIe 4.0 x16 moves 32 GB/s at most, often shared by two accelerators",
)


def choose(default: Symbol, given: float | None) -> Symbol:
    """The user's number in place of the assumption, or the assumption.

    Raises:
        InputError: the number given is not finite and above zero.

    >>> choose(PUE, None).value, choose(PUE, 1.2).basis.value
    (1.1, 'exact')
    """
    if given is None:
        return default
    real = isinstance(given, (int, float)) and not isinstance(given, bool)
    if not (real and math.isfinite(given) and given > 0):
        raise InputError("plan", [Problem(default.name, given, "is a finite number above 0")])
    return Symbol(default.name, given, source="given", meaning=default.meaning)


def assumption_json(symbol: Symbol) -> dict[str, Any]:
    """An assumption as plain data."""
    return {
        "name": symbol.name,
        "value": plain(symbol.value),
        "interval": symbol.spread.to_json() if symbol.spread else None,
        "meaning": symbol.meaning,
        "source": symbol.source,
    }
