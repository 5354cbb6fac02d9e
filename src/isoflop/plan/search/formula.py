"""The formulas of a plan compiled to arrays: bytes of a stage and seconds of a step.

Structure branches in Python, so there is one function per structure: for each schedule, for each
stage that differs from others in what it holds, and for steps with and without sequence
parallelism. Sizes of the layout are its arguments; it gives one result for each variation, and
what variations share is computed once.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from functools import cache, cached_property, reduce
from typing import Any

import numpy as np
from numpy.typing import NDArray

from isoflop.count.blocks import describe
from isoflop.count.memory_split import CONTEXTS_BY
from isoflop.plan.layout import Layout
from isoflop.plan.memory.flight import Flight, in_flight
from isoflop.plan.memory.formula import Content, Stages, stages_by_content
from isoflop.plan.memory.shard import (
    State,
    Trained,
    host_training_varied,
    memory_training_varied,
    shards_of,
)
from isoflop.plan.schedule import ScheduleName
from isoflop.plan.schedule.kinds import PUT_OFF
from isoflop.plan.search.space import Columns, Space, Variation, n_accelerators
from isoflop.plan.step.seconds import Steps
from isoflop.plan.step.setting import Setting
from isoflop.plan.step.sizes import SIZES
from isoflop.quantity import Expr, Symbol, number
from isoflop.quantity.compile import compile_expressions

Floats = NDArray[np.float64]
Compiled = Callable[..., Any]

#: Rows at a time: a few hundred arrays of so many numbers stay in a core's cache.
CHUNK = 4096


def _fold(operate: Any) -> Callable[..., Any]:
    return lambda *args: reduce(operate, args)


#: What arrays do for the operators that are not infix.
OVER_ARRAYS: Mapping[str, Callable[..., Any]] = {
    "ceil_div": lambda a, b: np.ceil(a / b),
    "max": _fold(np.maximum),
    "min": _fold(np.minimum),
    "where": lambda test, yes, no: np.where(test > 0, yes, no),
}


def compiled(expressions: Sequence[Expr], over: Sequence[str]) -> Callable[..., Any]:
    """The expressions as a function of arrays; whole numbers are exact up to 2 ** 53."""
    return compile_expressions(expressions, over, OVER_ARRAYS)


def in_chunks(function: Callable[..., Any], arrays: Sequence[Floats], width: int) -> Floats:
    """A compiled function over long arrays: one column per result."""
    n_rows = len(arrays[0])
    out = np.empty((n_rows, width))
    with np.errstate(divide="ignore", invalid="ignore"):  # in branches that are not taken
        for start in range(0, n_rows, CHUNK):
            part = slice(start, start + CHUNK)
            for column, result in enumerate(function(*(a[part] for a in arrays))):
                out[part, column] = result
    return out


def sizes(space: Space, columns: Columns) -> dict[str, Floats]:
    """The columns by the names that formulas give them."""
    called = {"micro_batch": "batch", "virtual": "virtual_pp"}
    n_micro = space.global_batch // (columns["dp"] * columns["micro_batch"])
    named: dict[str, NDArray[np.int64]] = {
        called.get(n, n): column for n, column in columns.items()
    }
    return {
        name: column.astype(float) for name, column in {**named, "n_micro_batches": n_micro}.items()
    }


@dataclass(frozen=True)
class Formulas:
    """Memory and step time of all rows of a space that share a structure, compiled."""

    space: Space
    job: Trained
    setting: Setting
    columns: Columns

    @cached_property
    def template(self) -> Layout:
        """A layout with the structure of all rows: what is above 1 in any of them is.

        It leaves one domain of fast links if any row does.
        """
        columns, cluster = self.columns, self.space.cluster
        domain = cluster.per_node or cluster.chip.per_node
        wide = 2 * domain if n_accelerators(columns).max() > domain else 2
        many = {"tp": 2, "ep": 2, "virtual": 2, "pp": wide, "dp": 4 * wide, "cp": wide}
        above: dict[str, Any] = {
            name: most if (columns[name] > 1).any() else 1  # type: ignore[index]
            for name, most in many.items()
        }
        together, by = bool(columns["sequence_parallel"][0]), CONTEXTS_BY[columns["cp_by"][0]]
        return Layout(**above, sequence_parallel=together, cp_by=by, shard=self._shard)

    @property
    def _shard(self) -> int | None:
        """Some ranks, but not all, where any row shards over fewer than all."""
        columns = self.columns
        if (columns["shard"] == columns["dp"] * columns["cp"]).all():
            return None
        return 4 if (columns["shard"] > 1).any() else 1

    # --- seconds ----------------------------------------------------------------------------

    @cached_property
    def _steps(self) -> Steps:
        return Steps.of(replace(self.setting, layout=self.template))

    def seconds(self, columns: Columns, variations: Sequence[Variation]) -> Floats:
        """Seconds of a step of each row, by variation."""
        steps = [self._steps.step(v.zero, v.recompute, v.schedule, v.offload) for v in variations]
        run = compiled([step.tree().total for step in steps], SIZES)
        named = sizes(self.space, columns)
        return in_chunks(run, [named[name] for name in SIZES], len(steps))

    # --- bytes ------------------------------------------------------------------------------

    def bytes_needed(
        self, columns: Columns, schedule: ScheduleName, states: tuple[State, ...]
    ) -> Floats:
        """Bytes of each row's fullest stage, by state: on an accelerator, then on its host.

        None are given for hosts where no state offloads.
        """
        most_chunks = self.space.arch.n_layers + 1
        shapes, shape_of = np.unique(
            columns["pp"] * most_chunks + columns["virtual"], return_inverse=True
        )
        pairs = [divmod(int(shape), most_chunks) for shape in shapes]
        shares = [self.space.shares(pp, virtual, schedule) for pp, virtual in pairs]
        named = sizes(self.space, columns)
        offloads = any(offload != "none" for *_, offload in states)
        most = np.zeros((len(shape_of), (1 + offloads) * len(states)))
        for stages in stages_by_content(shares):
            there = np.isin(np.arange(len(shapes)), list(stages.stage))
            rows = np.flatnonzero(there[shape_of])
            of_layout = {name: array[rows] for name, array in named.items()}
            looked_up = _by_shape(stages, len(shapes))
            arrays = {**of_layout, **{n: table[shape_of[rows]] for n, table in looked_up.items()}}
            arrays |= self._in_flight(schedule, arrays)
            run, over = self._stage(stages.content, schedule in PUT_OFF, states)
            found = in_chunks(run, [arrays[name] for name in over], most.shape[1])
            most[rows] = np.maximum(most[rows], found)
        return most

    def _in_flight(self, schedule: ScheduleName, arrays: Mapping[str, Floats]) -> dict[str, Floats]:
        """What is in flight, by the names of `SYMBOLS`."""
        layout = replace(self.template, schedule=schedule)
        flight = in_flight(layout, shards_of(layout), 0, 1)
        found = [getattr(flight, field.name) or number(0) for field in fields(flight)]
        over = (*SIZES, "stage")
        columns = in_chunks(compiled(found, over), [arrays[n] for n in over], len(found))
        return dict(zip(SYMBOLS, columns.T, strict=True))

    @cached_property
    def _stage(
        self,
    ) -> Callable[[Content, bool, tuple[State, ...]], tuple[Compiled, tuple[str, ...]]]:
        """Bytes of one kind of stage by what is in flight, and the names of all they depend on."""
        root = describe(self.job.arch, self.job.work)

        @cache
        def stage(
            content: Content, waits: bool, states: tuple[State, ...]
        ) -> tuple[Compiled, tuple[str, ...]]:
            own, mirrored, embedded, outputs, put_off = map(Symbol, SYMBOLS)
            flight = Flight(own, mirrored, embedded, outputs, put_off if waits else None)
            away = [state for state in states if any(s[2] != "none" for s in states)]
            held = memory_training_varied(
                self.job, root, self.template, content.share, flight, states
            )
            host = host_training_varied(self.job, root, self.template, content.share, flight, away)
            over = (*SIZES, *SYMBOLS, *content.counts)
            return compiled([tree.total for tree in [*held, *host]], over), over

        return stage


#: What `Flight` has, as a formula of memory names it.
SYMBOLS = ("in_flight", "in_flight_mirrored", "embedded", "outputs", "put_off")


def _by_shape(stages: Stages, n_shapes: int) -> dict[str, Floats]:
    """What differs from shape to shape, as tables."""
    found = {
        shape: {"stage": rank, **stages.content.counted(stages.shares[shape])}
        for shape, rank in stages.stage.items()
    }
    return {
        name: np.array(
            [found.get(shape, {}).get(name, 0) for shape in range(n_shapes)], dtype=float
        )
        for name in ("stage", *stages.content.counts)
    }
