"""Settings whose formulas are the same but for the sizes put in: built and compiled once."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

from isoflop.hardware.fabric import fabric_of
from isoflop.plan.layout import Layout
from isoflop.plan.step.setting import Setting
from isoflop.plan.step.sizes import SIZES, Sizes
from isoflop.quantity import Expr
from isoflop.quantity.compile import compile_expressions


def structure(setting: Setting) -> tuple[object, ...]:
    """What the formulas of a step branch on, the model and its machine aside."""
    layout = setting.layout
    sizes = (layout.tp, layout.pp, layout.dp, layout.cp, layout.ep, layout.virtual)
    leaves_domain = layout.n_accelerators > fabric_of(setting.cluster).domain
    above = tuple(size > 1 for size in sizes)
    return (layout.zero, layout.sequence_parallel, setting.recompute, layout.schedule, above,
            leaves_domain, _sharded(layout), layout.offload, layout.cp_by)  # fmt: skip


def _sharded(layout: Layout) -> tuple[bool, ...]:
    """Who has someone to talk to: all that hold one weight or expert, and within a part of them."""
    copies, ep, shard = layout.dp * layout.cp, layout.ep, layout.shard
    everywhere = (copies > ep,)
    return everywhere if shard is None else (*everywhere, shard > 1, shard > ep, copies > shard)


def evaluated(
    settings: Sequence[Setting],
    formulas: Callable[[Setting], Sequence[Expr]],
    over: Sequence[str] = (),
) -> list[Callable[..., tuple[Any, ...]]]:
    """The formulas of each setting as a function of `over`, its sizes put in."""
    run = {key: compile_expressions(formulas(first), [*SIZES, *over])
           for key, first in _firsts(settings)}  # fmt: skip
    return [_with_sizes(run[structure(setting)], setting) for setting in settings]


def _firsts(settings: Sequence[Setting]) -> Iterator[tuple[object, Setting]]:
    """One setting of each structure."""
    yield from {structure(setting): setting for setting in reversed(settings)}.items()


def _with_sizes(run: Callable[..., tuple[Any, ...]], setting: Setting) -> Callable[..., Any]:
    symbols = Sizes.of(setting)
    sizes = [getattr(symbols, name).value for name in SIZES]
    return lambda *values: run(*sizes, *values)
