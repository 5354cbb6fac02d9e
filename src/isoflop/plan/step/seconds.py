"""Seconds of one training step of any setting, from its operators and its messages.

Structure (which parallelism there is, ZeRO, recomputation, the stack) branches in Python; the
sizes of the layout are symbols, so that one formula serves every layout of a structure: it is
evaluated here and compiled to arrays by a search.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cache, cached_property

from isoflop.arch import Experts
from isoflop.count.memory_saved import Recompute
from isoflop.count.memory_split import Offload
from isoflop.hardware.fitted import Beliefs
from isoflop.hardware.stack import find_stack
from isoflop.plan.schedule import (
    SOURCES,
    DualPipe,
    DualPipeV,
    Interleaved,
    OneFOneB,
    ScheduleName,
    Terms,
    idle_closed,
    n_together,
)
from isoflop.plan.step.constants import Constants, constants
from isoflop.plan.step.layers import Layers
from isoflop.plan.step.offload import BYTES_ADAM, HostRates, bytes_kept, shown
from isoflop.plan.step.rank_work import Passes, RankWork
from isoflop.plan.step.rates import Rates
from isoflop.plan.step.setting import Setting
from isoflop.plan.step.sizes import Sizes
from isoflop.plan.step.stage import Stage
from isoflop.plan.step.traffic import Traffic
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
    return Steps.of(setting, beliefs).own.tree()


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
    return Steps.of(setting, beliefs).own.pieces()


@dataclass(frozen=True)
class Steps:
    """The steps of a setting under any ZeRO, recomputation, schedule and offloading; what they
    share of each other is built once.
    """

    setting: Setting
    beliefs: Beliefs

    @classmethod
    def of(cls, setting: Setting, beliefs: Beliefs | None = None) -> Steps:
        return cls(setting, setting.beliefs if beliefs is None else beliefs)

    def step(
        self, zero: int, recompute: Recompute, schedule: ScheduleName, offload: Offload
    ) -> Step:
        pipelined = self.pipelined(recompute, schedule, "activations" in offload)
        return Step(pipelined, zero, on_host="optimizer" in offload)

    @property
    def own(self) -> Step:
        """That of the setting as it is."""
        layout = self.setting.layout
        return self.step(layout.zero, self.setting.recompute, layout.schedule, layout.offload)

    # --- what they stand on -----------------------------------------------------------------

    @cached_property
    def use(self) -> Constants:
        return constants(self.beliefs)

    @cached_property
    def work(self) -> RankWork:
        s = self.setting
        stack = find_stack(s.stack, self.beliefs)
        rates = Rates.of(s.cluster.chip, s.compute, stack, self.beliefs)
        return RankWork(s, stack, Sizes.of(s), rates)

    @cached_property
    def traffic(self) -> Traffic:
        return Traffic(self.setting, self.work.stack, self.use)

    @cached_property
    def layers(self) -> Callable[[Recompute], Layers]:
        return cache(
            lambda recompute: Layers(
                replace(self.work, setting=replace(self.setting, recompute=recompute))
            )
        )

    @cached_property
    def pipelined(self) -> Callable[[Recompute, ScheduleName, bool], Pipelined]:
        return cache(lambda *varied: Pipelined(self, *varied))

    @cached_property
    def host(self) -> HostRates:
        return HostRates.of(self.setting, self.use)

    @cached_property
    def error(self) -> Expr:
        """Measured over predicted seconds: of the stack, and of the model."""
        stack, kinds = self.work.stack, self.setting.arch.kinds.values()
        sparse = any(isinstance(kind.feed_forward, Experts) for kind in kinds)
        error = self.use.error_of_experts if sparse else self.use.error_of_model
        return stack.slowed * stack.residual * error


@dataclass(frozen=True)
class Pipelined:
    """All micro-batches of a step through its pipeline; `copied` says that layers' activations
    wait in the host's memory.
    """

    steps: Steps
    recompute: Recompute
    schedule: ScheduleName
    copied: bool

    @cached_property
    def layers(self) -> Layers:
        return self.steps.layers(self.recompute)

    @cached_property
    def stage(self) -> Stage:
        layout = replace(self.steps.setting.layout, schedule=self.schedule)
        return Stage(self.layers, layout.pipeline)

    @property
    def sizes(self) -> Sizes:
        return self.steps.work.sizes

    @property
    def placed(self) -> ScheduleName:
        """The schedule, as far as it says who holds what."""
        return self.schedule if self.stage.mirrors else "1f1b"

    @cached_property
    def nodes(self) -> list[Node]:
        n_micro = self.sizes.n_micro_batches
        found = [self._layers(), _leaf("ends", self.stage.ends, n_micro), *self._shown()]
        return [*found, self._bubble(), self.sends] if "pp" in self.sizes else found

    def _layers(self) -> Node:
        """All micro-batches through the layers of the fullest rank."""
        trees = self.layers.trees.items()
        kinds = [replace(tree, times=self.stage.share(name)) for name, tree in trees]
        return branch("layers", "seconds", kinds, times=self.sizes.n_micro_batches)

    # --- traffic of each micro-batch ----------------------------------------------------------

    @cached_property
    def within(self) -> list[Node]:
        """What its work does not hide."""
        sent = self.steps.traffic.within(self.placed, self.recompute == "full")
        found = []
        for prefix, name in TRAFFIC.items():
            chosen = [(path, size) for path, size in sent if path.startswith(f"{prefix}/")]
            if chosen:
                found.append(_leaf(name, self._left(prefix, chosen)))
        return [*found, *([self._offloaded()] if self.copied else [])]

    def _offloaded(self) -> Node:
        """Copies of the layers' activations to the host and back that their work does not hide."""
        setting, stack, host = self.layers.setting, self.steps.work.stack, self.steps.host
        each = (
            self.stage.share(name)
            * host.copies(bytes_kept(setting, stack, part), self.layers.trees[name])
            for name, part in self.layers.kinds.items()
        )
        return _leaf("offload", total(each), self.sizes.n_micro_batches)

    def _left(self, prefix: str, chosen: list[tuple[str, Expr]]) -> Expr:
        stack, use = self.steps.work.stack, self.steps.use
        size = total(size for _, size in chosen)
        match prefix:
            case "tp":
                left: Expr = use.share_shown_tensor
                if stack.overlaps_tensor:
                    return left * size
                again = [s for path, s in chosen if path.endswith("gather_again")]
                rest = [s for path, s in chosen if not path.endswith("gather_again")]
                return total(rest) + left * total(again)
            case "cp" if self.steps.setting.layout.cp_by != "ring":
                return size  # attention waits for them
            case "cp":
                core = total(
                    self.stage.share(name) * tree.find("forward/attention/core").total
                    for name, tree in self.layers.trees.items()
                )
                return shown(3 * core * self.sizes.n_micro_batches, size, use.share_shown_data)
            case _:
                return use.share_shown_experts * size if stack.overlaps_experts else size

    def _shown(self) -> list[Node]:
        """What of it adds to a step: less what DualPipe's pairs hide of the experts' exchange."""
        schedule = self.stage.schedule
        if not isinstance(schedule, DualPipe | DualPipeV):
            return self.within
        saved = n_together(schedule, self._terms(number(0))) * self.hidden
        return [
            _leaf(node.name, node.size - saved) if node.name == "experts" else node
            for node in self.within
        ]

    @cached_property
    def hidden(self) -> Expr:
        """Seconds that a forward and a backward through one chunk save together."""
        exchange = [node.total for node in self.within if node.name == "experts"]
        if not self.stage.mirrors or not exchange:
            return number(0)
        own = self.stage.terms(self._busy, number(0), number(0))
        one = SHARE_HIDDEN * exchange[0] / self.sizes.n_micro_batches
        return minimum(one, own.forward, own.backward) * self.stage.n_copies / 2

    # --- waiting ------------------------------------------------------------------------------

    def _bubble(self) -> Node:
        """Idle time of the schedule where sends take none.

        1F1B waits for one micro-batch through the other stages, cut by the chunks.
        """
        match schedule := self.stage.schedule:
            case OneFOneB() | Interleaved():
                size = self.stage.elsewhere(self._busy) / self.sizes.ways("virtual_pp")
            case _:
                size = idle_closed(schedule, self._terms(number(0)))
        return leaf("bubble", "seconds", size, basis=Basis.MODELLED, source=SOURCES[self.schedule])

    def _terms(self, send: Expr) -> Terms:
        return self.stage.terms(self._busy, send, self.hidden)

    @cached_property
    def _busy(self) -> Expr:
        """Seconds of one micro-batch's traffic on one rank."""
        return total(node.total for node in self.within) / self.sizes.n_micro_batches

    @cached_property
    def sends(self) -> Node:
        """Activations and gradients handed to the next stage, as far as ranks wait for them."""
        match schedule := self.stage.schedule:
            case OneFOneB() | Interleaved():
                size = self._sent
            case DualPipe() | DualPipeV():
                size = (1 - SHARE_HIDDEN) * self._sent
            case _:
                waited = idle_closed(schedule, self._terms(self.send))
                size = waited - idle_closed(schedule, self._terms(number(0)))
        return _leaf("sends", size)

    @property
    def send(self) -> Expr:
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
        size = self.steps.traffic.between(self.placed)
        if not self.steps.setting.layout.sequence_parallel:
            size = size / self.sizes.ways("tp")
        overlaps = self.steps.work.stack.overlaps_data
        return self.steps.use.share_shown_data * size if overlaps else size


