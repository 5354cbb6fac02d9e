"""Seconds of one training step of any setting, from its operators and its messages.

Structure (which parallelism there is, ZeRO, recomputation, the stack) branches in Python; the
sizes of the layout are symbols, so that one formula serves every layout of a structure: it is
evaluated here and compiled to arrays by a search.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property

from isoflop.count.blocks import Part, describe
from isoflop.count.stages import layers_fullest, layers_of_ends
from isoflop.count.workload import Workload
from isoflop.hardware.fabric import Fabric, fabric_of
from isoflop.hardware.fitted import Beliefs
from isoflop.hardware.stack import Stack, find_stack
from isoflop.plan.network.exchange import Exchange
from isoflop.plan.network.group import Dimension, Group, Ways, groups
from isoflop.plan.step.constants import Constants, constants
from isoflop.plan.step.message import Message, messages
from isoflop.plan.step.rank_work import Passes, RankWork, works
from isoflop.plan.step.rates import Rates
from isoflop.plan.step.setting import Setting
from isoflop.plan.step.sizes import Sizes
from isoflop.quantity import (
    Basis,
    Expr,
    Node,
    branch,
    leaf,
    maximum,
    minimum,
    number,
    total,
    where,
)

#: Bytes per weight that Adam reads and writes: master weight, two moments and gradient in
#: fp32 read, the first three written, and the 16-bit weight.
BYTES_ADAM = 4 * 4 + 3 * 4 + 2
#: What the two ends of a model run beside its layers.
FIRST, LAST = ("embedding",), ("final_norm", "head", "loss")
#: What a message's path begins with, and what the tree calls it.
TRAFFIC = {"tp": "tensor", "cp": "context", "ep": "experts"}


def step_time(setting: Setting, beliefs: Beliefs | None = None) -> Node:
    """Seconds of one step, as a tree, with its 90 % range.

    `beliefs` brings other uncertain numbers than those of the setting.

    Raises:
        InputError: the chip does not compute in the setting's precision, or a group spans
            machines whose network is not stated.
        UnknownName: no such stack.

    >>> from isoflop.arch import gpt
    >>> from isoflop.hardware import parse_cluster
    >>> from isoflop.plan.layout import Layout
    >>> small = gpt("gpt2", d_model=768, n_layers=12, n_heads=12, vocab_size=50257, max_seq_len=1024)
    >>> step = Setting(small, parse_cluster("8xa100-sxm-80gb"), Layout(dp=8, micro_batch=8), 1024, 512)
    >>> [child.name for child in step_time(step).children]
    ['layers', 'ends', 'data', 'optimizer']
    """
    return _Step(setting, setting.beliefs if beliefs is None else beliefs).tree()


@dataclass(frozen=True, slots=True)
class Pieces:
    """What a step is made of, for an event-by-event simulation of its pipeline.

    layers: one layer of each kind, with its host's waiting; first, last: what the two ends of
    the model add; traffic: that of one micro-batch and layer which its work does not hide;
    send: from one chunk to the next; once: data parallelism and the optimizer. All without
    the `error` by which the whole step is multiplied.
    """

    layers: Mapping[str, Passes]
    first: Passes
    last: Passes
    traffic: Expr
    send: Expr
    once: Expr
    error: Expr


def step_pieces(setting: Setting, beliefs: Beliefs | None = None) -> Pieces:
    """The pieces of `step_time`'s tree."""
    return _Step(setting, setting.beliefs if beliefs is None else beliefs).pieces()


def shown(work: Expr, beside: Expr, share: Expr) -> Expr:
    """What `beside` adds to `work` where all but `share` of the shorter of the two is hidden."""
    return beside - (1 - share) * minimum(work, beside)


