"""A training step on this CPU, ours and three others': benchmarks/train_step_cpu.md.

    make bench-train-step

makes an environment with the others' packages (.venv-bench) and runs

    OMP_NUM_THREADS=2 .venv-bench/bin/python benchmarks/train_step_cpu.py \
        --threads 1 2 --compile -o benchmarks/train_step_cpu.md

Each builds the same Llama: width, layers, heads, SwiGLU, vocabulary and tied embedding. A step is
forward, the mean cross entropy of the same tokens, backward, torch.optim.AdamW(fused=True) and
zero_grad; ours makes its loss as its trainer does, from the others' logits it is made in fp32 by
PyTorch. bf16 is autocast over fp32 weights for all. They take turns in one process, the order turned
round every second time; freed memory is kept for all alike (isoflop.train.allocator).
"""

from __future__ import annotations

import argparse
import importlib.metadata
import os
import platform
import shutil
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from isoflop.arch import Arch, llama
from isoflop.count import FLOPS_CONVENTIONS, Workload
from isoflop.model import build_decoder
from isoflop.train.allocator import keep_freed_memory

Step: TypeAlias = Callable[[], object]

SEQ_LEN, VOCAB_SIZE, D_HEAD = 256, 8192, 64
#: Sides of the product whose rate is called the peak.
PEAK = 1024
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
PACKAGES = ("transformers", "litgpt", "x-transformers")


@dataclass(frozen=True, slots=True)
class Shape:
    """A Llama of heads of 64."""

    d_model: int
    n_layers: int
    d_ff: int

    @property
    def n_heads(self) -> int:
        return self.d_model // D_HEAD


SHAPES = {"10M": Shape(320, 6, 864), "30M": Shape(512, 8, 1376)}


# --- the models ------------------------------------------------------------------------------


def arch_of(shape: Shape) -> Arch:
    return llama("step", d_model=shape.d_model, n_layers=shape.n_layers, n_heads=shape.n_heads,
                 d_ff=shape.d_ff, vocab_size=VOCAB_SIZE, max_seq_len=SEQ_LEN, tied=True)  # fmt: skip


def isoflop(shape: Shape) -> nn.Module:
    return build_decoder(arch_of(shape))


def transformers(shape: Shape) -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=VOCAB_SIZE, hidden_size=shape.d_model, intermediate_size=shape.d_ff,
        num_hidden_layers=shape.n_layers, num_attention_heads=shape.n_heads,
        max_position_embeddings=SEQ_LEN, tie_word_embeddings=True, use_cache=False,
        attn_implementation="sdpa",
    )  # fmt: skip
    return LlamaForCausalLM(config)


def litgpt(shape: Shape) -> nn.Module:
    from litgpt import GPT, Config

    config = Config(
        name="step", block_size=SEQ_LEN, vocab_size=VOCAB_SIZE, padded_vocab_size=VOCAB_SIZE,
        n_layer=shape.n_layers, n_head=shape.n_heads, n_embd=shape.d_model,
        intermediate_size=shape.d_ff, rotary_percentage=1.0, parallel_residual=False, bias=False,
        norm_class_name="RMSNorm", mlp_class_name="LLaMAMLP",
    )  # fmt: skip
    model = GPT(config)
    model.lm_head.weight = model.transformer.wte.weight
    return model


def x_transformers(shape: Shape) -> nn.Module:
    from x_transformers import Decoder, TransformerWrapper

    layers = Decoder(
        dim=shape.d_model, depth=shape.n_layers, heads=shape.n_heads, attn_dim_head=D_HEAD,
        rotary_pos_emb=True, rotary_emb_dim=D_HEAD, use_rmsnorm=True, attn_flash=True,
        ff_glu=True, ff_swish=True, ff_no_bias=True, ff_mult=shape.d_ff / shape.d_model,
    )  # fmt: skip
    return TransformerWrapper(num_tokens=VOCAB_SIZE, max_seq_len=SEQ_LEN, attn_layers=layers,
                              use_abs_pos_emb=False, tie_embedding=True)  # fmt: skip


