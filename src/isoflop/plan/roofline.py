"""First-order seconds: each operator takes the longer of its FLOPs and its bytes.

No overlap between operators; what that leaves out is in the assumed efficiencies. A step of
decoding waits for launches and messages besides, a prompt and training do not. Tensor parallelism divides FLOPs and bytes, but for the parts of a
cache that several accelerators must hold.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import TypeAlias

from isoflop.arch import Arch
from isoflop.count import Precision, Workload, bytes_kv_cache
from isoflop.count.blocks import Part, describe
from isoflop.count.flops import last_logits
from isoflop.count.memory_weights import ENDS, Format, format_of
from isoflop.count.operators import Core, Matmul, Operator
from isoflop.quantity import Basis, Expr, Node, Symbol, branch, leaf, maximum, number

#: Parts of a training pass that serving does not run.
ONLY_TRAINING = frozenset({"loss"})


@dataclass(frozen=True, slots=True)
class Rates:
    """What the operators run on: rates of one accelerator times how many share each."""

    flops_per_second: Expr
    bytes_per_second: Expr

    def seconds(self, flops: Expr, moved: Expr) -> Expr:
        """The longer of an operator's FLOPs and its bytes."""
        reading = moved / self.bytes_per_second
        return reading if flops == number(0) else maximum(flops / self.flops_per_second, reading)


@dataclass(frozen=True, slots=True)
class Waits:
    """What a step of decoding waits for: a layer's launches, and its messages where it is split.

    The host launches beside the accelerator's work, so a layer takes the longer of the two. A
    message waits for that work and is waited for, so it comes on top: one after attention and
    one after the feed-forward (Shoeybi 2019, 1909.08053, section 3).
    """

    seconds_layer: Expr
    seconds_all_reduce: Expr | None = None

    def nodes(self, arch: Arch, working: Expr) -> list[Node]:
        """The time beyond that of the operators."""
        layers = Symbol("n_layers", arch.n_layers, meaning="decoder layers")
        waited = maximum(layers * self.seconds_layer, working) - working
        found = [leaf("launches", "seconds", waited, basis=Basis.MODELLED)]
        if self.seconds_all_reduce is not None:
            each = 2 * self.seconds_all_reduce
            found.append(leaf("messages", "seconds", each, times=layers, basis=Basis.MODELLED))
        return found


#: What a fold takes of an operator's FLOPs and of the bytes it moves.
Measure: TypeAlias = Callable[[Expr, Expr], Expr]


@dataclass(frozen=True, slots=True)
class Stored:
    """How tensors are stored: weights (with the scales of their format), activations, cache."""

    weights: Precision | Format
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
    fold = _Fold(work, stored, rates.seconds)
    return fold.tree("seconds_forward", "seconds", describe(arch, work))


def seconds_prefill(arch: Arch, work: Workload, rates: Rates, stored: Stored) -> Node:
    """The prompts of `work.batch` sequences; logits of the last position only."""
    fold = _Fold(work, stored, rates.seconds)
    return fold.tree("seconds_prefill", "seconds", _served(arch, work))


def seconds_decode(
    arch: Arch,
    work: Workload,
    rates: Rates,
    stored: Stored,
    copies: Mapping[str, Expr] | None = None,
    waits: Waits | None = None,
) -> Node:
    """One token for each of `work.batch` sequences: all weights and all caches are read.

    `waits` adds what the roofline does not know; None leaves it out. `copies` says for a kind of layer how many of the accelerators that `rates` joins hold,
    and read, the same part of the cache; 1 where nothing is said.
    """
    caches, copies = _caches(arch, work, stored), copies or {}
    read = {kind: copies.get(kind, number(1)) * size for kind, size in caches.items()}
    fold = _Fold(work, stored, rates.seconds, read)
    tree = fold.tree("seconds_per_token", "seconds", _served(arch, work))
    more = [] if waits is None else waits.nodes(arch, tree.total)
    return branch(tree.name, tree.unit, [*tree.children, *more])


def bytes_decode(arch: Arch, work: Workload, stored: Stored) -> Node:
    """Bytes that one step of decoding moves: weights, caches and what lies between.

    >>> from isoflop.arch import gpt
    >>> tiny = gpt("tiny", d_model=64, n_layers=2, n_heads=4, vocab_size=64, max_seq_len=8)
    >>> moved = bytes_decode(tiny, Workload.decode(1, 8), Stored(*3 * (Precision.BF16,)))
    >>> moved.find("layer/attention/core").value  # queries, output; 8 keys and values
    2304
    """
    fold = _Fold(work, stored, lambda _, moved: moved, _caches(arch, work, stored))
    return fold.tree("bytes_decode", "bytes", _served(arch, work))


def _caches(arch: Arch, work: Workload, stored: Stored) -> dict[str, Expr]:
    return {n.name: n.size for n in bytes_kv_cache(arch, work, stored.kv_cache).children}


def _served(arch: Arch, work: Workload) -> Part:
    root = describe(arch, work)
    kept = tuple(part for part in root.parts if part.name not in ONLY_TRAINING)
    return last_logits(replace(root, parts=kept), work)


@dataclass(frozen=True, slots=True)
class _Fold:
    work: Workload
    stored: Stored
    measure: Measure
    caches: dict[str, Expr] = field(default_factory=dict)

    def tree(self, name: str, unit: str, root: Part) -> Node:
        children = [self.node(p, p.name, unit, number(1)) for p in root.parts if _works(p)]
        return branch(name, unit, children)

    def node(self, part: Part, kind: str, unit: str, read: Expr) -> Node:
        """`read` is the share of the part's copies whose weights are touched at all."""
        if part.name == "experts":
            read = self._experts_read(part, kind)
        if part.parts:
            below = [self.node(p, kind, unit, read) for p in part.parts if _works(p)]
            return branch(part.name, unit, below, times=part.times)
        assert part.operator is not None
        size = self.measure(part.operator.flops, self._bytes(part.operator, kind, read))
        return leaf(part.name, unit, size, times=part.times, basis=Basis.MODELLED)

    def _bytes(self, operator: Operator, kind: str, read: Expr) -> Expr:
        each = self.stored.activations.bytes_each
        if isinstance(operator, Core) and kind in self.caches:
            rows = operator.batch * operator.queries * operator.heads
            return rows * (operator.d_key + operator.d_value) * each + self.caches[kind]
        if operator.elements_weight == number(0):
            return operator.elements_moved * each
        quantised = isinstance(operator, Matmul) and kind not in ENDS
        how = format_of(self.stored.weights)
        weights = how.bytes_held(operator.elements_weight, quantised=quantised)
        return weights * read + operator.elements_moved * each

    def _experts_read(self, part: Part, kind: str) -> Expr:
        """Experts that at least one token chose: 1 - (1 - k / E) ^ tokens, routing at random."""
        assert part.active is not None
        missed = (1 - float((part.active / part.times).value)) ** int(self.work.tokens.value)
        meaning = "share of the experts that some token chose, at random routing"
        return Symbol(f"share_experts_read_{kind}", 1 - missed, Basis.MODELLED, meaning=meaning)


def _works(part: Part) -> bool:
    return part.operator is not None or any(map(_works, part.parts))
