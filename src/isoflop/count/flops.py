"""FLOPs: a fold over the operators of the description, and the conventions papers use.

Multiply-accumulates count two, as everywhere in the field; pointwise work counts none.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal, TypeAlias

from isoflop.arch.spec import Arch, LatentAttention
from isoflop.count.blocks import Part, describe
from isoflop.count.memory_saved import Recompute, layers_in
from isoflop.count.operators import Core, Matmul
from isoflop.count.params import CONVENTIONS, params
from isoflop.count.workload import Workload
from isoflop.quantity import Expr, Node, Symbol, branch, leaf, number, total

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
    return _fold(describe(arch, workload), "flops_forward")


def flops_backward(arch: Arch, workload: Workload) -> Expr:
    """FLOPs of one backward pass; an image's pixels are data, of which no gradient is taken.

    >>> from isoflop.arch import gpt
    >>> gpt2 = gpt("gpt2", d_model=768, n_layers=12, n_heads=12, vocab_size=50257, max_seq_len=1024)
    >>> flops_backward(gpt2, Workload.train(batch=1, seq_len=1024)).value
    583296614400
    """
    forward = flops_forward(arch, workload)
    if arch.vision is None or not workload.whole:
        return BACKWARD * forward.total
    return BACKWARD * forward.total - forward.find("vision/patches").total


def flops_prefill(arch: Arch, batch: int, prompt: int, *, causal_skip: bool = False) -> Node:
    """FLOPs of reading `batch` prompts: as forward, but logits of the last position only.

    >>> from isoflop.arch import gpt
    >>> gpt2 = gpt("gpt2", d_model=768, n_layers=12, n_heads=12, vocab_size=50257, max_seq_len=1024)
    >>> flops_prefill(gpt2, 1, 1024).find("head").size.text
    '2 * batch * d_model * vocab_size'
    """
    work = Workload.train(batch, prompt, causal_skip=causal_skip)
    return _fold(last_logits(describe(arch, work), work), "flops_prefill")


def flops_decode(arch: Arch, batch: int, context: int) -> Node:
    """FLOPs of one token for each of `batch` sequences that see `context` tokens each."""
    return replace(flops_forward(arch, Workload.decode(batch, context)), name="flops_decode")


def last_logits(root: Part, work: Workload) -> Part:
    """The description with a head that reads each sequence's last position only."""

    def cut(part: Part) -> Part:
        below = tuple(map(cut, part.parts))
        if not isinstance(part.operator, Matmul):
            return replace(part, parts=below)
        return replace(part, operator=replace(part.operator, rows=work.B))

    return replace(root, parts=tuple(cut(p) if p.name == "head" else p for p in root.parts))


def _fold(part: Part, name: str) -> Node:
    if part.parts:
        below = [_fold(p, p.name) for p in part.parts if _works(p)]
        return branch(name, "flops", below, times=part.times)
    assert part.operator is not None
    return leaf(name, "flops", part.operator.flops, times=part.times)


def _works(part: Part) -> bool:
    """Whether the part, or one below it, multiplies."""
    if part.operator is not None and part.operator.flops != number(0):
        return True
    return any(map(_works, part.parts))


def flops_training(arch: Arch, workload: Workload, recompute: Recompute = "none") -> Expr:
    """Forward and backward of one batch, and what is run again.

    `full` runs each layer once more, the head not, whose input is kept (Narayanan 2021,
    2104.04473, equation 3). `selective` runs the scores' two products once more
    (Korthikanti 2022, 2205.05198, appendix A), as flash attention's backward does by itself.
    """
    forward = flops_forward(arch, workload)
    steps = forward.total + flops_backward(arch, workload)
    match recompute:
        case "none":
            return steps
        case "selective":
            return steps + _cores(describe(arch, workload))
        case "full":
            layers = layers_in([describe(arch, workload)])
            return steps + total(_fold(layer, layer.name).total for _, layer in layers)


def _cores(part: Part) -> Expr:
    """FLOPs of scores and their sums over values, all copies."""
    own = part.operator.flops if isinstance(part.operator, Core) else number(0)
    return part.times * total([own, *map(_cores, part.parts)])


def flops_6n(arch: Arch, tokens: Expr | int) -> Expr:
    """The field's rule of thumb, 6 N D, with N all active weights; no attention scores.

    Source: Kaplan 2020 (2001.08361), section 2.1; Hoffmann 2022 (2203.15556), appendix F.
    """
    return 6 * params(arch, active=True).total * tokens


# --- conventions ------------------------------------------------------------------------

Scores: TypeAlias = Literal["none", "full", "causal"]


@dataclass(frozen=True, slots=True)
class Products:
    """Every matrix product of the tree, `scores` over all pairs or those a mask leaves."""

    name: str
    source: str
    scores: Literal["full", "causal"] = "full"
    recompute: Recompute = "none"

    def count(self, arch: Arch, workload: Workload) -> Expr:
        """FLOPs of training on the batch."""
        work = replace(workload, causal_skip=self.scores == "causal")
        return flops_training(arch, work, self.recompute)


@dataclass(frozen=True, slots=True)
class PerWeight:
    """6 FLOPs per active weight and token; `scores` adds 12 T N H per layer and token.

    `weights` is one of the parameter conventions of params.py.
    """

    name: str
    source: str
    weights: str = "total"
    scores: bool = False

    def count(self, arch: Arch, workload: Workload) -> Expr:
        """FLOPs of training on the batch."""
        active = params(arch, active=True)
        multiplied = 6 * CONVENTIONS[self.weights].count(active)
        pairs = 12 * _score_width(arch) * workload.S if self.scores else number(0)
        return workload.tokens * (multiplied + pairs)


FlopsConvention: TypeAlias = Products | PerWeight

FLOPS_CONVENTIONS: dict[str, FlopsConvention] = {
    c.name: c
    for c in (
        Products("exact", "every matrix product, every query-key pair"),
        Products("exact-causal", "every matrix product, only the pairs that a causal mask leaves",
                 scores="causal"),
        PerWeight("6n", "6 N D, N all active weights (Hoffmann 2022, 2203.15556, appendix F, approximation)"),
        PerWeight("kaplan", "6 N D, N without embeddings and head (Kaplan 2020, 2001.08361, 2.1)",
                  weights="kaplan"),
        PerWeight("palm", "6 N + 12 L N_heads H T per token (Chowdhery 2022, 2204.02311, appendix B)",
                  scores=True),
        Products("megatron", "96 B s l h^2 (1 + s/6h + V/16lh), full recomputation counted "
                 "(Narayanan 2021, 2104.04473, equation 3)", recompute="full"),
        Products("megatron-model", "the same without recomputation, 72 B s l h^2 (1 + s/6h + V/12lh)"),
    )
}  # fmt: skip


def _score_width(arch: Arch) -> Expr:
    """Sum over layers of heads times head size, of scores and values on average."""
    widths = []
    for name, layer in arch.kinds.items():
        spec = layer.attention
        if isinstance(spec, LatentAttention):
            size = (spec.d_head_nope + spec.d_head_rope + spec.d_head_value) / number(2)
        else:
            size = Symbol(f"d_head_{name}", spec.d_head, meaning=f"size of a head of {name}")
        heads = Symbol(f"n_heads_{name}", spec.n_heads, meaning=f"query heads of {name}")
        count = Symbol(f"n_layers_{name}", arch.times(name), meaning=f"layers of the kind {name}")
        widths.append(count * heads * size)
    return total(widths)