MAKERS = {"isoflop": isoflop, "transformers": transformers, "litgpt": litgpt,
          "x-transformers": x_transformers}  # fmt: skip


def blocks(name: str, model: nn.Module) -> Iterable[nn.Module]:
    """What is compiled: the layers, which share their code."""
    if name == "isoflop":
        return model.layers
    if name == "transformers":
        return model.model.layers
    if name == "litgpt":
        return model.transformer.h
    # Norms, block and residual; the attention and the feed-forward are the blocks.
    return [parts[1] for parts in model.attn_layers.layers]


def made(name: str, shape: Shape) -> nn.Module:
    """A model with matrices drawn alike."""
    torch.manual_seed(0)
    model = MAKERS[name](shape).train()
    with torch.no_grad():
        for weight in model.parameters():
            if weight.ndim >= 2:
                weight.normal_(0, 0.02)
    return model


def loss_of(name: str, model: nn.Module, tokens: Tensor, targets: Tensor) -> Tensor:
    if name == "isoflop":
        return model.loss(tokens, targets)
    out = model(tokens)
    logits = out.logits if name == "transformers" else out
    return F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten())


def stepper(name: str, model: nn.Module, batch: int, precision: str) -> Step:
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    tokens = torch.randint(
        VOCAB_SIZE, (batch, SEQ_LEN + 1), generator=torch.Generator().manual_seed(0)
    )
    inputs, targets = tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()

    def step() -> float:
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
            loss = loss_of(name, model, inputs, targets)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss.item()

    return step


def product(precision: str) -> Step:
    a, b = (torch.randn(PEAK, PEAK, dtype=DTYPES[precision]) for _ in range(2))
    return lambda: a @ b


# --- measuring -------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Measured:
    """Seconds of each round by name, and of the first compiled step."""

    seconds: Mapping[str, tuple[float, ...]]
    seconds_compile: Mapping[str, float]

    def median(self, name: str) -> float:
        return statistics.median(self.seconds[name])

    def ratio(self, name: str) -> float:
        """How many times as long as ours, the median over rounds of what stood side by side."""
        pairs = zip(self.seconds[name], self.seconds["isoflop"], strict=True)
        return statistics.median(theirs / ours for theirs, ours in pairs)


def measure(
    shape: Shape, precision: str, options: argparse.Namespace, threads: int, *, compiled: bool
) -> Measured:
    torch.set_num_threads(threads)
    torch.compiler.reset()
    steps: dict[str, Step] = {}
    seconds_compile = {}
    for name in MAKERS:
        model = made(name, shape)
        if compiled:
            for block in blocks(name, model):
                block.compile(dynamic=False)
        steps[name] = stepper(name, model, options.batch, precision)
        began = time.perf_counter()
        steps[name]()
        seconds_compile[name] = time.perf_counter() - began
    steps["peak"] = product(precision)
    # One thread's processor time does not see who else is on the core; two threads wait in turns.
    clock = time.process_time if threads == 1 else time.perf_counter
    seconds = alternate(steps, options.rounds, clock)
    return Measured(seconds, seconds_compile if compiled else {})


def alternate(
    steps: Mapping[str, Step], rounds: int, clock: Callable[[], float]
) -> dict[str, tuple[float, ...]]:
    """Seconds of each round; the order turns round every second time."""
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(2):
        for step in steps.values():
            step()
    for i in range(rounds):
        for name in (list(steps), list(reversed(steps)))[i % 2]:
            began = clock()
            steps[name]()
            seconds[name].append(clock() - began)
    return {name: tuple(values) for name, values in seconds.items()}


# --- the page --------------------------------------------------------------------------------


