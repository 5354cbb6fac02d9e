"""First-order seconds: each operator takes the longer of its FLOPs and its bytes.

No launch, no communication, no overlap between operators; what that leaves out is in the
assumed efficiencies. Tensor parallelism divides both FLOPs and bytes.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from isoflop.arch import Arch
from isoflop.count import Precision, Workload, bytes_kv_cache
from isoflop.count.blocks import Part, describe
from isoflop.count.flops import last_logits
from isoflop.count.operators import Core, Operator
from isoflop.quantity import Basis, Expr, Node, Symbol, branch, leaf, maximum, number

#: Parts of a training pass that serving does not run.
ONLY_TRAINING = frozenset({"loss"})


@dataclass(frozen=True, slots=True)
class Rates:
    """What the operators run on: rates of one accelerator times how many share each."""

    flops_per_second: Expr
    bytes_per_second: Expr


@dataclass(frozen=True, slots=True)
class Stored:
    """How many bits the tensors take: weights, activations, cached keys and values."""

    weights: Precision
    activations: Precision
    kv_cache: Precision


def seconds_forward(arch: Arch, work: Workload, rates: Rates, stored: Stored) -> Node:
    """One forward pass over whole sequences, as in training.

    >>> from isoflop.arch import gpt
    >>> tiny = gpt("tiny", d_model=64, n_layers=2, n_heads=4, vocab_size=64, max_seq_len=8)
    >>> rates = Rates(Symbol("flops_per_second", 1e12), Symbol("bytes_per_second", 1e9))
    >>> bf16 = Stored(Precision.BF16, Precision.BF16, Precision.BF16)
    >>> seconds_forward(tiny, Workload.train(1, 8), rates, bf16).find("layer/attention/q").size.text
    'max(2 * batch * seq_len * d_model * n_heads * d_head / flops_per_second, (d_model * n_heads
    * d_head * bytes_bf16 + batch * seq_len * (d_model + n_heads * d_head) * bytes_bf16) /
    bytes_per_second)'
    """
    return _Fold(arch, work, rates, stored, caches={}).tree("seconds_forward", describe(arch, work))


def seconds_prefill(arch: Arch, work: Workload, rates: Rates, stored: Stored) -> Node:
    """The prompts of `work.batch` sequences; logits of the last position only."""
    fold = _Fold(arch, work, rates, stored, caches={})
    return fold.tree("seconds_prefill", _served(describe(arch, work), work))


def seconds_decode(arch: Arch, work: Workload, rates: Rates, stored: Stored) -> Node:
    """One token for each of `work.batch` sequences: all weights and all caches are read."""
    cache = bytes_kv_cache(arch, work, stored.kv_cache)
    fold = _Fold(arch, work, rates, stored, caches={n.name: n.size for n in cache.children})
    return fold.tree("seconds_per_token", _served(describe(arch, work), work))


def _served(root: Part, work: Workload) -> Part:
    kept = tuple(part for part in root.parts if part.name not in ONLY_TRAINING)
    return last_logits(replace(root, parts=kept), work)


@dataclass(frozen=True, slots=True)
class _Fold:
    arch: Arch
    work: Workload
    rates: Rates
    stored: Stored
    caches: dict[str, Expr]

    def tree(self, name: str, root: Part) -> Node:
        children = [self.node(p, p.name, number(1)) for p in root.parts if _works(p)]
        return branch(name, "seconds", children)

    def node(self, part: Part, kind: str, read: Expr) -> Node:
        """`read` is the share of the part's copies whose weights are touched at all."""
        if part.name == "experts":
            read = self._experts_read(part, kind)
        if part.parts:
            below = [self.node(p, kind, read) for p in part.parts if _works(p)]
            return branch(part.name, "seconds", below, times=part.times)
        assert part.operator is not None
        size = self._seconds(part.operator, kind, read)
        return leaf(part.name, "seconds", size, times=part.times, basis=Basis.MODELLED)

    def _seconds(self, operator: Operator, kind: str, read: Expr) -> Expr:
        moved = self._bytes(operator, kind, read) / self.rates.bytes_per_second
        if operator.flops == number(0):
            return moved
        return maximum(operator.flops / self.rates.flops_per_second, moved)

    def _bytes(self, operator: Operator, kind: str, read: Expr) -> Expr:
        each = self.stored.activations.bytes_each
        if isinstance(operator, Core) and kind in self.caches:
            rows = operator.batch * operator.queries * operator.heads
            return rows * (operator.d_key + operator.d_value) * each + self.caches[kind]
        weights = operator.elements_weight * self.stored.weights.bytes_each
        return weights * read + operator.elements_moved * each

    def _experts_read(self, part: Part, kind: str) -> Expr:
        """Experts that at least one token chose: 1 - (1 - k / E) ^ tokens, routing at random."""
        assert part.active is not None
        missed = (1 - float((part.active / part.times).value)) ** int(self.work.tokens.value)
        meaning = "share of the experts that some token chose, at random routing"
        return Symbol(f"share_experts_read_{kind}", 1 - missed, Basis.MODELLED, meaning=meaning)


def _works(part: Part) -> bool:
    return part.operator is not None or any(map(_works, part.parts))
