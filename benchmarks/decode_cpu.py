"""What a key-value cache gains over none, and what sharing, latents and windows gain over all heads.

    OMP_NUM_THREADS=1 python benchmarks/decode_cpu.py -o benchmarks/decode_cpu.md

One model of about 27 million parameters, one text, one thread. A token's time is predicted from
what it must read, weights and cache as isoflop counts them, at the bandwidth of a large matrix times a
vector; a pass without a cache from its FLOPs, at the rate of a large product. Both rates are measured
in the same rounds, between the models, and a large sum's beside them. Times are processor time, the models in turn within a round and in
reverse in every other, medians over the rounds: ratios are what counts, the machine is shared.
Caches are filled with random numbers: what stands in one changes no time.
"""

from __future__ import annotations

import argparse
import platform
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path

import torch

from isoflop.arch import Arch, Attention, LatentAttention, llama
from isoflop.arch.spec import Rope, Window
from isoflop.count import Precision, Workload, bytes_kv_cache, bytes_weights
from isoflop.count.flops import flops_prefill
from isoflop.infer import Cached, Recomputed
from isoflop.model import build

CONTEXTS = (512, 1024, 2048, 4096, 8192)
HEADS, D_HEAD = 8, 64
BASE = llama("decode", d_model=512, n_layers=8, n_heads=HEADS, d_head=D_HEAD, d_ff=1408,
             vocab_size=8192, max_seq_len=max(CONTEXTS), tied=True)  # fmt: skip
