"""The layouts that a search looks at, as columns of sizes; all of them are legal."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cache, cached_property
from itertools import product
from typing import Any, Literal, TypeAlias, get_args

import numpy as np
from numpy.typing import NDArray

from isoflop.arch import Arch
from isoflop.count.memory_saved import RECOMPUTES, Recompute
from isoflop.count.memory_split import CONTEXTS_BY, OFFLOADS, Offload
from isoflop.hardware import Cluster
from isoflop.plan.layout import Layout, broken_rules, divisors, offloads_under
from isoflop.plan.memory.flight import Share, shares_unlike
from isoflop.plan.schedule import SCHEDULES, ScheduleName
from isoflop.plan.schedule.kinds import schedule_rules

#: Sizes of one layout, in the order of the columns.
Name: TypeAlias = Literal[
    "tp", "pp", "dp", "cp", "ep", "virtual", "micro_batch", "sequence_parallel", "cp_by", "shard"
]
NAMES: tuple[Name, ...] = get_args(Name)
Columns: TypeAlias = Mapping[Name, NDArray[np.int64]]

#: A layout leaves at most one accelerator in this many idle.
IDLE_ONE_IN = 8
#: Larger micro-batches save little: products are large enough, and the bubble grows.
MOST_MICRO_BATCH = 16
#: A context-parallel rank keeps at least so many tokens of a sequence: with fewer, sending
#: keys and values takes longer than attention does (Llama 3, 2407.21783, table 4, keeps 8,192).
LEAST_TOKENS_CONTEXT = 2048
#: Nodes that one copy of what ZeRO splits is offered to be spread over, beside all: the fewer the
#: faster, as long as it fits (MiCS, Zhang 2022, 2205.00119, section 3.2).
NODES_OF_A_COPY = (1, 2, 4)

#: Places in `CONTEXTS_BY` of what is offered.
RING, ALL_TO_ALL = CONTEXTS_BY.index("ring"), CONTEXTS_BY.index("all_to_all")


def n_accelerators(columns: Columns) -> NDArray[np.int64]:
    return columns["tp"] * columns["pp"] * columns["dp"] * columns["cp"]


@dataclass(frozen=True, slots=True)
class Variation:
    """What a search tries on each split of the model: it changes no rank's share of the work."""

    zero: Literal[0, 1, 2, 3]
    recompute: Recompute
    offload: Offload = "none"
    schedule: ScheduleName = "1f1b"