@dataclass(frozen=True)
class Step:
    """A step: its pipeline, and what comes once; `on_host` says where Adam works."""

    pipelined: Pipelined
    zero: int
    on_host: bool

    def tree(self) -> Node:
        children = [*self.pipelined.nodes, *self._once()]
        return branch("seconds_step", "seconds", children, times=self.pipelined.steps.error)

    def pieces(self) -> Pieces:
        p = self.pipelined
        n_micro, per_stage = p.sizes.n_micro_batches, p.steps.setting.arch.n_layers / p.sizes.pp
        once = [*self._once(), *([p.sends] if p.stage.mirrors else [])]
        return Pieces(
            layers=p.layers.passes,
            first=p.layers.first,
            last=p.layers.last,
            traffic=total(node.total for node in p.within) / (n_micro * per_stage),
            send=p.send,
            hidden=p.hidden,
            once=total(node.total for node in once),
            error=p.steps.error,
        )

    def _once(self) -> list[Node]:
        sent = self.pipelined.steps.traffic.once(self.pipelined.placed, self.zero)
        return [*([] if sent == number(0) else [self._data(sent)]), self._optimizer()]

    def _data(self, size: Expr) -> Node:
        """Gradients reduced and weights gathered that the work beside them does not hide."""
        p = self.pipelined
        if p.steps.work.stack.overlaps_data:
            beside = p.stage.slots * p.layers.average
            if self.zero >= 2:
                beside = beside * p.sizes.n_micro_batches
            size = shown(beside, size, p.steps.use.share_shown_data)
        return _leaf("data", size)

    def _optimizer(self) -> Node:
        """Adam over the weights of the fullest stage."""
        p = self.pipelined
        shared, dealt = (p.stage.weights(experts=e) for e in (False, True))
        if self.zero:
            everywhere = p.steps.setting.layout.shard is None
            among = p.sizes.ways(*(("dp", "cp") if everywhere else ("shard",)))
            shared, dealt = shared / among, dealt * p.sizes.ways("ep") / among
        if self.on_host:
            update = p.steps.host.update(shared + dealt, p.steps.work.stack.bytes_grad)
            return _leaf("optimizer", update)
        return _leaf("optimizer", p.steps.work.rates.move(BYTES_ADAM * (shared + dealt)))


def _leaf(name: str, size: Expr, times: Expr | int = 1) -> Node:
    return leaf(name, "seconds", size, times=times, basis=Basis.MODELLED)
