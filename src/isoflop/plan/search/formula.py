"""The formulas of a plan compiled to arrays: bytes of a stage and seconds of a step.

Structure branches in Python, so there is one function per structure: for each schedule, for each
stage that differs from others in what it holds, and for steps with and without sequence
parallelism. Sizes of the layout are its arguments; it gives one result for each variation of one
schedule, and what variations share is computed once.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from functools import cache, cached_property, reduce
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from isoflop.count.blocks import describe
from isoflop.plan.layout import Layout
from isoflop.plan.memory.flight import Flight, Share, in_flight
from isoflop.plan.memory.shard import Trained, memory_training_varied, shards_of
from isoflop.plan.schedule import ScheduleName
from isoflop.plan.search.space import Columns, Space, Variation
from isoflop.plan.step.seconds import Steps
from isoflop.plan.step.setting import Setting
from isoflop.plan.step.sizes import SIZES
from isoflop.quantity import Expr, Symbol, number
from isoflop.quantity.compile import compile_expressions

Floats = NDArray[np.float64]

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
        used = columns["tp"] * columns["pp"] * columns["dp"] * columns["cp"]
        wide = 2 * domain if used.max() > domain else 2
        many = {"tp": 2, "ep": 2, "virtual": 2, "pp": wide, "dp": wide, "cp": wide}
        above: dict[str, Any] = {
            name: most if (columns[name] > 1).any() else 1  # type: ignore[index]
            for name, most in many.items()
        }
        return Layout(**above, sequence_parallel=bool(columns["sequence_parallel"][0]))

    # --- seconds ----------------------------------------------------------------------------

    @cached_property
    def _steps(self) -> Steps:
        return Steps.of(replace(self.setting, layout=self.template))

    def seconds(self, columns: Columns, variations: Sequence[Variation]) -> Floats:
        """Seconds of a step of each row, by variation."""
        steps = [self._steps.step(v.zero, v.recompute, v.schedule) for v in variations]
        run = compiled([step.tree().total for step in steps], SIZES)
        named = sizes(self.space, columns)
        return in_chunks(run, [named[name] for name in SIZES], len(steps))

    # --- bytes ------------------------------------------------------------------------------

    def bytes_needed(self, columns: Columns, schedule: ScheduleName) -> Floats:
        """Bytes of each row's fullest stage, by ZeRO stage and recomputation."""
        pairs = np.stack([columns["pp"], columns["virtual"]], axis=1)
        shapes, shape_of = np.unique(pairs, axis=0, return_inverse=True)
        shape_of = shape_of.reshape(-1)
        shares = [self.space.shares(pp, virtual, schedule) for pp, virtual in shapes.tolist()]
        named = sizes(self.space, columns)
        most = np.zeros((len(shape_of), len(self.space.states)))
        for stages in _stages_unlike(shares):
            rows = np.flatnonzero(np.isin(shape_of, list(stages.stage)))
            of_layout = {name: array[rows] for name, array in named.items()}
            looked_up = _by_shape(stages, len(shapes))
            arrays = {**of_layout, **{n: table[shape_of[rows]] for n, table in looked_up.items()}}
            arrays |= self._in_flight(schedule, arrays)
            run, over = self._stage(stages.content, schedule in PUT_OFF)
            found = in_chunks(run, [arrays[name] for name in over], len(self.space.states))
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
    def _stage(self) -> Callable[[Content, bool], tuple[Callable[..., Any], tuple[str, ...]]]:
        """Bytes of one kind of stage by what is in flight, and the names of all they depend on."""
        root = describe(self.job.arch, self.job.work)

        @cache
        def stage(content: Content, waits: bool) -> tuple[Callable[..., Any], tuple[str, ...]]:
            own, mirrored, embedded, outputs, put_off = map(Symbol, SYMBOLS)
            flight = Flight(own, mirrored, embedded, outputs, put_off if waits else None)
            trees = memory_training_varied(
                self.job, root, self.template, content.share, flight, self.space.states
            )
            over = (*SIZES, *SYMBOLS, *_counts(content))
            return compiled([tree.total for tree in trees], over), over

        return stage


#: What `Flight` has, as a formula of memory names it.
SYMBOLS = ("in_flight", "in_flight_mirrored", "embedded", "outputs", "put_off")
#: Schedules that put weights' gradients off.
PUT_OFF = frozenset({"zb-h1", "zb-h2", "dualpipe", "dualpipev"})


class Content(NamedTuple):
    """What a rank holds, but for how many layers of each kind."""

    first: bool
    last: bool
    kinds: tuple[str, ...]
    mirrored: tuple[str, ...]

    @classmethod
    def of(cls, share: Share) -> Content:
        return cls(
            share.first, share.last, tuple(sorted(share.layers)), tuple(sorted(share.mirrored))
        )

    @property
    def share(self) -> Share:
        """Of one layer of each kind; how many there are is put in later."""
        own, mirrored = (dict.fromkeys(kinds, 1) for kinds in (self.kinds, self.mirrored))
        return Share(own, mirrored, self.first, self.last)


class Stages(NamedTuple):
    """Stages of equal content, one for each shape of pipeline: its index and its layers."""

    content: Content
    stage: dict[int, int]
    shares: dict[int, Share]


def _counts(content: Content) -> tuple[str, ...]:
    """The names of how many layers of each kind there are."""
    own = [f"n_{kind}_stage" for kind in content.kinds]
    return (*own, *(f"n_{kind}_mirror" for kind in content.mirrored))


def _by_shape(stages: Stages, n_shapes: int) -> dict[str, Floats]:
    """What differs from shape to shape, as tables."""
    tables: dict[str, dict[int, int]] = {"stage": stages.stage}
    for kind in stages.content.kinds:
        tables[f"n_{kind}_stage"] = {i: own.layers[kind] for i, own in stages.shares.items()}
    for kind in stages.content.mirrored:
        tables[f"n_{kind}_mirror"] = {i: own.mirrored[kind] for i, own in stages.shares.items()}
    return {
        name: np.array([table.get(shape, 0) for shape in range(n_shapes)], dtype=float)
        for name, table in tables.items()
    }


def _stages_unlike(shapes: Sequence[Mapping[int, Share]]) -> Iterable[Stages]:
    """The stages of every shape that may hold most, those of equal content together.

    A shape with two stages of one content (of eight and of seven layers) comes twice.
    """
    found: dict[tuple[Content, int], Stages] = {}
    for shape, shares in enumerate(shapes):
        met: Counter[Content] = Counter()
        for rank, share in shares.items():
            content = Content.of(share)
            key = content, met[content]
            met[content] += 1
            one = found.setdefault(key, Stages(content, {}, {}))
            one.stage[shape], one.shares[shape] = rank, share
    return found.values()
