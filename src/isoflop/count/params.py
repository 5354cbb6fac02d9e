"""Parameters: a fold over the weights of the description.

Conventions differ over which weights "N" means; each is a named selection on one tree
(`CONVENTIONS`), never a second count.
"""

from __future__ import annotations

from dataclasses import dataclass

from isoflop.arch.spec import Arch
from isoflop.count.blocks import Part, describe
from isoflop.count.workload import Workload
from isoflop.quantity import Expr, Node, branch, leaf, total

#: Weights do not depend on the work; any workload gives the same ones.
_ANY = Workload(1, 1, 1)


def params(arch: Arch, *, active: bool = False) -> Node:
    """The weights of a model by path; with `active`, those that work on one token.

    Tied weights are counted once, where they are stored: under `embedding`.

    >>> from isoflop.arch import gpt
    >>> gpt2 = gpt("gpt2", d_model=768, n_layers=12, n_heads=12, vocab_size=50257, max_seq_len=1024)
    >>> params(gpt2).value
    124439808
    >>> params(gpt2).find("layer/feed_forward/up").size.text
    'd_model * d_ff + d_ff'
    """
    return _fold(describe(arch, _ANY), active, root=True)


def buffers(arch: Arch) -> Node | None:
    """Numbers that are stored with the weights and not trained, by path; None where there are none.

    >>> from isoflop.arch import zoo
    >>> buffers(zoo.entry("deepseek-v3").arch).value  # a correction per expert of 58 layers
    14848
    """
    root = describe(arch, _ANY)
    return _buffers(root) if _has_buffers(root) else None


def _buffers(part: Part) -> Node:
    if part.buffers:
        return leaf(part.name, "buffers", total(b.size for b in part.buffers), times=part.times)
    below = [_buffers(p) for p in part.parts if _has_buffers(p)]
    return branch(part.name, "buffers", below, times=part.times)


def _has_buffers(part: Part) -> bool:
    return bool(part.buffers) or any(map(_has_buffers, part.parts))


def _fold(part: Part, active: bool, *, root: bool = False) -> Node:
    name = "params" if root else part.name
    times = part.active if active and part.active is not None else part.times
    if part.parts:
        kept = [_fold(p, active) for p in part.parts if has_weights(p)]
        return branch(name, "params", kept, times=times)
    return leaf(name, "params", total(w.size for w in part.weights), times=times)


def has_weights(part: Part) -> bool:
    return bool(part.weights) or any(map(has_weights, part.parts))


@dataclass(frozen=True, slots=True)
class Convention:
    """Which weights a paper's "N" counts: those whose path starts with none of `without`."""

    name: str
    without: tuple[str, ...]
    source: str

    def count(self, tree: Node) -> Expr:
        """The selected part of a parameter tree."""
        return total(child.total for child in tree.children if child.name not in self.without)


CONVENTIONS = {
    c.name: c
    for c in (
        Convention("total", (), "every trained weight"),
        Convention("kaplan", ("embedding", "head"), "Kaplan 2020 (2001.08361), section 2.1"),
        Convention("non_embedding", ("embedding",), "total less the input embeddings"),
    )
}
