"""Seconds of one rank's operators by the path of the description: forward, backward, and the
part of backward that makes the weights' gradients, which zero-bubble schedules put off.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from fractions import Fraction
from typing import Literal, TypeAlias, get_args

from isoflop.count.blocks import Part, Weight
from isoflop.count.memory_split import SPLIT
from isoflop.count.operators import Core, Gather, Loss, Matmul, Operator, Pointwise
from isoflop.hardware.stack import Stack
from isoflop.plan.step.rates import ALIGNED, FLASH_BACKWARD, HEAD_RAMP, KEYS_RAMP, Rates
from isoflop.plan.step.setting import Setting
from isoflop.plan.step.sizes import Sizes
from isoflop.quantity import Basis, Expr, Node, branch, leaf, minimum, number
from isoflop.quantity.expr import product, total

#: Bytes moved backward over those forward, by kind of kernel: a norm reads its input again
#: beside the gradient, a gate reads both factors; the gradient of a sum is its own copy.
BACKWARD_MOVES = {"add": Fraction(1), "rotary": Fraction(1)}
BACKWARD_MOVES_ELSE = Fraction(3, 2)


#: `weights` is the part of backward that makes the weights' gradients.
Direction: TypeAlias = Literal["forward", "backward", "weights"]
DIRECTIONS: tuple[Direction, ...] = get_args(Direction)


@dataclass(frozen=True, slots=True)
class Passes:
    """Seconds of a piece of work in each direction; `weights` is part of `backward`.

    Only products with weights, and the table that tokens are looked up in, can put anything
    off: kernels of norms make the gradients of weights beside those of inputs.
    """

    forward: Expr
    backward: Expr
    weights: Expr = field(default_factory=lambda: number(0))

    @property
    def both(self) -> Expr:
        return self.forward + self.backward

    def of(self, direction: Direction) -> Expr:
        seconds: Expr = getattr(self, direction)
        return seconds


@dataclass(frozen=True, slots=True)
class RankWork:
    """One rank's share of a description, timed operator by operator."""

    setting: Setting
    stack: Stack
    sizes: Sizes
    rates: Rates

    # --- trees ---------------------------------------------------------------------

    def forward(self, part: Part, name: str) -> Node:
        return self._node(replace(part, name=name), None, "forward", experts=False)

    def backward(self, part: Part, name: str) -> Node:
        return self._node(replace(part, name=name), None, "backward", experts=False)

    def weight_gradients(self, part: Part, name: str) -> Node:
        """What of `backward` no other rank waits for; the rest makes the inputs' gradients."""
        return self._node(replace(part, name=name), None, "weights", experts=False)

    def again(self, part: Part) -> Node:
        """A layer's forward pass up to what its last product reads: all that backward needs."""
        whole, kept = self.forward(part, "recompute"), []
        for child in whole.children:
            if child.name == "feed_forward":
                kept.append(branch(child.name, "seconds", _before(child.children, "down")))
                break
            kept.append(child)
        return branch(whole.name, "seconds", kept)

    def selected(self, forward: Node) -> list[Node]:
        """What selective recomputation runs again: what `count.memory_saved` then does not keep.

        Attention where its scores would stand in memory (Korthikanti 2022, 2205.05198,
        section 5), else activation functions.
        """
        return _only(
            forward.children, "core" if self.stack.attention == "unfused" else "activation"
        )

    def _node(self, part: Part, fused: Expr | None, direction: Direction, *, experts: bool) -> Node:
        if part.parts:
            inside = experts or part.name == "experts"
            children = [
                self._node(p, shared, direction, experts=inside)
                for p, shared in _fused(part.parts)
                if works(p)
            ]
            if direction != "weights" and any(p.name == "experts" for p in part.parts):
                children.append(self._sorting(part))
            return branch(part.name, "seconds", children, times=self._copies(part))
        assert part.operator is not None
        passes = self.passes(part, fused_input=fused is not None, experts=experts)
        size = passes.of(direction)
        return leaf(part.name, "seconds", size, times=part.times, basis=Basis.MODELLED)

    def _sorting(self, part: Part) -> Node:
        """Tokens put in their experts' order and back: each copy read and written twice."""
        experts = next(p for p in part.parts if p.name == "experts")
        first = next(p.operator for p in experts.parts if isinstance(p.operator, Matmul))
        moved = experts.times * first.rows * first.inner / (self.sizes.ways("cp") * self._between())
        size = self.rates.move(2 * 4 * moved) * self.stack.share_sorting
        return leaf("sorting", "seconds", size, basis=Basis.MODELLED)

    def _copies(self, part: Part) -> Expr:
        """Experts are dealt out; a layer's own count belongs to the pipeline."""
        if part.is_layer:
            return number(1)
        if part.name == "experts" and "ep" in self.sizes:
            return part.times / self.sizes.ep
        return part.times

    # --- one operator -----------------------------------------------------------------

    def passes(self, part: Part, *, fused_input: bool, experts: bool) -> Passes:
        operator = self._local(part, experts=experts)
        match operator:
            case Matmul():
                low = self.rates.casts and part.name not in ("head", "logits", "router")
                return self._product(operator, fused_input, low=low)
            case Core():
                return self._attention(operator)
            case Pointwise():
                share = self.stack.share_elementwise
                once = self.rates.move(2 * operator.elements_moved) * share
                more = BACKWARD_MOVES.get(operator.kind, BACKWARD_MOVES_ELSE)
                return Passes(once, more * once)
            case Gather():
                once = self.rates.move(4 * operator.elements_moved)
                return Passes(once, once, once)
            case Loss():
                # Logits are cast to fp32, reduced, and their gradient cast back.
                once = self.rates.move(4 * operator.elements_moved)
                return Passes(once, 2 * once)

    def _product(self, op: Matmul, fused_input: bool, *, low: bool) -> Passes:
        """A weight's three products: output, gradient of the input, gradient of the weight.

        Matrices that read one input are one kernel, so that it is read and cast once. Backward
        is two kernels; the gradient that comes in is cast before the first, the input's.
        """
        rates = self.rates
        each = rates.bytes_operand if low else number(2)
        rate = rates.layer if low else rates.full
        first = 0 if fused_input else 1
        into = first * op.rows * op.inner
        out, weight = op.rows * op.cols, op.inner * op.cols
        forward = rates.product(op.flops, first * op.inner, (into + weight) * each + 2 * out, rate)
        moved = (2 * out + weight + into) * each + 2 * into
        grads = 2 * self.stack.bytes_grad * weight
        depth = op.cols + first * op.rows
        backward = rates.product(2 * op.flops, depth, moved + grads, rate)
        put_off = rates.product(op.flops, first * op.rows, (into + out) * each + grads, rate)
        if not low:
            return Passes(forward, backward, put_off)
        cast = 2 + 2 * each  # read in 16 bits, written by rows and by columns
        return Passes(forward + rates.move(into * cast), backward + rates.move(out * cast), put_off)

    def _attention(self, op: Core) -> Passes:
        if self.stack.attention == "unfused":
            return self._scores(op)
        ramp = (
            (1 + KEYS_RAMP / (2 * op.seen))
            * (1 + HEAD_RAMP / op.d_key)
            / (1 + Fraction(HEAD_RAMP, 128))
        )
        forward = op.flops / self.rates.attention * ramp
        return Passes(forward, FLASH_BACKWARD * forward)

    def _scores(self, op: Core) -> Passes:
        """Every score written and read: two products, a softmax, a dropout.

        Softmax reads and writes 2 bytes per score, dropout the same and a mask of 1; back,
        each also reads what it kept (Korthikanti 2022, 2205.05198, section 4).
        """
        scores = op.batch * op.heads * op.queries * op.keys
        sides = op.batch * op.heads * (op.queries + op.keys) * op.d_key
        dropped = 5 if self.stack.dropout else 0
        flops = 2 * scores * op.d_key
        even = int(op.d_key.value) % ALIGNED == 0
        rate = self.rates.full if even else self.rates.unaligned
        one = self.rates.product(flops, number(0), 2 * scores + 2 * sides, rate)
        forward = 2 * one + self.rates.move((4 + dropped) * scores)
        return Passes(forward, 4 * one + self.rates.move((6 + dropped) * scores))

    # --- what else a part has -----------------------------------------------------------

    def has_experts(self, part: Part) -> bool:
        return part.name == "experts" or any(map(self.has_experts, part.parts))

    def weights(self, part: Part, *, experts: bool, dealt: bool = False) -> Expr:
        """Weights of one copy of a part on one rank: of its experts, or of all else."""
        dealt = dealt or part.name == "experts"
        own = total(
            product(size for _, size in weight.axes) / self._pieces(weight)
            for weight in part.weights
            if dealt == experts
        )
        below = [
            self._copies(p) * self.weights(p, experts=experts, dealt=dealt) for p in part.parts
        ]
        return total([own, *below])

    def _pieces(self, weight: Weight) -> Expr:
        cut = next((name for name, _ in weight.axes if name in SPLIT), None)
        if cut is None or "tp" not in self.sizes:
            return number(1)
        return self.kv_ways(None) if cut == "kv_heads" else self.sizes.tp

    # --- one rank's share ------------------------------------------------------------

    def _local(self, part: Part, *, experts: bool) -> Operator:
        """The operator on the part of its sizes that one rank works on."""
        op, sizes = part.operator, self.sizes
        cp, tp = sizes.ways("cp"), sizes.ways("tp")
        rows_more = sizes.ways("ep") if experts else number(1)
        match op:
            case Matmul():
                inner, cols = self._cut(part)
                rows = op.rows * rows_more / cp
                if part.name == "router":
                    rows = rows / self._between()
                return replace(op, rows=rows, inner=op.inner / inner, cols=op.cols / cols)
            case Core():
                return replace(
                    op,
                    heads=op.heads / tp,
                    kv_heads=op.kv_heads / self.kv_ways(op.kv_heads),
                    queries=op.queries / cp,
                )
            case Pointwise():
                inside = part.name == "rotary" or (part.saved and part.saved[0].axis in SPLIT)
                ways = cp * (tp if inside else self._between())
                return replace(
                    op, reads=op.reads * rows_more / ways, writes=op.writes * rows_more / ways
                )
            case Gather():
                return replace(op, rows=op.rows / cp)
            case Loss():
                return replace(op, rows=op.rows / cp, classes=op.classes / tp)
        raise AssertionError(part.name)

    def _cut(self, part: Part) -> tuple[Expr, Expr]:
        """Ways that a matrix's two axes are split: the first axis of sub-units is."""
        one = number(1)
        if "tp" not in self.sizes:
            return one, one
        if part.name in ("head", "logits"):
            return one, self.sizes.tp
        axes = [name for name, _ in part.weights[0].axes]
        ways = [self.sizes.tp if n != "kv_heads" else self.kv_ways(None) for n in axes]
        if axes[0] in SPLIT:
            return ways[0], one
        if axes[1] in SPLIT:
            return one, ways[1]
        return one, one

    def kv_ways(self, heads: Expr | None) -> Expr:
        """Key-value heads split as far as there are any."""
        if "tp" not in self.sizes:
            return number(1)
        fewest = min(_kv_heads(layer.attention) for layer in self.setting.arch.kinds.values())
        return minimum(self.sizes.tp, fewest if heads is None else heads)

    def _between(self) -> Expr:
        """Ways that what lies between the sharded matrices is split."""
        return self.sizes.ways("tp") if self.setting.layout.sequence_parallel else number(1)


