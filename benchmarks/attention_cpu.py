"""Attention on this CPU: blockwise and reference against SDPA, in time and peak memory.

    OMP_NUM_THREADS=1 python benchmarks/attention_cpu.py -o benchmarks/attention_cpu.md

Times are processor time of one thread, the backends in turn within a round, medians over the
rounds; ratios are what counts, the machine is shared. Memory is how far the resident set rises
above what it was before the step, each cell in a fresh process. The second table is what
chooses among backends where SDPA needs a dense mask or cannot do the job.
"""

from __future__ import annotations

import argparse
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from isoflop.attention import attention

HEADS, D_HEAD = 4, 64
LENGTHS = (512, 1024, 2048, 4096, 8192)
#: Every score in memory, several times over: 3 GB at 8192 tokens.
LONGEST_REFERENCE = 4096
#: name -> what is asked beside causality, and the kv heads.
FEATURES: dict[str, tuple[dict[str, Any], int]] = {
    "window of 256": ({"window": 256}, HEADS),
    "window of 256, 4 sinks": ({"window": 256, "sinks": 4}, HEADS),
    "ALiBi": ({"alibi": torch.tensor([0.5, 0.25, 0.125, 0.0625])}, HEADS),
    "softcap of 30": ({"softcap": 30.0}, HEADS),
    "learned sinks": ({"sinks": torch.zeros(HEADS)}, HEADS),
    "dropout of 0.1": ({"dropout_p": 0.1}, HEADS),
    "one kv head": ({}, 1),
}


def main() -> None:
    options = _options()
    if options.memory:
        print(_rise(*options.memory))
        return
    torch.set_num_threads(1)
    lines = [*_head(), *_plain(options.rounds), "", *_features(options.rounds)]
    text = "\n".join(lines) + "\n"
    if options.out is None:
        print(text)
    else:
        options.out.write_text(text)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("-o", "--out", type=Path)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--memory", nargs=3, metavar=("BACKEND", "N", "PASS"))
    return parser.parse_args()


def _head() -> Iterator[str]:
    yield "# Attention on a CPU"
    yield ""
    yield f"Command: `OMP_NUM_THREADS=1 python {' '.join(sys.argv)}`. "
    yield f"{datetime.now(UTC):%Y-%m-%d}, {_processor()}, PyTorch {torch.__version__}, one thread."
    yield f"One sequence, {HEADS} heads of {D_HEAD}, causal, float32. `+MB` is the rise of the resident"
    yield "set (inputs apart, outputs and gradients with it). Ratios are to SDPA's processor time."
    yield ""


def _processor() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor()


def _plain(rounds: int) -> Iterator[str]:
    yield "| pass | N | SDPA ms (+MB) | blockwise ratio (+MB) | reference ratio (+MB) |"
    yield "|---|--:|--:|--:|--:|"
    for name in ("forward", "forward + backward"):
        for n in LENGTHS:
            backends = ["sdpa", "blockwise", *(["reference"] if n <= LONGEST_REFERENCE else [])]
            step = {b: _step(b, n, backward=name != "forward") for b in backends}
            seconds = _medians(step, rounds)
            cells = [f"{seconds['sdpa'] * 1e3:.1f} (+{_fresh_rise('sdpa', n, name)})"]
            for backend in backends[1:]:
                ratio = seconds[backend] / seconds["sdpa"]
                cells.append(f"{ratio:.2f} (+{_fresh_rise(backend, n, name)})")
            cells += ["-"] * (3 - len(cells))
            yield f"| {name} | {n} | {' | '.join(cells)} |"
            print(n, name, cells, file=sys.stderr, flush=True)


def _features(rounds: int) -> Iterator[str]:
    yield "Forward and backward, milliseconds; `-`: the backend cannot."
    yield ""
    yield "| beside causality | N | SDPA | reference | blockwise |"
    yield "|---|--:|--:|--:|--:|"
    for name, (asked, n_kv_heads) in FEATURES.items():
        for n in (256, 512, 1024, 2048):
            step = {}
            for backend in ("sdpa", "reference", "blockwise"):
                if backend == "sdpa" and ({"softcap"} & set(asked) or name == "learned sinks"):
                    continue
                step[backend] = _step(backend, n, backward=True, n_kv_heads=n_kv_heads, **asked)
            seconds = _medians(step, rounds)
            cells = [
                f"{seconds[b] * 1e3:.1f}" if b in seconds else "-"
                for b in ("sdpa", "reference", "blockwise")
            ]
            yield f"| {name} | {n} | {' | '.join(cells)} |"
            print(name, n, cells, file=sys.stderr, flush=True)


def _inputs(n: int, n_kv_heads: int) -> list[Tensor]:
    heads = HEADS, n_kv_heads, n_kv_heads
    return [torch.randn(1, n, h, D_HEAD, requires_grad=True) for h in heads]


def _step(
    backend: str, n: int, *, backward: bool, n_kv_heads: int = HEADS, **asked: Any
) -> Callable[[], None]:
    q, k, v = _inputs(n, n_kv_heads)
    weights = torch.randn(1, n, HEADS, D_HEAD)

    def step() -> None:
        with torch.set_grad_enabled(backward):
            out = attention(q, k, v, causal=True, backend=backend, **asked)  # type: ignore[call-overload]
        if backward:
            torch.autograd.grad(out, (q, k, v), weights)

    return step


def _medians(steps: dict[str, Callable[[], None]], rounds: int) -> dict[str, float]:
    """Processor seconds of each; the order turns round every second time."""
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for step in steps.values():
        step()
    for i in range(rounds):
        for name in (list(steps), list(reversed(steps)))[i % 2]:
            before = time.process_time()
            steps[name]()
            seconds[name].append(time.process_time() - before)
    return {name: statistics.median(s) for name, s in seconds.items()}


def _fresh_rise(backend: str, n: int, name: str) -> str:
    command = [sys.executable, __file__, "--memory", backend, str(n), name]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return done.stdout.strip()


def _rise(backend: str, n: str, name: str) -> int:
    """MB that the resident set rises in one step; small ones before it load what is needed."""
    torch.set_num_threads(1)
    _step(backend, 64, backward=name != "forward")()
    step = _step(backend, int(n), backward=name != "forward")
    Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here
    before = _resident("VmRSS")
    step()
    return round((_resident("VmHWM") - before) * 1024 / 1e6)


def _resident(key: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(key))


if __name__ == "__main__":
    main()
