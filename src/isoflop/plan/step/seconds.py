"""Seconds of one training step of any setting, from its operators and its messages.

Structure (which parallelism there is, ZeRO, recomputation, the stack) branches in Python; the
sizes of the layout are symbols, so that one formula serves every layout of a structure: it is
evaluated here and compiled to arrays by a search.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property

from isoflop.hardware.fabric import Fabric, fabric_of
from isoflop.hardware.fitted import Beliefs
from isoflop.hardware.stack import Stack, find_stack
from isoflop.plan.network.exchange import Exchange
from isoflop.plan.network.group import Dimension, Group, Ways, groups
from isoflop.plan.schedule import (
    SOURCES,
    DualPipe,
    DualPipeV,
    Interleaved,
    OneFOneB,
    Terms,
    idle_closed,
    n_together,
)
from isoflop.plan.step.constants import Constants, constants
from isoflop.plan.step.layers import Layers
from isoflop.plan.step.message import Message, messages
from isoflop.plan.step.rank_work import Passes, RankWork
from isoflop.plan.step.rates import Rates
from isoflop.plan.step.setting import Setting
from isoflop.plan.step.sizes import Sizes
from isoflop.plan.step.stage import Stage
from isoflop.quantity import (
    Basis,
    Expr,
    Interval,
    Node,
    Symbol,
    branch,
    leaf,
    minimum,
    number,
    total,
)

#: Bytes per weight that Adam reads and writes: master weight, two moments and gradient in
#: fp32 read, the first three written, and the 16-bit weight.
BYTES_ADAM = 4 * 4 + 3 * 4 + 2
#: What DualPipe's pairs hide of the experts' exchange and of what stages hand on. Its authors
#: say that all of both "can be fully hidden" where the pair's kernels share the chip in the right
#: proportion; no measured step of another trainer is known, so less is believed likely.
SHARE_HIDDEN = Symbol(
    "share_hidden_together",
    0.9,
    Basis.ASSUMED,
    Interval(0.6, 1.0),
    source="DeepSeek-V3 (2412.19437), section 3.2.1: fully hidden, by its authors",
    meaning="of the experts' exchange and of sends, hidden where a forward and a backward run together",
)
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
    return _step(setting, beliefs).tree()


@dataclass(frozen=True, slots=True)
class Pieces:
    """What a step is made of, for an event-by-event simulation of its pipeline.

    layers: one layer of each kind, with its host's waiting; first, last: what the two ends of
    the model add; traffic: that of one micro-batch and layer which its work does not hide;
    send: from one chunk to the next; hidden: what a forward and a backward save together;
    once: data parallelism and the optimizer. All without the `error` by which the whole step
    is multiplied.
    """

    layers: Mapping[str, Passes]
    first: Passes
    last: Passes
    traffic: Expr
    send: Expr
    hidden: Expr
    once: Expr
    error: Expr


def step_pieces(setting: Setting, beliefs: Beliefs | None = None) -> Pieces:
    """The pieces of `step_time`'s tree."""
    return _step(setting, beliefs).pieces()


def shown(work: Expr, beside: Expr, share: Expr) -> Expr:
    """What `beside` adds to `work` where all but `share` of the shorter of the two is hidden."""
    return beside - (1 - share) * minimum(work, beside)


def _step(setting: Setting, beliefs: Beliefs | None) -> _Step:
    known = setting.beliefs if beliefs is None else beliefs
    stack = find_stack(setting.stack, known)
    rates = Rates.of(setting.cluster.chip, setting.compute, stack, known)
    work = RankWork(setting, stack, Sizes.of(setting), rates)
    return _Step(setting, known, Layers(work))


