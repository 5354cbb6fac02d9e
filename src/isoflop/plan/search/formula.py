"""The formulas of a plan compiled to arrays: bytes of a stage and seconds of a step.

Structure branches in Python, so there is one function per structure: for each schedule, for each
stage that differs from others in what it holds, and for steps with and without sequence
parallelism. Sizes of the layout are its arguments; it gives one result for each variation of one
schedule, and what variations share is computed once.
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
from isoflop.plan.layout import Layout
from isoflop.plan.memory.flight import Share, ranks_unlike, share_of
from isoflop.plan.memory.shard import Trained, memory_training_held
from isoflop.plan.search.space import Columns, Space, Variation
from isoflop.plan.step.seconds import step_times
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


def template(space: Space, columns: Columns, variation: Variation) -> Layout:
    """A layout with the structure of all rows: what is above 1 in any of them is.

    It leaves one domain of fast links if any row does.
    """
    domain = space.cluster.per_node or space.cluster.chip.per_node
    used = columns["tp"] * columns["pp"] * columns["dp"] * columns["cp"]
    wide = 2 * domain if used.max() > domain else 2
    many = {"tp": 2, "ep": 2, "virtual": 2, "pp": wide, "dp": wide, "cp": wide}
    above: dict[str, Any] = {
        name: most if (columns[name] > 1).any() else 1  # type: ignore[index]
        for name, most in many.items()
    }
    together = bool(columns["sequence_parallel"][0])
    return Layout(
        **above, zero=variation.zero, sequence_parallel=together, schedule=variation.schedule
    )


# --- seconds --------------------------------------------------------------------------------


def seconds(
    space: Space, setting: Setting, columns: Columns, variations: Sequence[Variation]
) -> Floats:
    """Seconds of a step of rows that share a structure, by variation."""
    first = replace(setting, layout=template(space, columns, variations[0]))
    trees = step_times(first, [(v.zero, v.recompute, v.schedule) for v in variations])
    run = compiled([tree.total for tree in trees], SIZES)
    named = sizes(space, columns)
    return in_chunks(run, [named[name] for name in SIZES], len(trees))


# --- bytes ----------------------------------------------------------------------------------


class Content(NamedTuple):
    """What a stage holds, but for how many layers of each kind."""

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


def bytes_needed(
    space: Space, job: Trained, columns: Columns, variations: Sequence[Variation]
) -> Floats:
    """Bytes of the fullest stage of rows that share a structure, by variation of one schedule."""
    pairs = np.stack([columns["pp"], columns["virtual"]], axis=1)
    shapes, shape_of = np.unique(pairs, axis=0, return_inverse=True)
    named = sizes(space, columns)
    most = np.zeros((len(shape_of), len(variations)))
    layouts = [
        Layout(pp=int(pp), virtual=int(v), schedule=variations[0].schedule) for pp, v in shapes
    ]
    for stages in _stages_unlike(space, layouts):
        rows = np.flatnonzero(np.isin(shape_of, list(stages.stage)))
        run, over = _stage(space, job, columns, stages.content, variations)
        looked_up = _by_shape(stages, len(shapes))
        of_layout = {name: array[rows] for name, array in named.items()}
        arrays = {**of_layout, **{n: table[shape_of[rows]] for n, table in looked_up.items()}}
        found = in_chunks(run, [arrays[name] for name in over], len(variations))
        most[rows] = np.maximum(most[rows], found)
    return most


def _stage(
    space: Space, job: Trained, columns: Columns, content: Content, variations: Sequence[Variation]
) -> tuple[Callable[..., Any], tuple[str, ...]]:
    """Bytes of one kind of stage, and the names of what they depend on."""
    root = describe(job.arch, job.work)
    trees = [
        memory_training_held(
            replace(job, recompute=v.recompute), root, template(space, columns, v), content.share
        )
        for v in variations
    ]
    over = (*SIZES, "stage", *_counts(content))
    return compiled([tree.total for tree in trees], over), over


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


def _stages_unlike(space: Space, layouts: Sequence[Layout]) -> Iterator[Stages]:
    """The stages of every shape that may hold most, those of equal content together.

    A shape with two stages of one content (of eight and of seven layers) comes twice.
    """
    found: dict[tuple[Content, int], Stages] = {}
    for shape, layout in enumerate(layouts):
        met: Counter[Content] = Counter()
        for rank in ranks_unlike(space.arch, layout):
            share = share_of(space.arch, layout, rank)
            content = Content.of(share)
            key = content, met[content]
            met[content] += 1
            one = found.setdefault(key, Stages(content, {}, {}))
            one.stage[shape], one.shares[shape] = rank, share
    yield from found.values()