#: DeepSeek-V2's proportions: a latent of four heads, half a head turned (2405.04434, section 3.1.2).
LATENT = LatentAttention(HEADS, 4 * D_HEAD, D_HEAD, D_HEAD // 2, D_HEAD)
KINDS: dict[str, Attention | LatentAttention] = {
    "MHA": Attention(HEADS, HEADS, D_HEAD, Rope()),
    "GQA, 2 kv heads": Attention(HEADS, 2, D_HEAD, Rope()),
    "MQA": Attention(HEADS, 1, D_HEAD, Rope()),
    "MLA, latent of 256": LATENT,
    "MHA, window of 512": Attention(HEADS, HEADS, D_HEAD, Rope(), Window(512)),
}
FIRST = "MHA"
NO_CACHE = "MHA without a cache"
#: Tokens per sample; a pass over a whole text is one of its own.
STEPS = 8
#: Far beyond the last level of any cache.
BYTES_READ = 2**28


@dataclass(frozen=True, slots=True)
class Timed:
    """Seconds of a token: predicted from bytes (or FLOPs), and measured."""

    bytes_read: int
    predicted: float
    measured: float


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("-o", "--out", type=Path)
    parser.add_argument("--rounds", type=int, default=7)
    options = parser.parse_args()
    torch.set_num_threads(1)
    text = "\n".join(_page(options.rounds)) + "\n"
    print(text) if options.out is None else options.out.write_text(text)


def arch_of(kind: str) -> Arch:
    layer = replace(BASE.layers[0], attention=KINDS[kind])
    return replace(BASE, layers=(layer,) * BASE.n_layers)


def bytes_per_token(arch: Arch, context: int) -> int:
    """What one token reads: every weight once (the tied embedding is the head), and the cache."""
    cache = bytes_kv_cache(arch, Workload.decode(1, context), Precision.FP32)
    return int(bytes_weights(arch, Precision.FP32).value) + int(cache.value)


def _page(rounds: int) -> Iterator[str]:
    yield "# Decoding on a CPU: caches, and kinds of attention"
    yield ""
    yield f"Command: `OMP_NUM_THREADS=1 python {' '.join(sys.argv)}`."
    yield f"{datetime.now(UTC):%Y-%m-%d}, {_processor()}, PyTorch {torch.__version__}, one thread."
    models = {kind: build(arch_of(kind)).eval() for kind in KINDS}
    yield (
        f"{BASE.n_layers} layers of {BASE.d_model}, {HEADS} heads of {D_HEAD}, float32, one text; "
        f"weights {bytes_weights(BASE, Precision.FP32).value / 1e6:.0f} MB (MHA)."
    )
    yield ""
    yield "Milliseconds per token; gains are over MHA with a cache at the same context. Predicted: bytes at"
    yield "the bandwidth of a large matrix times a vector; without a cache, FLOPs at the rate of a large"
    yield "product; both measured in the same rounds. `reached`: predicted over measured time."
    yield ""
    yield (
        "| context | model | MB read | predicted ms | measured ms | reached | gain predicted | gain measured |"
    )
    yield "|--:|---|--:|--:|--:|--:|--:|--:|"
    rates = []
    for context in CONTEXTS:
        rows, rate = _at(context, models, rounds)
        rates.append(f"| {context} | {' | '.join(f'{x / 1e9:.1f}' for x in rate)} |")
        for kind, row in rows.items():
            yield _line(context, kind, row, rows[FIRST])
            print(context, kind, row, file=sys.stderr, flush=True)
    yield ""
    yield "Every gain stays behind its prediction: the model's matrices are smaller than the one that was timed"
    yield "and are read more slowly, and what software does between kernels is the same for all. Where heads share"
    yield "a key or a latent they also do more arithmetic per cached byte than one core has to spare."
    yield ""
    yield "Rates measured in the rounds of each context."
    yield ""
    yield "| context | a matrix times a vector, GB/s | a sum, GB/s | a product of matrices, GFLOP/s |"
    yield "|--:|--:|--:|--:|"
    yield from rates


def _line(context: int, kind: str, row: Timed, first: Timed) -> str:
    cells = [
        str(context),
        kind,
        "-" if kind == NO_CACHE else f"{row.bytes_read / 1e6:.0f}",
        f"{row.predicted * 1e3:.1f}",
        f"{row.measured * 1e3:.1f}",
        f"{row.predicted / row.measured:.0%}",
        _gain(first.predicted / row.predicted),
        _gain(first.measured / row.measured),
    ]
    return f"| {' | '.join(cells)} |"


def _gain(ratio: float) -> str:
    return f"{ratio:.2f}" if ratio > 0.5 else f"1/{1 / ratio:.0f}"


def _at(
    context: int, models: Mapping[str, torch.nn.Module], rounds: int
) -> tuple[dict[str, Timed], tuple[float, float, float]]:
    """Every model at one context, and the rates of these rounds."""
    large, x, a = torch.rand(BYTES_READ // 4096, 1024), torch.rand(1024), torch.rand(1024, 1024)
    tasks: dict[str, Callable[[], object]] = {
        "vector": lambda: large @ x,
        "sum": large.sum,
        "product": lambda: a @ a,
        NO_CACHE: _whole_pass(models[FIRST], context),
        **{kind: _steps(model, context) for kind, model in models.items()},
    }
    seconds = _medians(tasks, rounds)
    bandwidth, summed = (BYTES_READ / seconds[name] for name in ("vector", "sum"))
    rate = 2 * 1024**3 / seconds["product"]
    flops = float(flops_prefill(arch_of(FIRST), 1, context, causal_skip=True).value)
    rows = {NO_CACHE: Timed(0, flops / rate, seconds[NO_CACHE])}
    for kind in models:
        n_bytes = bytes_per_token(arch_of(kind), context)
        rows[kind] = Timed(n_bytes, n_bytes / bandwidth, seconds[kind] / STEPS)
    return rows, (bandwidth, summed, rate)


def _steps(model: torch.nn.Module, context: int) -> Callable[[], None]:
    """The tokens that bring a text to `context`, from a cache that holds all before."""
    reader = Cached(model, 1, context)
    for stores in reader.cache.stores:
        for store in stores:
            store.normal_()

    @torch.inference_mode()
    def run() -> None:
        reader.cache.lengths = [context - STEPS]
        token = torch.zeros(1, 1, dtype=torch.int64)
        for _ in range(STEPS):
            token = reader.read(token, [1]).argmax(-1)[:, None]

    return run


def _whole_pass(model: torch.nn.Module, context: int) -> Callable[[], None]:
    tokens = torch.zeros(1, context, dtype=torch.int64)

    @torch.inference_mode()
    def run() -> None:
        Recomputed(model, 1, context).read(tokens, [context])

    return run


def _medians(tasks: Mapping[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """Processor time of each, in turn."""
    taken: dict[str, list[float]] = {name: [] for name in tasks}
    for i in range(rounds + 1):
        for name in list(tasks) if i % 2 else reversed(list(tasks)):
            if name == NO_CACHE and i > 3:  # seconds to a minute each
                continue
            began = time.process_time()
            tasks[name]()
            if i > 0:  # the first round warms up
                taken[name].append(time.process_time() - began)
    return {name: statistics.median(times) for name, times in taken.items()}


def _processor() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor()


if __name__ == "__main__":
    main()
