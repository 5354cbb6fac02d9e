"""Our Triton kernels on this GPU: correctness, TFLOP/s, and the share of the best library's.

    python benchmarks/attention_gpu.py -o benchmarks/attention_gpu.md

One row per head size, causality, length and pass; 16,384 tokens in all and a model width of
2,048, as the published tables have it. FLOPs are 4 T S N H for forward, half of it when causal,
and 2.5 times that for backward (Dao 2023, 2307.08691, section 4.1). The libraries are those
that are there: SDPA's flash kernel, cuDNN's, FlashAttention-3. Before it is timed, each kernel
is compared with the reference in float32 on the same inputs.
"""

from __future__ import annotations

import argparse
import itertools
import sys
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from importlib.util import find_spec
from pathlib import Path

import torch
import torch.nn.functional as F
import triton
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from isoflop.attention import attention, flash3
from isoflop.attention.arguments import read_options

TOKENS, WIDTH = 16_384, 2_048
HEAD_SIZES = (64, 80, 96, 128, 256)
LENGTHS = (512, 1024, 2048, 4096, 8192, 16_384)
#: Floors of fraction of FlashAttention-3 at head size 128, causal, from 8192 tokens on.
BARS = {"forward": 0.60, "backward": 0.45}
#: What ours may differ from float32 by, in units of the largest value.
CLOSE = {torch.bfloat16: 2e-2, torch.float16: 4e-3}


def main() -> None:
    options = _options()
    if not torch.cuda.is_available():
        sys.exit("attention_gpu: no GPU here; nothing was measured")
    lines = [*_head(), *_rows(getattr(torch, options.dtype), options.lengths, options.head_sizes)]
    text = "\n".join(lines) + "\n"
    if options.out is None:
        print(text)
    else:
        options.out.write_text(text)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("-o", "--out", type=Path)
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float16"))
    parser.add_argument("--lengths", type=int, nargs="+", default=LENGTHS)
    parser.add_argument("--head-sizes", type=int, nargs="+", default=HEAD_SIZES)
    return parser.parse_args()


def _head() -> Iterator[str]:
    yield "# Attention on a GPU"
    yield ""
    yield f"Command: `python {' '.join(sys.argv)}`. {datetime.now(UTC):%Y-%m-%d},"
    yield f"{torch.cuda.get_device_name()}, PyTorch {torch.__version__}, Triton {triton.__version__}."
    yield f"TFLOP/s; `of best` is ours over the fastest library; floors: {BARS} of FlashAttention-3"
    yield "at head size 128, causal, 8192 tokens or more."
    yield ""
    yield "| head | causal | tokens | pass | ours | SDPA flash | cuDNN | FlashAttention-3 | of best | error |"
    yield "|--:|---|--:|---|--:|--:|--:|--:|--:|--:|"


def _rows(dtype: torch.dtype, lengths: list[int], head_sizes: list[int]) -> Iterator[str]:
    for d_head, causal, n in itertools.product(head_sizes, (False, True), lengths):
        batch, n_heads = max(1, TOKENS // n), WIDTH // d_head
        shape = batch, n, n_heads, d_head
        inputs = [
            torch.randn(shape, device="cuda", dtype=dtype, requires_grad=True) for _ in range(3)
        ]
        error = _error(inputs, causal=causal)
        flops = 4 * batch * n_heads * n * n * d_head * (0.5 if causal else 1.0)
        for name, times in (("forward", 1.0), ("backward", 2.5)):
            rates = {
                who: times * flops / _seconds(call, inputs, name) / 1e12
                for who, call in _callers(causal=causal).items()
            }
            yield _row(d_head, n, name, rates, error, causal=causal, close=error <= CLOSE[dtype])
            print(d_head, causal, n, name, rates, file=sys.stderr, flush=True)


def _row(
    d_head: int, n: int, name: str, rates: dict[str, float], error: float,
    *, causal: bool, close: bool,
) -> str:  # fmt: skip
    libraries = {who: rate for who, rate in rates.items() if who != "ours"}
    cells = [
        f"{rates[who]:.0f}" if who in rates else "-" for who in ("ours", "flash", "cudnn", "fa3")
    ]
    best = max((r for r in libraries.values() if r == r), default=float("nan"))  # noqa: PLR0124
    said = f"{error:.0e}" + ("" if close else " WRONG")
    share = f"{rates['ours'] / best:.2f}"
    return f"| {d_head} | {causal} | {n} | {name} | {' | '.join(cells)} | {share} | {said} |"


Caller = Callable[[Tensor, Tensor, Tensor], Tensor]


def _callers(*, causal: bool) -> dict[str, Caller]:
    """Ours, and every library that is there."""
    callers: dict[str, Caller] = {
        "ours": lambda q, k, v: attention(q, k, v, causal=causal, backend="triton"),
        "flash": lambda *x: _sdpa(SDPBackend.FLASH_ATTENTION, *x, causal=causal),
        "cudnn": lambda *x: _sdpa(SDPBackend.CUDNN_ATTENTION, *x, causal=causal),
    }
    if find_spec(flash3.PACKAGE) is not None:
        callers["fa3"] = lambda q, k, v: flash3.attend(
            q, k, v, read_options(q, k, v, causal=causal)
        )[0]
    return callers


def _sdpa(kernel: SDPBackend, q: Tensor, k: Tensor, v: Tensor, *, causal: bool) -> Tensor:
    with sdpa_kernel(kernel):
        out = F.scaled_dot_product_attention(
            *(x.transpose(1, 2) for x in (q, k, v)), is_causal=causal
        )
    return out.transpose(1, 2)


def _seconds(call: Caller, inputs: list[Tensor], name: str) -> float:
    """Of one pass; not a number where the library has no kernel for it."""
    try:
        out = call(*inputs)
        weights = torch.randn_like(out)
        if name == "forward":
            with torch.no_grad():
                return float(triton.testing.do_bench(lambda: call(*inputs))) / 1e3
        run = lambda: torch.autograd.grad(out, inputs, weights, retain_graph=True)  # noqa: E731
        return float(triton.testing.do_bench(run)) / 1e3
    except RuntimeError as refused:
        print(f"{name}: {refused}", file=sys.stderr)
        return float("nan")


def _error(inputs: list[Tensor], *, causal: bool) -> float:
    """The largest of ours over float32's largest, in value and gradients, on a few heads."""
    few = [x[:1, :2048, :2].detach() for x in inputs]
    made = _values(few, causal=causal, backend="triton")
    true = _values([x.float() for x in few], causal=causal, backend="reference")
    return max(
        float((a.float() - b).abs().max() / b.abs().max()) for a, b in zip(made, true, strict=True)
    )


def _values(inputs: list[Tensor], *, causal: bool, backend: str) -> list[Tensor]:
    leaves = [x.clone().requires_grad_() for x in inputs]
    out = attention(*leaves, causal=causal, backend=backend)  # type: ignore[call-overload]
    weights = torch.linspace(-1, 1, out.numel(), device=out.device).view(out.shape).to(out.dtype)
    return [out, *torch.autograd.grad(out, leaves, weights)]


if __name__ == "__main__":
    main()