@dataclass(frozen=True)
class _Step:
    setting: Setting
    beliefs: Beliefs

    # --- what it stands on ------------------------------------------------------------

    @cached_property
    def stack(self) -> Stack:
        return find_stack(self.setting.stack, self.beliefs)

    @cached_property
    def use(self) -> Constants:
        return constants(self.beliefs)

    @cached_property
    def sizes(self) -> Sizes:
        return Sizes.of(self.setting)

    @cached_property
    def work(self) -> RankWork:
        s = self.setting
        rates = Rates.of(s.cluster.chip, s.compute, self.stack, self.beliefs)
        return RankWork(s, self.stack, self.sizes, rates)

    @cached_property
    def fabric(self) -> Fabric:
        """The cluster's, at the rates that collectives reach beside other kernels."""
        alone = fabric_of(self.setting.cluster)
        return replace(
            alone,
            efficiency_link=alone.efficiency_link * self.use.share_link,
            efficiency_in_switch=alone.efficiency_in_switch * self.use.share_link,
            efficiency_network=alone.efficiency_network * self.use.share_network,
        )

    @cached_property
    def around(self) -> dict[Dimension, Group]:
        layout = self.setting.layout
        return groups(Ways.of(layout), self.fabric, layout.n_accelerators)

    @cached_property
    def messages(self) -> list[Message]:
        exchange = Exchange(
            bytes_grad=self.stack.bytes_grad,
            once_per_domain=self.stack.once_per_domain,
            imbalance=self.stack.expert_imbalance,
        )
        return [m for m in messages(self.setting, exchange) if self._heard(m)]

    def _heard(self, message: Message) -> bool:
        return self.around[message.dimension].size.value != 1

    @cached_property
    def parts(self) -> dict[str, Part]:
        """The model's own parts by name; sizes are those of one micro-batch."""
        s = self.setting
        job = Workload.train(s.layout.micro_batch, s.seq_len, causal_skip=True)
        return {part.name: part for part in describe(s.arch, job).parts if works(part)}

    @cached_property
    def kinds(self) -> dict[str, Part]:
        return {name: part for name, part in self.parts.items() if part.is_layer}

    # --- the tree -----------------------------------------------------------------------

    def tree(self) -> Node:
        children = [self._stage(), self._ends(), *self._within()]
        if "pp" in self.sizes:
            children += [self._bubble(), self._sends()]
        children += [*self._data(), self._optimizer()]
        return branch("seconds_step", "seconds", children, times=self._error)

    @cached_property
    def _error(self) -> Expr:
        """Measured over predicted seconds: of the stack, and of the model."""
        sparse = any(map(self.work.has_experts, self.kinds.values()))
        error = self.use.error_of_experts if sparse else self.use.error_of_model
        return self.stack.slowed * self.stack.residual * error

    def pieces(self) -> Pieces:
        layers = {
            name: (node.find("forward").total, node.total) for name, node in self.layers.items()
        }
        n_micro, per_stage = self.sizes.n_micro_batches, self.setting.arch.n_layers / self.sizes.pp
        hops = 2 * n_micro * self.sizes.virtual_pp
        return Pieces(
            layers={
                name: Passes(f, whole - f, self.put_off[name])
                for name, (f, whole) in layers.items()
            },
            first=self._passes(*FIRST),
            last=self._passes(*LAST),
            traffic=total(node.total for node in self._within()) / (n_micro * per_stage),
            send=self._sends().total / hops if "pp" in self.sizes else number(0),
            once=total(node.total for node in [*self._data(), self._optimizer()]),
            error=self._error,
        )

    def _stage(self) -> Node:
        """All micro-batches through the layers of the fullest stage."""
        kinds = [replace(node, times=self._share(name)) for name, node in self.layers.items()]
        return branch("layers", "seconds", kinds, times=self.sizes.n_micro_batches)

    @cached_property
    def layers(self) -> dict[str, Node]:
        """The work of one layer of each kind on one micro-batch."""
        return {name: self._layer(part) for name, part in self.kinds.items()}

    @cached_property
    def put_off(self) -> dict[str, Expr]:
        """Seconds of each kind's weights' gradients, part of its layer's backward."""
        return {
            name: self.work.weight_gradients(part, name).total for name, part in self.kinds.items()
        }

    def _layer(self, part: Part) -> Node:
        forward = self.work.forward(part, "forward")
        children = [forward, self.work.backward(part, "backward")]
        match self.setting.recompute:
            case "full":
                again = self.work.again(part) if self.stack.recompute_stops_early else forward
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
        stack = self.stack
        dealt = self.work.has_experts(part) and not stack.experts_padded
        host = stack.seconds_host_experts if dealt else stack.seconds_host_layer
        return maximum(0, host - busy)

    # --- stages ---------------------------------------------------------------------------

    @cached_property
    def _slots(self) -> Expr:
        """Layers on the fullest stage."""
        n = self.setting.arch.n_layers
        return layers_fullest(n, self.sizes.pp) if "pp" in self.sizes else number(n)

    def _share(self, kind: str) -> Expr:
        """Layers of one kind on the fullest stage.

        Where only some layers have experts, that is a stage without the others: all stages
        wait for the slowest.
        """
        arch = self.setting.arch
        count, slots = arch.times(kind), self._slots
        if count == arch.n_layers:
            return slots
        dealt = sum(arch.times(k) for k, p in self.kinds.items() if self.work.has_experts(p))
        if "pp" not in self.sizes or dealt in (0, arch.n_layers):
            return slots * count / arch.n_layers
        slow = minimum(slots, dealt)
        if self.work.has_experts(self.kinds[kind]):
            return slow * count / dealt
        return (slots - slow) * count / (arch.n_layers - dealt)

    @cached_property
    def _one_layer(self) -> Expr:
        """Seconds of a layer's work, on average over kinds."""
        arch = self.setting.arch
        all_kinds = total(node.total * arch.times(name) for name, node in self.layers.items())
        return all_kinds / arch.n_layers

    def _passes(self, *names: str) -> Passes:
        parts = [self.parts[name] for name in names if name in self.parts]
        return Passes(
            total(self.work.forward(part, part.name).total for part in parts),
            total(self.work.backward(part, part.name).total for part in parts),
            total(self.work.weight_gradients(part, part.name).total for part in parts),
        )

    @cached_property
    def _first(self) -> Expr:
        return self._passes(*FIRST).both

    @cached_property
    def _last(self) -> Expr:
        return self._passes(*LAST).both

    def _ends(self) -> Node:
        """What the embedding or the head adds to the fullest stage, one micro-batch."""
        size = self._first + self._last
        if "pp" in self.sizes:
            held = layers_of_ends(
                self.setting.arch.n_layers, self.sizes.pp, self.sizes.ways("virtual_pp")
            )
            spare = [(self._slots - own) * self._one_layer for own in held]
            most = maximum(0, self._first - spare[0], self._last - spare[1])
            size = where(self.sizes.pp - 1, most, size)
        return self._leaf("ends", size, self.sizes.n_micro_batches)

    def _bubble(self) -> Node:
        """Idle time of 1F1B: one micro-batch through the other stages, cut by the chunks."""
        n, pp = self.setting.arch.n_layers, self.sizes.pp
        busy = total(node.total for node in self._within()) / self.sizes.n_micro_batches
        elsewhere = (pp - 1) / pp * (n * self._one_layer + self._first + self._last)
        size = (elsewhere + (pp - 1) * busy) / self.sizes.ways("virtual_pp")
        source = "Narayanan 2021 (2104.04473), section 2.2"
        return leaf("bubble", "seconds", size, basis=Basis.MODELLED, source=source)

    # --- messages ---------------------------------------------------------------------------

    def _seconds(self, chosen: Iterable[Message]) -> Expr:
        """Seconds of messages one after the other."""
        return total(m.times * m.seconds(self.around, self.fabric) for m in chosen)

    def _within(self) -> list[Node]:
        """Traffic of each micro-batch that its work does not hide."""
        found = []
        for prefix, name in TRAFFIC.items():
            chosen = [m for m in self.messages if m.path.startswith(f"{prefix}/")]
            if chosen:
                found.append(self._leaf(name, self._shown(prefix, chosen)))
        return found

    def _shown(self, prefix: str, chosen: list[Message]) -> Expr:
        match prefix:
            case "tp":
                again = [m for m in chosen if m.path.endswith("gather_again")]
                rest = [m for m in chosen if m not in again]
                left: Expr = self.use.share_shown_tensor
                if self.stack.overlaps_tensor:
                    return left * self._seconds(chosen)
                return self._seconds(rest) + left * self._seconds(again)
            case "cp":
                core = total(
                    self._share(name) * self.work.forward(part, name).find("attention/core").total
                    for name, part in self.kinds.items()
                )
                beside = 3 * core * self.sizes.n_micro_batches
                return shown(beside, self._seconds(chosen), self.use.share_shown_data)
            case _:
                if self.stack.overlaps_experts:
                    return self.use.share_shown_experts * self._seconds(chosen)
                return self._seconds(chosen)

    def _sends(self) -> Node:
        """Activations and gradients handed to the next stage.

        Where they are whole on each tensor rank, each sends its part (Narayanan 2021,
        2104.04473, section 4.1; DeepSpeed's partitioned tensors).
        """
        size = self._seconds(m for m in self.messages if m.path.startswith("pp/"))
        if not self.setting.layout.sequence_parallel:
            size = size / self.sizes.ways("tp")
        if self.stack.overlaps_data:
            size = self.use.share_shown_data * size
        return self._leaf("sends", size)

    def _data(self) -> list[Node]:
        """Gradients reduced and weights gathered that the work beside them does not hide."""
        chosen = [m for m in self.messages if m.path.startswith("dp/")]
        if not chosen:
            return []
        size = self._seconds(chosen)
        if self.stack.overlaps_data:
            beside = self._slots * self._one_layer
            if self.setting.layout.zero >= 2:
                beside = beside * self.sizes.n_micro_batches
            size = shown(beside, size, self.use.share_shown_data)
        return [self._leaf("data", size)]

    def _leaf(self, name: str, size: Expr, times: Expr | int = 1) -> Node:
        return leaf(name, "seconds", size, times=times, basis=Basis.MODELLED)

    # --- once per step ------------------------------------------------------------------------

    def _optimizer(self) -> Node:
        """Adam over the weights of the fullest stage."""
        shared, dealt = self._held(experts=False), self._held(experts=True)
        if self.setting.layout.zero:
            copies = self.sizes.ways("dp", "cp")
            shared, dealt = shared / copies, dealt * self.sizes.ways("ep") / copies
        return self._leaf("optimizer", self.work.rates.move(BYTES_ADAM * (shared + dealt)))

    def _held(self, *, experts: bool) -> Expr:
        """Weights of the fullest stage on one rank."""
        kinds = [
            self._share(name) * self.work.weights(part, experts=experts)
            for name, part in self.kinds.items()
        ]
        if experts:
            return total(kinds)
        ends = [self.work.weights(self.parts[n], experts=False) for n in ("embedding", "head")]
        held = total(ends)
        if "pp" in self.sizes:
            held = where(self.sizes.pp - 1, maximum(*ends), held)
        return total([*kinds, held])
