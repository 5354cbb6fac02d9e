"""The operator list: every piece of work of a forward pass, with FLOPs and bytes moved."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from isoflop.arch.spec import Arch
from isoflop.count.blocks import Part, describe
from isoflop.count.operators import Operator
from isoflop.count.workload import Precision, Workload
from isoflop.quantity import Expr, number
from isoflop.quantity.expr import product


@dataclass(frozen=True, slots=True)
class Task:
    """One operator at its path; `times` copies of it run, one after the other."""

    path: str
    operator: Operator
    times: Expr

    @property
    def flops(self) -> Expr:
        """FLOPs of one copy, forward."""
        return self.operator.flops

    def bytes_moved(self, weights: Precision, activations: Precision) -> Expr:
        """Bytes one copy must at least read and write, forward."""
        read = self.operator.elements_weight * weights.bytes_each
        return read + self.operator.elements_moved * activations.bytes_each


def tasks(arch: Arch, workload: Workload) -> tuple[Task, ...]:
    """All work of one forward pass in the order in which it runs.

    >>> from isoflop.arch import llama
    >>> tiny = llama("tiny", d_model=64, n_layers=2, n_heads=4, d_ff=128, vocab_size=256, max_seq_len=64)
    >>> [t.path for t in tasks(tiny, Workload.train(1, 64))][:4]
    ['embedding/tokens', 'layer/norm_attention', 'layer/attention/q', 'layer/attention/k']
    """
    root = describe(arch, workload)
    return tuple(task for part in root.parts for task in _walk(part, part.name, number(1)))


def _walk(part: Part, path: str, times: Expr) -> Iterator[Task]:
    copies = product((times, part.times))
    if part.operator is not None:
        yield Task(path, part.operator, copies)
    for below in part.parts:
        yield from _walk(below, f"{path}/{below.name}", copies)
