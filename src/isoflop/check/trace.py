"""Seconds of each operator in a real step, under the paths of the count trees.

PyTorch's profiler times every operation. A forward operation belongs to the innermost
module that is running, found by hooks, a backward one to the forward operation that made
its node: autograd numbers nodes in the order of the forward pass. The profiler adds about
a microsecond to every operation, so small models look slower than they are.
"""

from __future__ import annotations

import os
import re
from bisect import bisect_right
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import cycle
from typing import Any

from torch import nn
from torch.autograd.profiler import record_function
from torch.profiler import ProfilerActivity, profile

from isoflop.check.paths import tree_path
from isoflop.model import Decoder, EncoderDecoder
from isoflop.model.experts import ExpertsModule
from isoflop.model.layer import LayerModule

#: Opens the name of a module's range, so that no operation is taken for one.
MARK = "module:"
EVALUATE = "autograd::engine::evaluate_function: "

#: The head and the loss in one, some rows at a time (isoflop.model.loss). Of each three
#: products the first makes logits, the others gradients.
BY_ROWS = "_LossByRows"
PRODUCTS = ("aten::mm", "aten::addmm", "aten::matmul")
PHASES_OF_HEAD = ("forward/head", "backward/head", "backward/head")

#: Work that no module of its own does: the module around it, a sign in the operation's
#: name ("" for any), and the last step of the path in the count trees.
LOOSE = (
    (r"(.*/)?attention", r"roll|addcmul|turn|cat|polar|complex", "rotary"),
    (r"(.*/)?(attention|cross)", r"", "core"),
    (r"(.*/)?(feed_forward|experts|shared)", r"", "activation"),
    (r"", r"", "loss"),
)

#: What a block does itself, where its kind says it.
OWN_WORK: dict[type[nn.Module], str] = {LayerModule: "/residual", ExpertsModule: "/sum"}

Rows = dict[str, float]


@contextmanager
def _silent() -> Iterator[None]:
    """Nothing on stderr: the profiler's C++ side announces itself there."""
    kept, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)


def trace(model: Decoder | EncoderDecoder, step: Callable[[int], Any], repeats: int) -> Rows:
    """Seconds per step by `phase/path`; sums of weight gradients are `backward/gradients`."""
    with _silent(), _named(model), profile(activities=[ProfilerActivity.CPU]) as found:
        for number in range(repeats):
            step(number)
    rows: Rows = defaultdict(float)
    starts: list[int] = []
    owners: list[str] = []
    of_head = cycle(PHASES_OF_HEAD)
    # `events` lists ranges before what is inside them; names nest by time.
    for event in sorted(_operations(found.events()), key=lambda e: e.time_range.start):
        seconds = _microseconds(event) * 1e-6 / repeats
        if _is_in(event, BY_ROWS):
            rows[next(of_head) if event.name in PRODUCTS else "forward/loss"] += seconds
        elif event.name.startswith(EVALUATE):
            rows[f"backward/{_owner(event, starts, owners)}"] += seconds
        elif event.name.startswith(("Optimizer", "aten::_foreach", "aten::_fused")):
            rows["optimizer"] += seconds
        elif (path := _path(event)) is not None:
            rows[f"forward/{path}"] += seconds
            if event.sequence_nr >= 0:
                starts.append(event.sequence_nr)
                owners.append(path)
    return dict(rows)


def _operations(events: Any) -> Iterator[Any]:
    """Operations that no other operation called; ranges do not count as such."""
    for event in events:
        outermost = event.cpu_parent is None or _is_in(event, MARK) or _is_in(event, BY_ROWS)
        if outermost and not event.name.startswith(MARK):
            yield event


def _is_in(event: Any, name: str) -> bool:
    """Whether the range or operation of that name called it."""
    return event.cpu_parent is not None and event.cpu_parent.name.startswith(name)


def _microseconds(event: Any) -> float:
    """Of an operation; the head and the loss in one count what they do not call others for."""
    whole: float = event.time_range.elapsed_us()
    return float(event.self_cpu_time_total) if event.name == BY_ROWS else whole


def _owner(event: Any, starts: list[int], owners: list[str]) -> str:
    if "AccumulateGrad" in event.name:
        return "gradients"
    place = bisect_right(starts, event.sequence_nr) - 1
    return owners[place] if place >= 0 else "other"


def _path(event: Any) -> str | None:
    """The count tree's path of a forward operation; None outside the model."""
    if event.cpu_parent is None:
        return "loss" if "cross_entropy" in event.name else None
    module = str(event.cpu_parent.name).removeprefix(MARK)
    for pattern, sign, last in LOOSE:
        if re.fullmatch(pattern, module) and re.search(sign, event.name.lower()):
            return f"{module}/{last}".removeprefix("/")
    return module


@contextmanager
def _named(model: Decoder | EncoderDecoder) -> Iterator[None]:
    """Every module runs inside a range that bears its path, `layers.0` read as its kind."""
    open_ranges: list[record_function] = []
    handles = []

    def enter(path: str) -> Callable[..., None]:
        def hook(*_: Any) -> None:
            open_ranges.append(record_function(MARK + path))
            open_ranges[-1].__enter__()  # type: ignore[no-untyped-call]  # torch leaves it unannotated

        return hook

    def leave(*_: Any) -> None:
        open_ranges.pop().__exit__(None, None, None)

    try:
        for path, module in _paths(model):
            handles.append(module.register_forward_pre_hook(enter(path)))
            handles.append(module.register_forward_hook(leave))
        yield
    finally:
        for handle in handles:
            handle.remove()


def _paths(model: Decoder | EncoderDecoder) -> Iterator[tuple[str, nn.Module]]:
    for name, module in model.named_modules():
        if isinstance(module, (nn.ModuleList, nn.Identity)):
            continue
        own = next((last for kind, last in OWN_WORK.items() if isinstance(module, kind)), "")
        yield tree_path(name, model.arch) + own, module
