"""The fullest rank of a pipeline: its layers, what the model's ends add, and what it waits for."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from isoflop.count.stages import layers_fullest, layers_fullest_pair, layers_of_ends
from isoflop.plan.schedule import DualPipe, DualPipeV, Schedule, Terms
from isoflop.plan.step.layers import Layers
from isoflop.plan.step.rank_work import DIRECTIONS, Direction, Passes
from isoflop.plan.step.sizes import Sizes
from isoflop.quantity import Expr, maximum, minimum, number, total, where


@dataclass(frozen=True)
class Stage:
    """The rank that all others wait for, under the schedule of its setting's layout."""

    layers: Layers
    schedule: Schedule

    @property
    def sizes(self) -> Sizes:
        return self.layers.work.sizes

    @property
    def n_layers(self) -> int:
        return self.layers.setting.arch.n_layers

    @property
    def mirrors(self) -> bool:
        """Whether a rank holds two stages, as far from the first as from the last."""
        return isinstance(self.schedule, DualPipe | DualPipeV)

    @property
    def n_copies(self) -> int:
        """How often a pipeline holds each layer."""
        return 2 if isinstance(self.schedule, DualPipe) else 1

    # --- what it runs -----------------------------------------------------------------------

    @cached_property
    def slots(self) -> Expr:
        """Layers of one micro-batch on the fullest rank."""
        if "pp" not in self.sizes:
            return number(self.n_layers)
        if self.mirrors:
            return layers_fullest_pair(self.n_layers, self._stages) / self.n_copies
        return layers_fullest(self.n_layers, self.sizes.pp)

    @property
    def _stages(self) -> Expr:
        """Stages that a micro-batch passes where ranks hold two of them."""
        return 2 * self.sizes.pp / self.n_copies

    def share(self, kind: str) -> Expr:
        """Layers of one kind on the fullest rank.

        Where only some layers have experts, that is a stage without the others: all stages
        wait for the slowest.
        """
        arch = self.layers.setting.arch
        count, slots = arch.times(kind), self.slots
        if count == arch.n_layers:
            return slots
        dealt = self.layers.n_dealt
        if "pp" not in self.sizes or dealt in (0, arch.n_layers):
            return slots * count / arch.n_layers
        slow = minimum(slots, dealt)
        if self.layers.work.has_experts(self.layers.kinds[kind]):
            return slow * count / dealt
        return (slots - slow) * count / (arch.n_layers - dealt)

    @cached_property
    def ends(self) -> Expr:
        """What the embedding or the head adds to the fullest rank, one micro-batch."""
        both, one = self._both_ends, self.layers.average
        if "pp" not in self.sizes:
            return both
        if self.mirrors:
            held = total(layers_of_ends(self.n_layers, self._stages, number(1)))
            return maximum(0, both - (self.slots * self.n_copies - held) * one) / self.n_copies
        held_first, held_last = layers_of_ends(
            self.n_layers, self.sizes.pp, self.sizes.ways("virtual_pp")
        )
        most = maximum(
            0,
            self.layers.first.both - (self.slots - held_first) * one,
            self.layers.last.both - (self.slots - held_last) * one,
        )
        return where(self.sizes.pp - 1, most, both)

    @property
    def _both_ends(self) -> Expr:
        return self.layers.first.both + self.layers.last.both

    def weights(self, *, experts: bool) -> Expr:
        """Weights on one rank that holds the fullest stage: of its experts, or of all else."""
        work, parts = self.layers.work, self.layers.parts
        kinds = [
            self.n_copies * self.share(name) * work.weights(part, experts=experts)
            for name, part in self.layers.kinds.items()
        ]
        if experts:
            return total(kinds)
        ends = [work.weights(parts[n], experts=False) for n in ("embedding", "head")]
        held = total(ends)
        if "pp" in self.sizes and not self.mirrors:
            held = where(self.sizes.pp - 1, maximum(*ends), held)
        return total([*kinds, held])

    # --- what it waits for ------------------------------------------------------------------

    def elsewhere(self, traffic: Expr) -> Expr:
        """Seconds of one micro-batch through all other ranks, each with so much `traffic`."""
        pp = self.sizes.pp
        work = (pp - 1) / pp * (self.n_layers * self.layers.average + self._both_ends)
        return work + (pp - 1) * traffic

    def terms(self, traffic: Expr, send: Expr, hidden: Expr) -> Terms:
        """What the schedule's formulas are made of, traffic being of one micro-batch.

        Traffic goes with forward and backward in the proportion of their work; what the ends
        add in that of their own.
        """
        own = Passes(*(self._own(direction, traffic) for direction in DIRECTIONS))
        others = Passes(*(self._others(direction, traffic) for direction in DIRECTIONS))
        return Terms(
            self.sizes.n_micro_batches, self.sizes.pp,
            own.forward, own.backward, own.weights,
            others.forward, others.backward, others.weights, send, hidden,
        )  # fmt: skip

    def _own(self, direction: Direction, traffic: Expr) -> Expr:
        first, last = self.layers.first, self.layers.last
        layers = total(self.share(name) * p.of(direction) for name, p in self.layers.passes.items())
        ends = self.ends * (first.of(direction) + last.of(direction)) / self._both_ends
        return layers + ends + self._part(direction, traffic)

    def _others(self, direction: Direction, traffic: Expr) -> Expr:
        pp, times = self.sizes.pp, self.layers.setting.arch.times
        layers = total(times(name) * p.of(direction) for name, p in self.layers.passes.items())
        work = layers + self.layers.first.of(direction) + self.layers.last.of(direction)
        average = work / pp + self._part(direction, traffic)
        if isinstance(self.schedule, DualPipe):  # the rank that mirrors this one is as slow
            return self._own(direction, traffic) + (pp - 2) * average
        return (pp - 1) * average

    def _part(self, direction: Direction, traffic: Expr) -> Expr:
        """The part of traffic that goes in one direction; none is put off."""
        if direction == "weights":
            return number(0)
        times = self.layers.setting.arch.times
        shares = (times(name) * p.of(direction) / p.both for name, p in self.layers.passes.items())
        return traffic * total(shares) / self.n_layers
