"""The formulas of a plan compiled to arrays: bytes of a stage and seconds of a step.

Structure branches in Python, so there is one function per structure: for each stage that
differs from others in what it holds, and for steps with and without sequence parallelism. Sizes
of the layout are its arguments; it gives one result for each variation, and what variations share is
computed once.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import reduce
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from isoflop.count.blocks import describe
from isoflop.count.made import Made
from isoflop.count.memory_split import CONTEXTS_BY
from isoflop.plan.layout import Layout
from isoflop.plan.memory.formula import Content, stages_by_content
from isoflop.plan.memory.shard import Trained, host_training_held, memory_training_held
from isoflop.plan.search.space import Columns, Space, Variation, n_accelerators
from isoflop.plan.step.seconds import step_time
from isoflop.plan.step.setting import Setting
from isoflop.plan.step.sizes import SIZES
from isoflop.quantity import Expr
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


def templates(space: Space, columns: Columns, variations: Sequence[Variation]) -> list[Layout]:
    """Of each variation a layout with the structure of all rows: what is above 1 in any of them is.

    It leaves one domain of fast links if any row does.
    """
    domain = space.cluster.per_node or space.cluster.chip.per_node
    used = n_accelerators(columns)
    wide = 2 * domain if used.max() > domain else 2
    many = {"tp": 2, "ep": 2, "virtual": 2, "pp": wide, "dp": 4 * wide, "cp": wide}
    above: dict[str, Any] = {
        name: most if (columns[name] > 1).any() else 1  # type: ignore[index]
        for name, most in many.items()
    }
    together, by = bool(columns["sequence_parallel"][0]), CONTEXTS_BY[columns["cp_by"][0]]
    shard = _shard(columns)
    return [
        Layout(**above, zero=v.zero, sequence_parallel=together, cp_by=by,
               shard=shard if v.zero else None, offload=v.offload)
        for v in variations
    ]  # fmt: skip


def _shard(columns: Columns) -> int | None:
    """Some ranks, but not all, where any row shards over fewer than all."""
    if (columns["shard"] == columns["dp"] * columns["cp"]).all():
        return None
    return 4 if (columns["shard"] > 1).any() else 1


# --- seconds --------------------------------------------------------------------------------


def seconds(
    space: Space, setting: Setting, columns: Columns, variations: Sequence[Variation]
) -> Floats:
    """Seconds of a step of rows that share a structure, by variation."""
    made = Made()
    trees = [
        step_time(replace(setting, layout=layout, recompute=v.recompute), made=made)
        for layout, v in zip(templates(space, columns, variations), variations, strict=True)
    ]
    run = compiled([tree.total for tree in trees], SIZES)
    named = sizes(space, columns)
    return in_chunks(run, [named[name] for name in SIZES], len(trees))


# --- bytes ----------------------------------------------------------------------------------


class Stages(NamedTuple):
    """Stages of equal content, one for each shape of pipeline: its index and its layers."""

    content: Content
    stage: dict[int, int]
    layers: dict[int, Counter[str]]


def bytes_needed(
    space: Space, job: Trained, columns: Columns, variations: Sequence[Variation]
) -> tuple[Floats, Floats]:
    """Bytes of the fullest stage of rows that share a structure, by variation.

    On each accelerator, and of each in its host's memory.
    """
    most_chunks = space.arch.n_layers + 1
    shapes, shape_of = np.unique(
        columns["pp"] * most_chunks + columns["virtual"], return_inverse=True
    )
    pairs = [divmod(int(shape), most_chunks) for shape in shapes]
    run = _Compiled(job, templates(space, columns, variations), variations)
    named = sizes(space, columns)
    offloads = any(v.offload != "none" for v in variations)
    most = np.zeros((len(shape_of), (1 + offloads) * len(variations)))
    for stages in _stages_unlike(space, pairs):
        there = np.isin(np.arange(len(shapes)), list(stages.stage))
        rows = np.flatnonzero(there[shape_of])
        function, over = run.stage(stages.content), stages.content.over
        looked_up = _by_shape(stages, len(shapes))
        of_layout = {name: array[rows] for name, array in named.items()}
        arrays = {**of_layout, **{n: table[shape_of[rows]] for n, table in looked_up.items()}}
        found = in_chunks(function, [arrays[name] for name in over], most.shape[1])
        most[rows] = np.maximum(most[rows], found)
    held = most[:, : len(variations)]
    return held, most[:, len(variations) :] if offloads else np.zeros_like(held)


class _Compiled:
    """Bytes of each kind of stage as a function of arrays, compiled once."""

    def __init__(
        self, job: Trained, layouts: Sequence[Layout], variations: Sequence[Variation]
    ) -> None:
        self.ways = [
            (replace(job, recompute=v.recompute), layout)
            for layout, v in zip(layouts, variations, strict=True)
        ]
        self.root = describe(job.arch, job.work)
        self._known: dict[Content, Callable[..., Any]] = {}

    def stage(self, content: Content) -> Callable[..., Any]:
        """The function, of the sizes in `content.over`."""
        if content not in self._known:
            self._known[content] = compiled(list(self._formulas(content)), content.over)
        return self._known[content]

    def _formulas(self, content: Content) -> Iterator[Expr]:
        """Bytes on an accelerator in every way, then on its host in those that offload."""
        made = Made()
        for held in (memory_training_held, host_training_held):
            for job, layout in self.ways:
                if held is memory_training_held or layout.offload != "none":
                    yield content.formula(job, self.root, layout, held, made).total


def _by_shape(stages: Stages, n_shapes: int) -> dict[str, Floats]:
    """What differs from shape to shape, as tables."""
    tables = {"stage": stages.stage}
    for kind in stages.content.kinds:
        tables[f"n_{kind}_stage"] = {shape: own[kind] for shape, own in stages.layers.items()}
    return {
        name: np.array([table.get(shape, 0) for shape in range(n_shapes)], dtype=float)
        for name, table in tables.items()
    }


def _stages_unlike(space: Space, shapes: list[tuple[int, int]]) -> Iterator[Stages]:
    """The stages of every shape that may hold most, those of equal content together.

    A shape with two stages of one content (of eight and of seven layers) comes twice.
    """
    found: dict[tuple[Content, int], Stages] = {}
    for shape, (pp, virtual) in enumerate(shapes):
        met: Counter[Content] = Counter()
        for stage, content, kinds in stages_by_content(space.arch, pp, virtual):
            key = content, met[content]
            met[content] += 1
            one = found.setdefault(key, Stages(content, {}, {}))
            one.stage[shape], one.layers[shape] = stage, kinds
    yield from found.values()