def head(options: argparse.Namespace) -> Iterator[str]:
    yield "# A training step on a CPU"
    yield ""
    yield f"Command: `python {' '.join(sys.argv)}`. {datetime.now(UTC):%Y-%m-%d}, {processor()},"
    yield f"{os.cpu_count()} cores, load {os.getloadavg()[0]:.1f} when it began (others worked beside it)."
    versions = [f"{name} {importlib.metadata.version(name)}" for name in ("torch", *PACKAGES)]
    yield f"Python {platform.python_version()}, {', '.join(versions)}."
    yield ""
    yield f"Forward, backward and fused AdamW of a Llama, {options.batch} sequences of {SEQ_LEN} tokens,"
    yield f"vocabulary {VOCAB_SIZE}, tied; medians of {options.rounds} rounds that take turns. bf16 is autocast."
    yield "`x` is how many times as long the other takes as isoflop, the median of what stood side by"
    yield "side. The peak is that of a product of two 1024 x 1024 matrices between the steps. One thread"
    yield "is timed in processor time, more by the clock."
    yield ""


def processor() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor()


def counts() -> Iterator[str]:
    yield "| parameters | " + " | ".join(MAKERS) + " |"
    yield "|---|" + "--:|" * len(MAKERS)
    for size, shape in SHAPES.items():
        cells = (
            f"{sum(p.numel() for p in make(shape).parameters()):,}" for make in MAKERS.values()
        )
        yield f"| {size} | {' | '.join(cells)} |"
    yield ""


def table(options: argparse.Namespace, *, compiled: bool) -> Iterator[str]:
    yield "## " + ("Blocks compiled" if compiled else "Eager")
    yield ""
    cold = " | seconds of the first step, in the same order" if compiled else ""
    yield f"| threads | model | precision | tokens/s | of peak | {' x | '.join(PACKAGES)} x{cold} |"
    yield "|--:|---|---|--:|--:|" + "--:|" * (len(PACKAGES) + compiled)
    for threads in options.threads:
        for size in options.sizes:
            for precision in DTYPES:
                found = measure(SHAPES[size], precision, options, threads, compiled=compiled)
                row = (
                    f"| {threads} | {size} | {precision} | {cells(found, SHAPES[size], options)} |"
                )
                print(row, file=sys.stderr, flush=True)
                yield row
    yield ""


def cells(found: Measured, shape: Shape, options: argparse.Namespace) -> str:
    work = Workload.train(options.batch, SEQ_LEN)
    flops = float(FLOPS_CONVENTIONS["exact-causal"].count(arch_of(shape), work).value)
    ours = found.median("isoflop")
    share = flops / ours / (2 * PEAK**3 / found.median("peak"))
    tokens_per_second = options.batch * SEQ_LEN / ours
    told = [f"{tokens_per_second:,.0f}", f"{share:.0%}"]
    told += [f"{found.ratio(name):.2f}" for name in PACKAGES]
    if found.seconds_compile:
        told.append(", ".join(f"{s:.0f}" for s in found.seconds_compile.values()))
    return " | ".join(told)


def main() -> None:
    options = read_options()
    warnings.filterwarnings("ignore")  # the others' own
    keep_freed_memory()
    lines = [*head(options), *counts(), *table(options, compiled=False)]
    if options.compile:
        cache = tempfile.mkdtemp()
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = cache  # empty: compile times are cold
        try:
            lines += table(options, compiled=True)
        finally:
            shutil.rmtree(cache, ignore_errors=True)
    text = "\n".join(lines)
    if options.out is None:
        print(text)
    else:
        options.out.write_text(text)


def read_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("-o", "--out", type=Path)
    parser.add_argument("--threads", type=int, nargs="+", default=[1])
    parser.add_argument("--sizes", choices=list(SHAPES), nargs="+", default=list(SHAPES))
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--compile", action="store_true", help="also with compiled blocks")
    return parser.parse_args()


if __name__ == "__main__":
    main()