@dataclass(frozen=True)
class _Step:
    setting: Setting
    beliefs: Beliefs
    layers: Layers

    # --- what it stands on ------------------------------------------------------------

    @property
    def stack(self) -> Stack:
        return self.work.stack

    @cached_property
    def use(self) -> Constants:
        return constants(self.beliefs)

    @property
    def sizes(self) -> Sizes:
        return self.work.sizes

    @property
    def work(self) -> RankWork:
        return self.layers.work

    @cached_property
    def stage(self) -> Stage:
        return Stage(self.layers, self.setting.layout.pipeline)

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

    # --- the tree -----------------------------------------------------------------------

    def tree(self) -> Node:
        children = [self._layers(), self._ends(), *self._traffic()]
        if "pp" in self.sizes:
            children += [self._bubble(), self._sends()]
        children += [*self._data(), self._optimizer()]
        return branch("seconds_step", "seconds", children, times=self._error)

    @cached_property
    def _error(self) -> Expr:
        """Measured over predicted seconds: of the stack, and of the model."""
        sparse = any(map(self.work.has_experts, self.layers.kinds.values()))
        error = self.use.error_of_experts if sparse else self.use.error_of_model
        return self.stack.slowed * self.stack.residual * error

    def pieces(self) -> Pieces:
        n_micro, per_stage = self.sizes.n_micro_batches, self.setting.arch.n_layers / self.sizes.pp
        beside = [*self._data(), self._optimizer()]
        if self.stage.mirrors:
            beside.append(self._sends())
        return Pieces(
            layers=self.layers.passes,
            first=self.layers.first,
            last=self.layers.last,
            traffic=total(node.total for node in self._within) / (n_micro * per_stage),
            send=self._send,
            hidden=self._hidden,
            once=total(node.total for node in beside),
            error=self._error,
        )

    def _layers(self) -> Node:
        """All micro-batches through the layers of the fullest rank."""
        trees = self.layers.trees.items()
        kinds = [replace(tree, times=self.stage.share(name)) for name, tree in trees]
        return branch("layers", "seconds", kinds, times=self.sizes.n_micro_batches)

    def _ends(self) -> Node:
        return self._leaf("ends", self.stage.ends, self.sizes.n_micro_batches)

    # --- the pipeline -----------------------------------------------------------------------

    def _bubble(self) -> Node:
        """Idle time of the schedule where sends take none.

        1F1B waits for one micro-batch through the other stages, cut by the chunks.
        """
        match schedule := self.setting.layout.pipeline:
            case OneFOneB() | Interleaved():
                size = self.stage.elsewhere(self._busy) / self.sizes.ways("virtual_pp")
            case _:
                size = idle_closed(schedule, self._terms(number(0)))
        source = SOURCES[self.setting.layout.schedule]
        return leaf("bubble", "seconds", size, basis=Basis.MODELLED, source=source)

    def _terms(self, send: Expr) -> Terms:
        return self.stage.terms(self._busy, send, self._hidden)

    @cached_property
    def _busy(self) -> Expr:
        """Seconds of one micro-batch's traffic on one rank."""
        return total(node.total for node in self._within) / self.sizes.n_micro_batches

    def _traffic(self) -> list[Node]:
        """What of it adds to a step: less what DualPipe's pairs hide of the experts' exchange."""
        schedule = self.setting.layout.pipeline
        if not isinstance(schedule, DualPipe | DualPipeV):
            return self._within
        saved = n_together(schedule, self._terms(number(0))) * self._hidden
        return [
            self._leaf(node.name, node.size - saved) if node.name == "experts" else node
            for node in self._within
        ]

    @cached_property
    def _hidden(self) -> Expr:
        """Seconds that a forward and a backward through one chunk save together."""
        exchange = [node.total for node in self._within if node.name == "experts"]
        if not self.stage.mirrors or not exchange:
            return number(0)
        chunks = 2 // self.stage.n_copies
        own = self.stage.terms(self._busy, number(0), number(0))
        one = exchange[0] / self.sizes.n_micro_batches
        return minimum(SHARE_HIDDEN * one, own.forward, own.backward) / chunks

    def _sends(self) -> Node:
        """Activations and gradients handed to the next stage, as far as ranks wait for them."""
        match schedule := self.setting.layout.pipeline:
            case OneFOneB() | Interleaved():
                size = self._sent
            case DualPipe() | DualPipeV():
                size = (1 - SHARE_HIDDEN) * self._sent
            case _:
                waited = idle_closed(schedule, self._terms(self._send))
                size = waited - idle_closed(schedule, self._terms(number(0)))
        return self._leaf("sends", size)

    @property
    def _send(self) -> Expr:
        """One of them; those that DualPipe's pairs hide are not waited for one by one."""
        if "pp" not in self.sizes or self.stage.mirrors:
            return number(0)
        return self._sent / (2 * self.sizes.n_micro_batches * self.sizes.virtual_pp)

    @cached_property
    def _sent(self) -> Expr:
        """All of them one after the other.

        Where they are whole on each tensor rank, each sends its part (Narayanan 2021,
        2104.04473, section 4.1; DeepSpeed's partitioned tensors).
        """
        size = self._seconds(m for m in self.messages if m.path.startswith("pp/"))
        if not self.setting.layout.sequence_parallel:
            size = size / self.sizes.ways("tp")
        if self.stack.overlaps_data:
            size = self.use.share_shown_data * size
        return size

    # --- messages ---------------------------------------------------------------------------

    def _seconds(self, chosen: Iterable[Message]) -> Expr:
        """Seconds of messages one after the other."""
        return total(m.times * m.seconds(self.around, self.fabric) for m in chosen)

    @cached_property
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
                    self.stage.share(name) * tree.find("forward/attention/core").total
                    for name, tree in self.layers.trees.items()
                )
                beside = 3 * core * self.sizes.n_micro_batches
                return shown(beside, self._seconds(chosen), self.use.share_shown_data)
            case _:
                if self.stack.overlaps_experts:
                    return self.use.share_shown_experts * self._seconds(chosen)
                return self._seconds(chosen)

    def _data(self) -> list[Node]:
        """Gradients reduced and weights gathered that the work beside them does not hide."""
        chosen = [m for m in self.messages if m.path.startswith("dp/")]
        if not chosen:
            return []
        size = self._seconds(chosen)
        if self.stack.overlaps_data:
            beside = self.stage.slots * self.layers.average
            if self.setting.layout.zero >= 2:
                beside = beside * self.sizes.n_micro_batches
            size = shown(beside, size, self.use.share_shown_data)
        return [self._leaf("data", size)]

    def _leaf(self, name: str, size: Expr, times: Expr | int = 1) -> Node:
        return leaf(name, "seconds", size, times=times, basis=Basis.MODELLED)

    # --- once per step ------------------------------------------------------------------------

    def _optimizer(self) -> Node:
        """Adam over the weights of the fullest stage."""
        shared, dealt = (self.stage.weights(experts=e) for e in (False, True))
        if self.setting.layout.zero:
            copies = self.sizes.ways("dp", "cp")
            shared, dealt = shared / copies, dealt * self.sizes.ways("ep") / copies
        return self._leaf("optimizer", self.work.rates.move(BYTES_ADAM * (shared + dealt)))
