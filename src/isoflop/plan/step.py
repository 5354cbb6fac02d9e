"""Seconds of one training step of any legal setting, from its operators.

Structure branches in Python; the sizes of the layout are symbols, so that one formula serves
every layout of a structure: evaluated here, compiled to arrays by a search.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property

from isoflop.arch import Experts
from isoflop.count.blocks import Part, describe
from isoflop.count.workload import Workload
from isoflop.plan.constants import Constants, constants
from isoflop.plan.rank_work import RankWork, elements, works
from isoflop.plan.rates import Rates
from isoflop.plan.setting import Setting
from isoflop.plan.step_sizes import Sizes, Structure
from isoflop.plan.step_traffic import Traffic
from isoflop.quantity import Basis, Expr, Node, Symbol, branch, ceil_div, leaf, maximum, minimum, number, where
from isoflop.quantity.expr import product, total

#: Bytes per weight that Adam reads and writes: master weight, two moments and gradient in
#: fp32 read, the first three written, and the 16-bit weight.
BYTES_ADAM = 4 * 4 + 3 * 4 + 2
#: Collectives of a layer under tensor parallelism, forward; as many backward
#: (Korthikanti 2022, 2205.05198, section 4.2.2).
GATHERS_PER_LAYER = 4


def step_time(setting: Setting, with_constants: Constants | None = None) -> Node:
    """Seconds of one step, as a tree.

    Raises:
        InputError: the chip does not compute in the setting's precision.
        UnknownName: no such stack.
    """
    return step_tree(Structure.of(setting), Sizes.of(setting), with_constants or constants())


def step_tree(structure: Structure, sizes: Sizes, use: Constants) -> Node:
    """The formula of every layout of one structure, as a tree over `sizes`."""
    return _Step(structure, sizes, use).tree()


def overlapped(work: Expr, beside: Expr, hidden: Expr) -> Expr:
    """What `beside` adds to `work` when `hidden` of the shorter of the two runs at once."""
    return beside - hidden * minimum(work, beside)


@dataclass(frozen=True)
class _Step:
    structure: Structure
    sizes: Sizes
    use: Constants

    @cached_property
    def work(self) -> RankWork:
        s = self.structure
        return RankWork(s, self.sizes, Rates.of(s.chip, s.compute, s.stack, self.use))

    @cached_property
    def traffic(self) -> Traffic:
        return Traffic(self.structure, self.sizes, self.use)

    @cached_property
    def parts(self) -> dict[str, Part]:
        """The model's own parts by name; sizes are those of one micro-batch."""
        batch = int(self.sizes.batch.value)
        work = Workload.train(batch, self.structure.seq_len, causal_skip=True)
        return {part.name: part for part in describe(self.structure.arch, work).parts if works(part)}

    @cached_property
    def kinds(self) -> dict[str, Part]:
        return {name: part for name, part in self.parts.items() if part.is_layer}

    @cached_property
    def layers(self) -> dict[str, Node]:
        """One layer of each kind, one micro-batch, forward and backward."""
        return {name: self._layer(part) for name, part in self.kinds.items()}

    def tree(self) -> Node:
        children = [self._stage(), self._ends()]
        if "pp" in self.sizes:
            children += [self._bubble(), self._sends()]
        if self._copies != number(1):
            children.append(self._data_parallel())
        children.append(self._optimizer())
        residual = self.structure.stack.residual
        return branch("seconds_step", "seconds", children, times=residual)

    # --- one layer ------------------------------------------------------------------

    def _layer(self, part: Part) -> Node:
        forward = self.work.forward(part, "forward")
        again = self._again(part, forward)
        children = [forward, self.work.backward(part, "backward"), *again]
        children += [
            leaf(name, "seconds", size, basis=Basis.MODELLED)
            for name, size in self._exchanges(part, forward, again).items()
        ]
        busy = total(child.total for child in children)
        children.append(leaf("host", "seconds", self._waits(part, busy), basis=Basis.MODELLED))
        return branch(part.name, "seconds", children)

    def _again(self, part: Part, forward: Node) -> list[Node]:
        """What backward runs a second time: the layer, or its attention alone."""
        match self.structure.recompute:
            case "full":
                return [replace(forward, name="recompute")]
            case "selective":
                core = forward.find("attention/core")
                return [branch("recompute", "seconds", [core])]
            case _:
                return []

    def _exchanges(self, part: Part, forward: Node, again: list[Node]) -> dict[str, Expr]:
        """Traffic of one layer that its work does not hide."""
        out: dict[str, Expr] = {}
        passes = 3 if self.structure.recompute == "full" else 2
        if "tp" in self.sizes:
            out["tensor"] = passes * self._tensor()
        if "cp" in self.sizes:
            out["context"] = self._context(part, forward)
        if self._experts(part):
            out["sort"] = passes * self._sort()
            if "ep" in self.sizes:
                out["experts"] = passes * self._exchange()
        if self.structure.zero == 3 and self._copies != number(1):
            work = total([forward.total, *(n.total for n in again)])
            out["weights"] = self._gathered(part, work)
        return out

    @cached_property
    def _tokens(self) -> Expr:
        return self.sizes.batch * self._seq / self.sizes.ways("cp")

    @cached_property
    def _seq(self) -> Symbol:
        return Symbol("seq_len", self.structure.seq_len, meaning="query tokens per sequence")

    @cached_property
    def _width(self) -> Symbol:
        return Symbol("d_model", self.structure.arch.d_model, meaning="width of the residual stream")

    @cached_property
    def _between(self) -> Expr:
        """Bytes of the residual stream of one micro-batch, whole over the tensor ranks."""
        return 2 * self._tokens * self._width

    def _tensor(self) -> Expr:
        """Gathers and scatters around attention and feed-forward, one direction."""
        once = self.traffic.gather(self._between, self.sizes.tp, number(1))
        shown = GATHERS_PER_LAYER * once
        hides = self.structure.stack.overlaps_tensor
        return (1 - self.use.share_hidden_tensor) * shown if hides else shown

    def _context(self, part: Part, forward: Node) -> Expr:
        """Keys and values passed round, once forward; they and their gradients backward."""
        core = next(p.operator for p in _below(part) if p.name == "core")
        held = core.keys * core.kv_heads / self.work.kv_ways(core.kv_heads)
        moved = 2 * core.batch * held * (core.d_key + core.d_value)
        once = self.traffic.gather(moved, self.sizes.cp, self.sizes.ways("tp"))
        beside = forward.find("attention/core").total
        return 3 * overlapped(beside, once, self.use.share_hidden_data)

    def _experts(self, part: Part) -> Part | None:
        return next((p for p in _below(part) if p.name == "experts"), None)

    @cached_property
    def _routed(self) -> Expr:
        """Bytes of the tokens' copies that one rank sends to experts."""
        ways = self.sizes.ways("tp") if self.structure.sequence_parallel else number(1)
        return self._between * self._active / ways

    @cached_property
    def _active(self) -> Symbol:
        specs = [layer.feed_forward for layer in self.structure.arch.kinds.values()]
        spec = next(s for s in specs if isinstance(s, Experts))
        return Symbol("n_active", spec.n_active, meaning="experts per token")

    def _sort(self) -> Expr:
        """Copies of tokens put in the experts' order and back: each read and written."""
        return self.work.rates.move(4 * self._routed)

    def _exchange(self) -> Expr:
        """Tokens sent to their experts and back."""
        stack = self.structure.stack
        once = self.traffic.exchange(
            self._routed, self._active, self.sizes.ep, self.sizes.ways("tp"), once=stack.once_per_machine
        )
        hides = self.structure.stack.overlaps_experts
        return (1 - self.use.share_hidden_experts) * 2 * once if hides else 2 * once

    def _gathered(self, part: Part, work: Expr) -> Expr:
        """Weights gathered forward and backward, gradients scattered, each micro-batch."""
        shared = self._elements(part, experts=False) + self._elements(part, experts=True)
        once = self.traffic.gather(2 * shared, self._copies, self.sizes.ways("tp"))
        return 3 * overlapped(work, once, self.use.share_hidden_data)

    def _waits(self, part: Part, busy: Expr) -> Expr:
        stack = self.structure.stack
        if self._experts(part):
            return stack.seconds_host_experts
        return maximum(0, stack.seconds_host_layer - busy)

    # --- the stages --------------------------------------------------------------------

    @cached_property
    def _slots(self) -> Expr:
        """Layers on the fullest stage: an even share, or with both ends counted as layers."""
        n = Symbol("n_layers_in_all", self.structure.arch.n_layers, meaning="layers of all kinds")
        if "pp" not in self.sizes:
            return n
        chunks = self.sizes.ways("pp", "virtual_pp")
        fullest = ceil_div(n + 2, chunks) * self.sizes.ways("virtual_pp")
        return where(ceil_div(n, chunks) * chunks - n, fullest, n / self.sizes.pp)

    def _share(self, kind: str) -> Expr:
        """Layers of one kind on the fullest stage."""
        n = self.structure.arch.n_layers
        count = self.structure.arch.times(kind)
        return self._slots if count == n else self._slots * count / n

    def _stage(self) -> Node:
        """All micro-batches through the layers of the fullest stage."""
        kinds = [replace(node, times=self._share(name)) for name, node in self.layers.items()]
        return branch("layers", "seconds", kinds, times=self.sizes.n_micro_batches)

    @cached_property
    def _one_layer(self) -> Expr:
        """Seconds of one layer, on average over kinds."""
        n = self.structure.arch.n_layers
        return total(node.total * self.structure.arch.times(name) for name, node in self.layers.items()) / n

    def _both(self, names: tuple[str, ...]) -> Expr:
        parts = [self.parts[name] for name in names if name in self.parts]
        return total(
            node.total for p in parts for node in (self.work.forward(p, p.name), self.work.backward(p, p.name))
        )

    @cached_property
    def _first(self) -> Expr:
        return self._both(("embedding",))

    @cached_property
    def _last(self) -> Expr:
        return self._both(("final_norm", "head", "loss"))

    def _ends(self) -> Node:
        """What the embedding or the head adds to the fullest stage, one micro-batch."""
        if "pp" not in self.sizes:
            size = self._first + self._last
        else:
            most = maximum(self._first, self._last)
            chunks = self.sizes.ways("pp", "virtual_pp")
            n = self.structure.arch.n_layers
            uneven = ceil_div(n, chunks) * chunks - n
            size = where(uneven, maximum(0, most - self._one_layer), most)
        return leaf("ends", "seconds", size, times=self.sizes.n_micro_batches, basis=Basis.MODELLED)

    def _bubble(self) -> Node:
        """Idle time of 1F1B: one micro-batch through the other stages, cut by the chunks."""
        n = self.structure.arch.n_layers
        whole = n * self._one_layer + self._first + self._last
        fullest = whole / self.sizes.pp
        size = (whole - fullest) / self.sizes.ways("virtual_pp")
        source = "Narayanan 2021 (2104.04473), section 2.2"
        return leaf("bubble", "seconds", size, basis=Basis.MODELLED, source=source)

    def _sends(self) -> Node:
        """Activations and gradients handed to the next stage, per micro-batch and chunk."""
        stride = self.sizes.ways("tp", "cp", "dp")
        cut = self.sizes.ways("tp")
        once = self.traffic.send(self._between / cut, stride)
        shown = 1 - self.use.share_hidden_data if self.structure.stack.overlaps_data else number(1)
        size = 2 * self.sizes.ways("virtual_pp") * once * shown
        return leaf("sends", "seconds", size, times=self.sizes.n_micro_batches, basis=Basis.MODELLED)

    # --- once per step ------------------------------------------------------------------

    @cached_property
    def _copies(self) -> Expr:
        """Ranks that hold the same weights, experts apart."""
        return self.sizes.ways("dp", "cp")

    def _elements(self, part: Part, *, experts: bool) -> Expr:
        return elements(part, self.work, experts=experts)

    def _held(self, *, experts: bool) -> Expr:
        """Weights of the fullest stage on one rank."""
        kinds = [self._share(n) * self._elements(p, experts=experts) for n, p in self.kinds.items()]
        if experts:
            return total(kinds)
        ends = [self._elements(p, experts=False) for n, p in self.parts.items() if n in ("embedding", "head")]
        return total([*kinds, maximum(*ends) if "pp" in self.sizes else total(ends)])

    def _data_parallel(self) -> Node:
        """Gradients reduced and weights gathered that one micro-batch's work does not hide."""
        if self.structure.zero == 3:
            ends = [self._elements(self.parts[n], experts=False) for n in ("embedding", "head")]
            size = 3 * self.traffic.gather(2 * total(ends), self._copies, self.sizes.ways("tp"))
            return leaf("data_parallel", "seconds", (1 - self.use.share_hidden_data) * size,
                        times=self.sizes.n_micro_batches, basis=Basis.MODELLED)  # fmt: skip
        moved = self._reduced(self._held(experts=False), self._copies, self.sizes.ways("tp"))
        if any(self._experts(p) for p in self.kinds.values()):
            held = self._held(experts=True)
            among = self._copies / self.sizes.ways("ep")
            moved = moved + self._reduced(held, among, self.sizes.ways("tp", "ep"))
        if self.structure.stack.overlaps_data:
            window = self._slots * self._one_layer
            moved = overlapped(window, moved, self.use.share_hidden_data)
        return leaf("data_parallel", "seconds", moved, basis=Basis.MODELLED)

    def _reduced(self, held: Expr, ranks: Expr, stride: Expr) -> Expr:
        grads = self.traffic.gather(self.structure.stack.bytes_grad * held, ranks, stride)
        if self.structure.zero == 0:
            return 2 * grads
        return grads + self.traffic.gather(2 * held, ranks, stride)

    def _optimizer(self) -> Node:
        shared, dealt = self._held(experts=False), self._held(experts=True)
        if self.structure.zero:
            shared = shared / self._copies
            dealt = dealt * self.sizes.ways("ep") / self._copies
        size = self.work.rates.move(BYTES_ADAM * (shared + dealt))
        return leaf("optimizer", "seconds", size, basis=Basis.MODELLED)


def _below(part: Part) -> list[Part]:
    return [part, *(q for p in part.parts for q in _below(p))]
