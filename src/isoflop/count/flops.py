"""FLOPs: a fold over the operators of the description.

Multiply-accumulates count two, as everywhere in the field; pointwise work counts none.
"""

from __future__ import annotations

from isoflop.arch.spec import Arch
from isoflop.count.blocks import Part, describe
from isoflop.count.params import params
from isoflop.count.workload import Workload
from isoflop.quantity import Expr, Node, branch, leaf, number

#: A matrix product has two gradients, each as large as the product (Kaplan 2020, 2.1).
BACKWARD = 2


def flops_forward(arch: Arch, workload: Workload) -> Node:
    """FLOPs of one forward pass over the whole batch, by path.

    >>> from isoflop.arch import gpt
    >>> gpt2 = gpt("gpt2", d_model=768, n_layers=12, n_heads=12, vocab_size=50257, max_seq_len=1024)
    >>> tree = flops_forward(gpt2, Workload.train(batch=1, seq_len=1024))
    >>> tree.find("layer/attention/core").size.text
    '4 * batch * n_heads * seq_len * seq_len * d_head'
    >>> tree.value
    291648307200
    """
    return _fold(describe(arch, workload), root=True)


def _fold(part: Part, *, root: bool = False) -> Node:
    name = "flops_forward" if root else part.name
    if part.parts:
        return branch(name, "flops", [_fold(p) for p in part.parts if _works(p)], times=part.times)
    assert part.operator is not None
    return leaf(name, "flops", part.operator.flops, times=part.times)


def _works(part: Part) -> bool:
    """Whether the part, or one below it, multiplies."""
    if part.operator is not None and part.operator.flops != number(0):
        return True
    return any(map(_works, part.parts))


def flops_training(arch: Arch, workload: Workload) -> Expr:
    """Forward and backward of one batch: three forward passes' worth, nothing recomputed."""
    return (1 + BACKWARD) * flops_forward(arch, workload).total


def flops_6n(arch: Arch, tokens: Expr | int) -> Expr:
    """The field's rule of thumb, 6 N D, with N all active weights; no attention scores.

    Source: Kaplan 2020 (2001.08361), section 2.1; Hoffmann 2022 (2203.15556), appendix F.
    """
    return 6 * params(arch, active=True).total * tokens
