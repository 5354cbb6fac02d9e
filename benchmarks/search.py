"""How fast the search of all layouts is: benchmarks/search.md is what this prints.

    OMP_NUM_THREADS=1 python benchmarks/search.py -o benchmarks/search.md

Everything runs in one thread. A plan counts as evaluated when its memory and its step time were
both computed.
"""

from __future__ import annotations

import argparse
import platform
import statistics
import time
from datetime import UTC, datetime
from pathlib import Path

import numpy as np

from isoflop.arch.zoo import entry
from isoflop.hardware import parse_cluster
from isoflop.plan.schedule import SCHEDULES
from isoflop.plan.search import Found, search
from isoflop.plan.training.ask import TrainAsk
from isoflop.plan.training.work import Work

#: model, cluster, tokens of a sequence, sequences of a step, stack
CASES = [
    ("gpt3-175b", "384xa100-sxm-80gb", 2048, 1536, "megatron-2022"),
    ("llama-3-70b", "1024xh100-sxm", 8192, 2048, "nemo-24"),
    ("deepseek-v3", "2048xh800-sxm", 4096, 15360, "unknown"),
]
#: Candidates per second of one core, as published or measured before on another machine:
#: Calculon's accepted and refused ones, mlsysim's shallow ones, SimuMax's.
PEERS = {"Calculon": 143.0, "mlsysim": 208.0, "SimuMax": 11.0}


def run(case: tuple[str, str, int, int, str]) -> tuple[Found, float]:
    model, cluster, seq_len, global_batch, stack = case
    work = Work(entry(model).arch, 10**12, seq_len)
    ask = TrainAsk(work, parse_cluster(cluster), global_batch, stack=stack)
    start = time.perf_counter()
    return search(ask, schedules=tuple(SCHEDULES)), time.perf_counter() - start


def row(case: tuple[str, str, int, int, str], repeats: int) -> str:
    runs = [run(case) for _ in range(repeats)]
    counters = [found.counters for found, _ in runs]
    found, first = runs[0][0], counters[0]
    seconds = statistics.median(c.seconds_cpu for c in counters)
    rate = statistics.median(c.plans_per_second_per_core for c in counters)
    whole = statistics.median(wall for _, wall in runs)
    cells = [f"{case[0]} on {case[1]}", f"{first.evaluated:,}",
             f"{first.fit:,}", f"{seconds:.2f}", f"{rate:,.0f}", f"{whole:.1f}",
             f"{found.choice.gap:+.1%}", f"{found.gap_most:.1%}",
             *(f"{rate / peer:,.0f}" for peer in PEERS.values())]  # fmt: skip
    return f"| {' | '.join(cells)} |"


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("-o", "--output", type=Path)
    given = parser.parse_args()
    heads = ["case", "evaluated", "fit", "CPU s", "evaluated / s", "s with simulation", "gap of the best", "largest gap",
             *(f"x {peer}" for peer in PEERS)]  # fmt: skip
    peers = ", ".join(f"{name} {rate:g}" for name, rate in PEERS.items())
    text = "\n".join([
        "# Speed of the search of all layouts", "",
        f"{platform.processor() or platform.machine()}, 1 thread, Python {platform.python_version()}, "
        f"numpy {np.__version__}, {datetime.now(UTC):%Y-%m-%d %H:%M} UTC; medians of {given.repeats} runs",
        "", f"`OMP_NUM_THREADS=1 python benchmarks/search.py --repeats {given.repeats}`", "",
        f"| {' | '.join(heads)} |", f"|---|{'--:|' * (len(heads) - 1)}",
        *(row(case, given.repeats) for case in CASES), "",
        "CPU seconds are from the question to the ranked layouts: enumeration, building and compiling the",
        "formulas, every array. Then the 50 best are run event by event and the uncertain constants are",
        "moved one by one. The gap is the closed form against that simulation.", "",
        f"Others, in candidates per second of one core, on other machines: {peers}.", "",
    ])  # fmt: skip
    print(text) if given.output is None else given.output.write_text(text)


if __name__ == "__main__":
    main()
