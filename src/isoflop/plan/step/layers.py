"""Seconds of one micro-batch through each kind of layer and through a model's two ends."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property

from isoflop.count.blocks import Part, describe
from isoflop.count.workload import Workload
from isoflop.plan.step.rank_work import Passes, RankWork, works
from isoflop.plan.step.setting import Setting
from isoflop.quantity import Basis, Expr, Node, branch, leaf, maximum, total

#: What the two ends of a model run beside its layers.
FIRST, LAST = ("embedding",), ("final_norm", "head", "loss")


@dataclass(frozen=True)
class Layers:
    """One rank's share of a model's parts, timed; no schedule changes it."""

    work: RankWork

    @property
    def setting(self) -> Setting:
        return self.work.setting

    @cached_property
    def parts(self) -> dict[str, Part]:
        """The model's own parts by name; sizes are those of one micro-batch."""
        s = self.setting
        job = Workload.train(s.layout.micro_batch, s.seq_len, causal_skip=True)
        return {part.name: part for part in describe(s.arch, job).parts if works(part)}

    @cached_property
    def kinds(self) -> dict[str, Part]:
        return {name: part for name, part in self.parts.items() if part.is_layer}

    @property
    def n_dealt(self) -> int:
        """Layers that have experts."""
        times = self.setting.arch.times
        return sum(times(k) for k, part in self.kinds.items() if self.work.has_experts(part))

    @cached_property
    def trees(self) -> dict[str, Node]:
        """The work of one layer of each kind on one micro-batch."""
        return {name: self._layer(part) for name, part in self.kinds.items()}

    @cached_property
    def passes(self) -> dict[str, Passes]:
        """The same by direction; what is made again and waits for the host goes backward."""
        return {name: self._by_direction(name, tree) for name, tree in self.trees.items()}

    def _by_direction(self, name: str, tree: Node) -> Passes:
        forward = tree.find("forward").total
        put_off = self.work.weight_gradients(self.kinds[name], name).total
        return Passes(forward, tree.total - forward, put_off)

    def _layer(self, part: Part) -> Node:
        stack, forward = self.work.stack, self.work.forward(part, "forward")
        children = [forward, self.work.backward(part, "backward")]
        match self.setting.recompute:
            case "full":
                again = self.work.again(part) if stack.recompute_stops_early else forward
                children.append(replace(again, name="recompute"))
            case "selective":
                children.append(branch("recompute", "seconds", self.work.selected(forward)))
            case "none":
                pass
        busy = total(child.total for child in children)
        children.append(leaf("host", "seconds", self._waits(part, busy), basis=Basis.MODELLED))
        return branch(part.name, "seconds", children)

    def _waits(self, part: Part, busy: Expr) -> Expr:
        """The accelerator waits where its host is slower to issue a layer than it to run it."""
        stack = self.work.stack
        dealt = self.work.has_experts(part) and not stack.experts_padded
        host = stack.seconds_host_experts if dealt else stack.seconds_host_layer
        return maximum(0, host - busy)

    @cached_property
    def average(self) -> Expr:
        """Seconds of a layer's work, on average over kinds."""
        arch = self.setting.arch
        return total(t.total * arch.times(name) for name, t in self.trees.items()) / arch.n_layers

    @cached_property
    def first(self) -> Passes:
        return self._end(FIRST)

    @cached_property
    def last(self) -> Passes:
        return self._end(LAST)

    def _end(self, names: tuple[str, ...]) -> Passes:
        work, parts = self.work, [self.parts[name] for name in names if name in self.parts]
        return Passes(
            total(work.forward(part, part.name).total for part in parts),
            total(work.backward(part, part.name).total for part in parts),
            total(work.weight_gradients(part, part.name).total for part in parts),
        )