@dataclass(frozen=True)
class Space:
    """Everything to choose from; `fixed` holds what the user said, by field of `Layout`.

    tp divides a node; any pp up to the layers, dividing them or not, and any virtual; any cp
    that leaves ranks `LEAST_TOKENS_CONTEXT` tokens, around a ring or with heads dealt out (to
    gather takes as many bytes as the ring, and hides none); micro-batches up to `MOST_MICRO_BATCH`; as
    many data-parallel copies as fit and divide the batch; any ep that divides copies and
    experts; what ZeRO splits over all copies or over `NODES_OF_A_COPY`; each of `schedules`;
    all of it within the accelerators of each of `counts`, at most an eighth idle.
    """

    arch: Arch
    cluster: Cluster
    seq_len: int
    global_batch: int
    fixed: Mapping[str, Any] = field(default_factory=dict)
    recompute: Recompute | None = None
    counts: tuple[int, ...] = ()
    schedules: tuple[ScheduleName, ...] = tuple(SCHEDULES)

    @cached_property
    def variations(self) -> tuple[Variation, ...]:
        """Those of one offload after those of another, in one order each."""
        stages = (0, 1, 2, 3) if "zero" not in self.fixed else (self.fixed["zero"],)
        policies = RECOMPUTES if self.recompute is None else (self.recompute,)
        return tuple(
            Variation(zero, policy, offload, schedule)
            for offload, schedule, zero, policy in product(
                self.offloads, self.schedules, stages, policies
            )
        )

    @cached_property
    def offloads(self) -> tuple[Offload, ...]:
        """What may be kept on the host; the first is tried on every split of the model."""
        if "offload" in self.fixed:
            return (self.fixed["offload"],)
        return ("none",) if self.cluster.chip.host is None else OFFLOADS

    def offloading(self, offload: Offload) -> slice:
        """Where the variations of one offload stand among all."""
        each = len(self.variations) // len(self.offloads)
        first = each * self.offloads.index(offload)
        return slice(first, first + each)

    @cached_property
    def columns(self) -> Columns:
        """One row per split of the model, each legal, none twice."""
        counts = self.counts or (self.cluster.count,)
        rows = sorted({row for count in counts for row in self._rows(count)})
        whole = np.array(rows, dtype=np.int64).reshape(len(rows), len(NAMES) - 1)
        table = np.concatenate([np.c_[whole[of], shard] for of, shard in self._shards(whole)])
        return {name: table[:, i] for i, name in enumerate(NAMES)}

    def _shards(self, rows: NDArray[np.int64]) -> Iterator[tuple[NDArray[np.intp], Any]]:
        """Rows by how many ranks a copy is spread over: all first, then what lies in few nodes."""
        tp, _, dp, cp, ep = rows[:, :5].T
        copies = dp * cp
        if "shard" in self.fixed:
            said = np.full(len(rows), self.fixed["shard"])
            of = np.flatnonzero((copies % said == 0) & (said % ep == 0))
            yield of, said[of]
            return
        yield np.arange(len(rows)), copies
        for nodes in NODES_OF_A_COPY:
            shard = np.maximum(1, nodes * self.cluster.size_node // tp)
            few = (shard > 1) & (shard < copies) & (copies % shard == 0) & (shard % ep == 0)
            of = np.flatnonzero(few)
            yield of, shard[of]

    @property
    def size(self) -> int:
        """Splits of the model; each comes in every variation that applies."""
        return len(self.columns["tp"])

    @property
    def alike(self) -> tuple[Variation, ...]:
        """The variations of the first offload, which are tried on every split of the model."""
        return self.variations[self.offloading(self.offloads[0])]

    @cached_property
    def applies(self) -> NDArray[np.bool_]:
        """Of each row, those of `alike` that mean something: ZeRO splits over copies, and
        schedules order the work of stages.

        What is split in fewer ways than there are copies is split by ZeRO.
        """
        columns, alike = self.columns, self.alike
        copies = columns["dp"] * columns["cp"]
        split = np.array([v.zero > 0 for v in alike])
        plain = np.array([v.zero == 0 or "zero" in self.fixed for v in alike])
        parted = (columns["shard"] < copies) | ("shard" in self.fixed)
        offered: NDArray[np.bool_] = np.where(
            parted[:, None], split[None, :], (copies > 1)[:, None] | plain[None, :]
        )
        for i, v in enumerate(alike):
            offered[:, i] &= self.runs[v.schedule] & offloads_under(v.offload, v.schedule)
        return offered

    @cached_property
    def runs(self) -> Mapping[ScheduleName, NDArray[np.bool_]]:
        """By schedule, the rows whose pipelines it has an order for; 1F1B has one for all."""
        columns = self.columns
        n_micro = self.global_batch // (columns["dp"] * columns["micro_batch"])
        rows = np.flatnonzero(self.staged)
        pairs = np.stack([columns["pp"][rows], n_micro[rows]], axis=1)
        asked, which = np.unique(pairs, axis=0, return_inverse=True)
        legal = {}
        for schedule in self.schedules:
            legal[schedule] = np.full(self.size, schedule == "1f1b")
            if schedule != "1f1b":
                rules = (
                    schedule_rules(schedule, self.arch.n_layers, *pair) for pair in asked.tolist()
                )
                fine = np.fromiter((not broken for broken in rules), bool, len(asked))
                legal[schedule][rows] = fine[which.reshape(-1)]
        return legal

    @cached_property
    def staged(self) -> NDArray[np.bool_]:
        """The rows with several stages of one chunk each, whose work schedules order."""
        stages: NDArray[np.bool_] = (self.columns["pp"] > 1) & (self.columns["virtual"] == 1)
        return stages

    def layout(self, row: int, variation: Variation) -> Layout:
        sizes: dict[str, Any] = {name: int(self.columns[name][row]) for name in NAMES}
        sizes["sequence_parallel"] = bool(sizes["sequence_parallel"])
        sizes["cp_by"] = CONTEXTS_BY[sizes["cp_by"]]
        if sizes["shard"] == sizes["dp"] * sizes["cp"]:
            sizes["shard"] = None
        return Layout(**sizes, zero=variation.zero, offload=variation.offload,
                      schedule=variation.schedule)  # fmt: skip

    @cached_property
    def shares(self) -> Callable[[int, int, ScheduleName], Mapping[int, Share]]:
        """What ranks of a pipeline hold that may hold most, by its stages, chunks and schedule."""

        @cache
        def shares(pp: int, virtual: int, schedule: ScheduleName) -> Mapping[int, Share]:
            return shares_unlike(self.arch, Layout(pp=pp, virtual=virtual, schedule=schedule))

        return shares

    # --- rows -----------------------------------------------------------------------------

    def _rows(self, count: int) -> Iterator[tuple[int, ...]]:
        """Legal rows on `count` accelerators.

        A rule of a layout is about one of three groups of sizes (how tensors are cut, how
        experts are dealt, how the batch is), so each group is asked for alone; whole nodes
        of a cluster have its rules.
        """
        legal = self._legal
        for tp, cp, sp in product(self._tensor(), self._context(), self._sequence()):
            if sp == 0 and tp == 1 and "sequence_parallel" not in self.fixed:
                continue
            by = [by for by in self._by(cp)
                  if legal(tp=tp, cp=cp, sequence_parallel=bool(sp), cp_by=CONTEXTS_BY[by])]  # fmt: skip
            if not by:
                continue
            for pp, micro_batch in product(self._pipeline(), self._micro_batches()):
                dp = self._copies(count // (tp * cp * pp), micro_batch)
                used = tp * cp * pp * dp
                if used == 0 or IDLE_ONE_IN * (count - used) > count:
                    continue
                chunks = self._chunks(pp, dp, micro_batch)
                deals = [ep for ep in self._deals(dp * cp) if legal(dp=dp, cp=cp, ep=ep)]
                for virtual, ep, how in product(chunks, deals, by):
                    yield tp, pp, dp, cp, ep, virtual, micro_batch, sp, how

    def _said(self, name: str, otherwise: Iterable[int]) -> Iterable[int]:
        return (self.fixed[name],) if name in self.fixed else otherwise

    def _tensor(self) -> Iterable[int]:
        return self._said("tp", divisors(self.cluster.size_node))

    def _sequence(self) -> Iterable[int]:
        return self._said("sequence_parallel", (0, 1))

    def _context(self) -> Iterable[int]:
        most = max(1, self.seq_len // LEAST_TOKENS_CONTEXT)
        return self._said("cp", (d for d in divisors(self.seq_len) if d <= most))

    def _by(self, cp: int) -> Iterable[int]:
        """Ways that context-parallel ranks meet, by their place in `CONTEXTS_BY`."""
        if "cp_by" in self.fixed:
            return (CONTEXTS_BY.index(self.fixed["cp_by"]),)
        return (RING, ALL_TO_ALL) if cp > 1 else (RING,)

    def _pipeline(self) -> Iterable[int]:
        return self._said("pp", range(1, self.arch.n_layers + 1))

    @cached_property
    def _chunks(self) -> Callable[[int, int, int], list[int]]:
        """Chunks on each of pp stages that some schedule has an order for."""

        @cache
        def chunks(pp: int, dp: int, micro_batch: int) -> list[int]:
            most = self.arch.n_layers // pp if pp > 1 else 1
            sizes = {"pp": pp, "dp": dp, "micro_batch": micro_batch}
            several = tuple(name for name in self.schedules if name == "1f1b")
            return [
                virtual
                for virtual in self._said("virtual", range(1, most + 1))
                for names in (self.schedules if virtual == 1 else several,)
                if any(self._legal(**sizes, virtual=virtual, schedule=name) for name in names)
            ]

        return chunks

    def _micro_batches(self) -> Iterable[int]:
        few = (d for d in divisors(self.global_batch) if d <= MOST_MICRO_BATCH)
        return self._said("micro_batch", few)

    def _copies(self, room: int, micro_batch: int) -> int:
        """As many copies as fit and divide the batch; 0 where not one does."""
        if "dp" in self.fixed:
            return self.fixed["dp"] if self.fixed["dp"] <= room else 0
        if room < 1 or self.global_batch % micro_batch:
            return 0
        return max(d for d in divisors(self.global_batch // micro_batch) if d <= room)

    def _deals(self, copies: int) -> Iterable[int]:
        return self._said("ep", divisors(copies))

    @cached_property
    def _legal(self) -> Callable[..., bool]:
        """Whether sizes, all others being 1, break no rule; each asked once."""

        @cache
        def legal(**fields: Any) -> bool:
            layout = Layout(**fields)
            return not broken_rules(
                layout, self.arch, self.cluster, self.global_batch, self.seq_len
            )

        return legal
