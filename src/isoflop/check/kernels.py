"""The kernels of a training step, each as our own model runs it, at sizes of a coarse grid.

Nothing here knows a model's shape. A kernel is timed through autograd, several copies in a
row whose outputs stay alive until their backward, as in a real step; so the dispatcher,
autograd and the allocator are inside the seconds, not beside them.

Letters: B batch · T tokens · D width · H d_head · N heads · V classes.
"""

from __future__ import annotations

import mmap
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from itertools import count, cycle
from typing import Any, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from isoflop.arch.spec import LayerNorm, RmsNorm, Rope
from isoflop.attention import attention
from isoflop.model.loss import surprisal, surprisal_gradient_
from isoflop.model.parts import ACTIVATIONS, clamped_unit, make_norm
from isoflop.model.rotary import Rotation
from isoflop.train.data import Batches
from isoflop.train.optim import Optimizer, adamw
from isoflop.train.recipe import Recipe

Seconds: TypeAlias = Mapping[str, float]
Operation: TypeAlias = Callable[[Tensor], Tensor]

#: Live outputs of one timing stay below this, so that a small machine can calibrate.
BYTES_MOST_ALIVE = 64 * 2**20

#: Writing so much empties the caches nearest to a core.
BYTES_FLUSH = 16 * 2**20

#: One timing lasts about this long, so that the clock's own step does not matter.
SECONDS_SAMPLE = 1e-3

#: Calls of one timing.
MOST_COPIES = 64


@dataclass(frozen=True, slots=True)
class Differentiable:
    """An operation on one tensor; `chained` feeds its output back in, as a stack would.

    Unchained copies are independent: `make` gives each its own weights.
    """

    make: Callable[[], tuple[Tensor, Operation]]
    chained: bool

    def sample(self, copies: int) -> Seconds:
        """Seconds per call of one forward and one backward over `copies` calls."""
        made = [self.make() for _ in range(1 if self.chained else copies)]
        for x, _ in made:
            if x.is_floating_point():
                x.requires_grad_()
        began = time.perf_counter()
        if self.chained:
            (y, operation), *_ = made
            for _ in range(copies):
                y = operation(y)
            outputs = [y]
        else:
            outputs = [operation(x) for x, operation in made]
        turned = time.perf_counter()
        # Gradients of ones: their making is outside both clocks.
        grads = [torch.ones_like(y) for y in outputs]
        began_backward = time.perf_counter()
        torch.autograd.backward(outputs, grads)
        ended = time.perf_counter()
        return {
            "_forward": (turned - began) / copies,
            "_backward": (ended - began_backward) / copies,
        }


@dataclass(frozen=True, slots=True)
class Plain:
    """Work without a backward; `run` does it once and returns its seconds."""

    run: Callable[[], float]

    def sample(self, copies: int) -> Seconds:
        return {"": sum(self.run() for _ in range(copies)) / copies}


Bench: TypeAlias = Differentiable | Plain


@dataclass(frozen=True, slots=True)
class Kernel:
    """A kernel, its sizes, and how to set one up; `elements` is what one call writes."""

    name: str
    axes: tuple[str, ...]
    grid: tuple[tuple[int, ...], ...]
    bench: Callable[..., Bench]
    elements: Callable[..., int]


@torch.no_grad()
def _filled(module: nn.Module) -> nn.Module:
    """A module with small equal weights: drawing them would take longer than the timing."""
    module.to_empty(device="cpu")
    for weight in module.parameters():
        weight.fill_(0.01)
    return module


def _linear(rows: int, inner: int, cols: int) -> Bench:
    # Each copy has its own input and weight: a step comes back to neither soon.
    return Differentiable(
        lambda: (
            torch.full((rows, inner), 0.5),
            _filled(nn.Linear(inner, cols, bias=False, device="meta")),
        ),
        chained=False,
    )


def _bias(rows: int, cols: int) -> Bench:
    """A linear layer's bias: copied to each row before the product, its gradient a sum over rows."""
    return Differentiable(
        lambda: (torch.randn(cols), lambda b: b.expand(rows, cols).clone()), chained=False
    )


def _heads(x: Tensor, d_head: int) -> Tensor:
    split: Tensor = x.unflatten(-1, (-1, d_head))  # type: ignore[no-untyped-call]  # torch leaves it unannotated
    return split


