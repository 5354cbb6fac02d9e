"""How light the light side is: a cold `isoflop count`, and parameter trees per second.

    python benchmarks/light.py -o benchmarks

The cold command is timed in turn with an interpreter that does nothing, and the medians
are subtracted: a shared machine slows both. Before a rate is measured, what is timed is
compared with trees built anew.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from isoflop.arch import Arch, load
from isoflop.count import params
from isoflop.quantity.expr import compile_expressions

MODEL = "llama-3-8b"
#: As the installed script does it, whatever is installed.
COMMAND = ["-c", "from isoflop.cli import main; main()", "count", MODEL]
NOTHING = ["-c", "pass"]
#: Structure stays, sizes vary: these symbols of a Llama's tree take other integers each time.
VARIED = ("d_model", "d_ff", "n_layers", "vocab_size")


def seconds_of(arguments: list[str], kept: dict[str, str]) -> float:
    """One process, from its start to its end."""
    start = time.perf_counter()
    subprocess.run([sys.executable, *arguments], check=True, stdout=subprocess.DEVNULL, env=kept)
    return time.perf_counter() - start


def cold(repeats: int) -> dict[str, Any]:
    """Medians over alternating runs. The first of each is left out: it fills the file cache,
    and compiles every module into a folder that the others read, as an installed program's are.
    """
    counting, nothing = [], []
    with tempfile.TemporaryDirectory() as bytecode:
        kept = os.environ | {"PYTHONPYCACHEPREFIX": bytecode}
        kept.pop("PYTHONDONTWRITEBYTECODE", None)
        for _ in range(repeats + 1):
            nothing.append(seconds_of(NOTHING, kept))
            counting.append(seconds_of(COMMAND, kept))
    counting, nothing = counting[1:], nothing[1:]
    return {
        "repeats": repeats,
        "seconds_count": statistics.median(counting),
        "seconds_nothing": statistics.median(nothing),
        "seconds_over": statistics.median(counting) - statistics.median(nothing),
        "seconds_count_each": counting,
        "seconds_nothing_each": nothing,
    }


def rate(run: Callable[[int], object], seconds: float) -> float:
    """Calls per second, counted over at least `seconds`."""
    calls, start = 0, time.perf_counter()
    while (passed := time.perf_counter() - start) < seconds:
        for _ in range(20):
            run(calls)
            calls += 1
    return calls / passed


def sizes(i: int) -> tuple[int, ...]:
    return 1024 + 128 * (i % 64), 4096 + 256 * (i % 61), 8 + i % 90, 32_000 + i % 100_000


def resized(arch: Arch, i: int) -> Arch:
    """The same structure with the i-th sizes, built as a spec."""
    d_model, d_ff, n_layers, vocab_size = sizes(i)
    layer = arch.layers[0]
    layer = replace(layer, feed_forward=replace(layer.feed_forward, d_ff=d_ff))
    return replace(arch, d_model=d_model, layers=(layer,) * n_layers, vocab_size=vocab_size,
                   embedding=replace(arch.embedding, n_rows=vocab_size))  # fmt: skip


def trees(seconds: float) -> dict[str, Any]:
    """Rates: one number of a tree, every number of it, and the tree built anew."""
    arch = load(MODEL).arch
    nodes = [node for _, node in params(arch).walk()]
    every = compile_expressions([node.total for node in nodes], VARIED)
    for i in range(200):
        fresh = [node.value for _, node in params(resized(arch, i)).walk()]
        assert list(every(*sizes(i))) == fresh
    assert all(isinstance(value, int) for value in every(*sizes(1)))
    return {
        "nodes": len(nodes),
        "trees_evaluated_per_second": rate(lambda i: every(*sizes(i)), seconds),
        "trees_built_per_second": rate(lambda _: params(arch).value, seconds),
    }


def machine() -> dict[str, Any]:
    cpus = [line.partition(":")[2].strip() for line in _lines(Path("/proc/cpuinfo"))
            if line.startswith("model name")]  # fmt: skip
    return {
        "cpu": cpus[0] if cpus else platform.machine(),
        "n_cores": os.cpu_count(),
        "python": platform.python_version(),
        "date": f"{datetime.now(UTC):%Y-%m-%d %H:%M} UTC",
    }


def _lines(path: Path) -> list[str]:
    return path.read_text(encoding="utf-8").splitlines() if path.exists() else []


def page(found: dict[str, Any]) -> str:
    where, start, rates = found["machine"], found["cold"], found["trees"]
    return f"""# How light the light side is

{where["cpu"]}, {where["n_cores"]} cores, Python {where["python"]}, {where["date"]}

    python benchmarks/light.py -o benchmarks

| what | found | bar |
|---|--:|--:|
| `isoflop count {MODEL}`, a fresh process: median of {start["repeats"]} | {start["seconds_count"]:.3f} s | |
| an interpreter that does nothing, timed in turn with it | {start["seconds_nothing"]:.3f} s | |
| the difference | {start["seconds_over"]:.3f} s | 0.35 s |
| full parameter trees evaluated with integers, {rates["nodes"]} numbers each, compiled once | {rates["trees_evaluated_per_second"]:,.0f} per second | 10,000 per second |
| parameter trees built from a spec and totalled | {rates["trees_built_per_second"]:,.0f} per second | |
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--repeats", type=int, default=21)
    parser.add_argument("--seconds", type=float, default=3.0, help="for each rate")
    parser.add_argument("-o", "--output", type=Path, help="folder for the markdown and JSON")
    given = parser.parse_args()
    found = {
        "schema": "isoflop/1",
        "machine": machine(),
        "cold": cold(given.repeats),
        "trees": trees(given.seconds),
    }
    print(page(found))
    if given.output is not None:
        given.output.mkdir(parents=True, exist_ok=True)
        (given.output / "light.md").write_text(page(found), encoding="utf-8")
        (given.output / "light.json").write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
