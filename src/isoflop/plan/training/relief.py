"""What would make a training run fit that does not."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from isoflop.errors import Infeasible, InputError
from isoflop.hardware.node import MOST_CHIPS
from isoflop.plan.layout import Layout
from isoflop.plan.memory.place import place
from isoflop.plan.training.ask import TrainAsk

#: Times that a cluster is doubled, and a sequence halved, in search of what fits.
MOST_DOUBLINGS, MOST_HALVINGS = 7, 7


def relieved(ask: TrainAsk, error: Infeasible) -> Infeasible:
    """The same refusal with what would fit, as far as anything here does."""
    found = tuple(helps(ask))
    return Infeasible(f"{error}\nwhat would fit: {', or '.join(found)}") if found else error


def helps(ask: TrainAsk) -> Iterator[str]:
    """Changes that make room, one at a time, each with the layout that it then takes.

    >>> from isoflop.arch.zoo import entry
    >>> from isoflop.hardware import parse_cluster
    >>> from isoflop.plan.training.work import Work
    >>> work = Work(entry("llama-3-8b").arch, 10**9, 8192)
    >>> for help_ in helps(TrainAsk(work, parse_cluster("2xh100-sxm"), 16)):
    ...     print(help_)
    --recompute full with tp=2 pp=1 dp=1 zero=0
    --seq-len 4,096 with tp=2 pp=1 dp=1 zero=0
    4xh100-sxm with tp=2 pp=1 dp=2 zero=1
    """
    if ask.layout is not None and (layout := _fit(replace(ask, layout=None))):
        yield f"another layout, {layout}"
    if ask.work.recompute != "full":
        full = replace(ask, work=replace(ask.work, recompute="full"))
        if layout := _fit(full):
            yield f"--recompute full with {layout}"
    shorter = _least(_shorter(ask))
    if shorter is not None:
        yield f"--seq-len {shorter.work.seq_len:,} with {_fit(shorter)}"
    larger = _least(_larger(ask)) if ask.layout is None else None
    if larger is not None:
        yield f"{larger.cluster} with {_fit(larger)}"


def _shorter(ask: TrainAsk) -> list[TrainAsk]:
    """Sequences halved, as many more of them in a batch."""
    halvings = range(1, min(MOST_HALVINGS + 1, ask.work.seq_len.bit_length()))
    lengths = ((n, ask.work.seq_len >> n) for n in halvings)
    return [
        replace(ask, work=replace(ask.work, seq_len=short), global_batch=ask.global_batch << n)
        for n, short in lengths
    ]


def _larger(ask: TrainAsk) -> list[TrainAsk]:
    counts = (ask.cluster.count << doublings for doublings in range(1, MOST_DOUBLINGS + 1))
    return [replace(ask, cluster=replace(ask.cluster, count=n)) for n in counts if n <= MOST_CHIPS]


def _least(asks: list[TrainAsk]) -> TrainAsk | None:
    """The first that fits of questions that ask for ever less of each accelerator.

    Found by halving, for to refuse hundreds of layouts takes seconds.
    """
    low, high = 0, len(asks)
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if _fit(asks[middle]) else (middle + 1, high)
    return asks[low] if low < len(asks) else None


def _fit(ask: TrainAsk) -> Layout | None:
    try:
        return place(ask.job, ask.cluster, ask.global_batch, ask.layout)[0]
    except (Infeasible, InputError):
        return None