def _attention(heads: int, tokens: int, d_head: int, group: int, **told: Any) -> Bench:
    """`heads` counts the query heads of all sequences, four to a sequence here.

    `group` of them share a key-value head, which PyTorch's CPU kernel makes copies of. What
    `attention` is told decides what runs (isoflop.plan.attention_kernel).
    """
    batch = heads // 4
    shape, shape_kv = (batch, tokens, 4 * d_head), (batch, tokens, 4 // group * d_head)

    def make() -> tuple[Tensor, Operation]:
        keys, values = _leaves(torch.randn(shape_kv)), _leaves(torch.randn(shape_kv))

        def operation(q: Tensor) -> Tensor:
            parts = (_heads(x, d_head) for x in (q, next(keys), next(values)))
            out: Tensor = attention(*parts, causal=True, **told)
            return out.flatten(-2)

        return torch.randn(shape), operation

    return Differentiable(make, chained=True)


def _elements_of_scores(heads: int, tokens: int, d_head: int, _group: int) -> int:
    """Where no kernel is fused, every pair's score stands in memory some four times."""
    return heads * tokens * (6 * d_head + 4 * tokens)


def _norm(norm: LayerNorm | RmsNorm, rows: int, width: int) -> Bench:
    module = _filled(make_norm(norm, width))
    return Differentiable(lambda: (torch.randn(rows, width), module), chained=True)


def _rotary(rows: int, d_head: int) -> Bench:
    """`rows` are the heads of all tokens; four heads to a token here."""
    tokens = rows // 4
    turn = Rotation.of(Rope(), d_head, torch.arange(tokens), torch.float32, tokens)
    return Differentiable(lambda: (torch.randn(1, tokens, 4, d_head), turn), chained=True)


def _pointwise(operation: Operation, elements: int) -> Bench:
    # Not chained: squares of squares soon leave the numbers that real activations are.
    width = min(elements, 256)
    x = torch.randn(elements // width, width)
    return Differentiable(lambda: (x.clone(), operation), chained=False)


def _add(elements: int) -> Bench:
    """One sum; its backward passes the gradient on. Sums of gradients are priced as sums."""
    width = min(elements, 256)
    shape = (elements // width, width)
    # What is added was written long before, and has left the caches nearest to the core.
    others = cycle([torch.randn(shape) for _ in range(min(BYTES_MOST_ALIVE // 4 // elements, 32))])
    return Differentiable(lambda: (torch.randn(shape), lambda x: x + next(others)), chained=True)


def _multiply(elements: int) -> Bench:
    """The product of a gate and what it lets through, both trained."""
    width = min(elements, 256)
    other = torch.randn(elements // width, width)

    def make() -> tuple[Tensor, Operation]:
        others = _leaves(other)
        return torch.randn_like(other), lambda x: x * next(others)

    return Differentiable(make, chained=True)


def _leaves(x: Tensor) -> Iterator[Tensor]:
    """One buffer as trained tensors that are each their own: no gradients add up."""
    return iter([x.detach().requires_grad_() for _ in range(MOST_COPIES)])


def _gather(rows: int, width: int, table: int) -> Bench:
    def make() -> tuple[Tensor, Operation]:
        return torch.randint(table, (rows,)), _filled(nn.Embedding(table, width, device="meta"))

    return Differentiable(make, chained=False)


def _loss(rows: int, classes: int) -> Bench:
    """Logits to their losses, and then to their gradient, as the trained head has them."""
    drawn, target_R1 = torch.randn(rows, classes), torch.randint(classes, (rows, 1))
    logits = torch.empty_like(drawn)

    def run() -> float:
        logits.copy_(drawn)  # a product has just written them
        began = time.perf_counter()
        surprisal(logits, target_R1, p_out=logits).sum()
        surprisal_gradient_(logits, target_R1, 1 / rows, out=logits)
        return time.perf_counter() - began

    return Plain(run)


def _batch(batch: int, seq_len: int) -> Bench:
    text = torch.zeros(4 * batch * seq_len + 1, dtype=torch.uint8)
    batches = Batches(text, seq_len, batch, seed=0)
    numbers = count()

    def run() -> float:
        began = time.perf_counter()
        batches(next(numbers) % 3)
        return time.perf_counter() - began

    return Plain(run)


def _optimizer(tensors: int, elements: int) -> Bench:
    """The trainer's own step over equal tensors: norm, clipping, fused AdamW, zeroing."""
    # Half of them matrices and half vectors, which makes the trainer's two groups.
    shapes = [(1, elements), (elements,)] * (tensors // 2)
    model = nn.ParameterList(torch.randn(shape) for shape in shapes)
    recipe = Recipe(seq_len=1, batch_size=1, steps=10**9, learning_rate=1e-4)
    optimizer = Optimizer(adamw(model, recipe), recipe)

    def run() -> float:
        for weight in model:
            weight.grad = torch.ones_like(weight)
        # A real step's activations have pushed weights and moments out of the caches.
        torch.empty(BYTES_FLUSH, dtype=torch.uint8).fill_(0)
        began = time.perf_counter()
        optimizer.step(model.parameters(), 0)
        return time.perf_counter() - began

    return Plain(run)


def _fresh(size: int) -> Bench:
    """What writing to `size` bytes just given by the kernel costs beyond writing again.

    Large blocks come from the kernel each time and go back when freed: every page is
    faulted in and zeroed. Smaller ones are reused, and need no such time.
    """

    def run() -> float:
        with mmap.mmap(-1, size) as pages:
            block = torch.frombuffer(pages, dtype=torch.uint8)
            began = time.perf_counter()
            block.fill_(1)
            filled = time.perf_counter()
            block.fill_(2)
            again = time.perf_counter() - filled
            del block  # the pages cannot be unmapped under it
        return max(filled - began - again, 1e-9)

    return Plain(run)


_HEADS = ("heads", "tokens", "d_head", "group")
_WIDTHS = (32, 64, 128, 512, 2048)
_ELEMENTS = (2**10, 2**13, 2**16, 2**19, 2**21)


def _elementwise(name: str, operation: Operation) -> Kernel:
    return Kernel(
        name, ("elements",), (_ELEMENTS,), partial(_pointwise, operation), lambda n: 2 * n
    )


#: Every kernel that is timed. `isoflop.plan.cost` says which operator reads which curve.
KERNELS: tuple[Kernel, ...] = (
    Kernel("linear", ("rows", "inner", "cols"), ((64, 256, 1024), _WIDTHS, _WIDTHS),
           _linear, lambda m, k, n: m * (n + k) + 2 * k * n),
    Kernel("bias", ("rows", "cols"), ((64, 512, 4096), (64, 512)), _bias, lambda m, n: m * n),
    Kernel("attention", _HEADS, ((4, 32), (32, 128, 512), (16, 64), (1, 4)), _attention,
           lambda n, t, h, _: 6 * n * t * h),
    Kernel("attention_scores", _HEADS, ((4, 12), (32, 128, 512), (16, 64), (1,)),
           partial(_attention, alibi=torch.full((4,), 0.5)), _elements_of_scores),
    Kernel("attention_own", _HEADS, ((4, 12), (32, 128, 256, 512), (16, 64), (1, 4)),
           partial(_attention, softcap=50.0), _elements_of_scores),
    Kernel("layer_norm", ("rows", "width"), ((32, 512, 4096), (32, 128, 512)),
           partial(_norm, LayerNorm()), lambda m, n: 2 * m * n),
    Kernel("rms_norm", ("rows", "width"), ((32, 512, 4096), (32, 128, 512)),
           partial(_norm, RmsNorm()), lambda m, n: 3 * m * n),
    Kernel("rotary", ("rows", "d_head"), ((128, 2048, 32768), (16, 64)), _rotary, lambda m, h: 4 * m * h),
    Kernel("add", ("elements",), (_ELEMENTS,), _add, lambda n: 2 * n),
    Kernel("multiply", ("elements",), (_ELEMENTS,), _multiply, lambda n: 4 * n),
    *(_elementwise(name, operation) for name, operation in ACTIVATIONS.items()),
    _elementwise("silu_clamped", lambda x: clamped_unit(x, x)),  # its product too
    _elementwise("dropout", partial(F.dropout, p=0.1)),
    Kernel("gather", ("rows", "width", "table"), ((64, 1024, 8192), (64, 512), (256, 8192)),
           _gather, lambda m, n, v: m * n + 2 * v * n),
    Kernel("loss", ("rows", "classes"), ((64, 512), (256, 2048, 16384)), _loss, lambda m, n: 3 * m * n),
    Kernel("batch", ("batch", "seq_len"), ((2, 32), (64, 512)), _batch, lambda *_: 0),
    Kernel("optimizer", ("tensors", "elements"), ((2, 16), (64, 4096, 65536, 524288)),
           _optimizer, lambda *_: 0),
    Kernel("fresh", ("bytes",), ((2**20, 2**26),), _fresh, lambda *_: 0),
)  # fmt: skip


@dataclass(slots=True)
class Point:
    """One grid point of one kernel, ready to be timed again."""

    kernel: Kernel
    sizes: tuple[int, ...]
    bench: Bench
    copies: int


def try_point(kernel: Kernel, sizes: tuple[int, ...]) -> tuple[Point, float]:
    """Set a point up and run it once; says how many copies make a timing, and its seconds."""
    bench = kernel.bench(*sizes)
    room = max(BYTES_MOST_ALIVE // max(4 * kernel.elements(*sizes), 1), 1)
    once = sum(bench.sample(1).values())
    once = min(once, sum(bench.sample(1).values()))
    fewest = 8 if isinstance(bench, Differentiable) and bench.chained else 2
    copies = min(max(round(SECONDS_SAMPLE / once), fewest if once < 0.01 else 1), room, MOST_COPIES)
    return Point(kernel, sizes, bench, copies), once


def point_of(name: str, sizes: tuple[int, ...]) -> Point:
    """One point of the grid of the kernel called `name`, as a calibration times it."""
    kernel = next(kernel for kernel in KERNELS if kernel.name == name)
    return try_point(kernel, sizes)[0]