def _kv_heads(attention: object) -> int:
    heads = getattr(attention, "n_kv_heads", None)
    return int(heads if heads is not None else attention.n_heads)  # type: ignore[attr-defined]


def _before(nodes: Sequence[Node], name: str) -> list[Node]:
    """The nodes before the one of that name; all where there is none."""
    names = [node.name for node in nodes]
    return list(nodes[: names.index(name)] if name in names else nodes)


def works(part: Part) -> bool:
    """Whether a part runs anything."""
    return part.operator is not None or any(map(works, part.parts))


def _fused(parts: tuple[Part, ...]) -> Iterator[tuple[Part, Expr | None]]:
    """Each part, with the input that it shares with a matrix before it."""
    seen: list[tuple[Expr, Expr]] = []
    for part in parts:
        op = part.operator
        if not isinstance(op, Matmul):
            yield part, None
            continue
        key = (op.rows, op.inner)
        column = bool(part.weights) and part.weights[0].axes[0][0] == "model"
        yield part, op.inner if column and key in seen else None
        if column:
            seen.append(key)


def _only(nodes: Iterable[Node], name: str) -> list[Node]:
    """The nodes of this name, inside those that hold them."""
    kept = []
    for node in nodes:
        below = _only(node.children, name)
        if node.name == name:
            kept.append(node)
        elif below:
            kept.append(branch(node.name, node.unit, below, times=node.times))
    return kept
