"""Pipelines: which layers a stage runs. Whoever cuts a model into stages asks here."""

from __future__ import annotations

from functools import cache

from isoflop.errors import Problem
from isoflop.quantity import Expr, ceil_div


def layers_of_stage(n_layers: int, pp: int, stage: int, virtual: int = 1) -> tuple[int, ...]:
    """Indices of the layers on pipeline stage `stage`, first to last.

    Layers are cut into pp x virtual chunks; a stage has every pp-th chunk (Narayanan 2021,
    2104.04473, section 2.2). Where they do not divide, the chunks at the two ends have one
    layer fewer, the last first, then the first, then inwards: the ends also hold the head and
    the embedding. So Llama 3 405B puts 126 layers on 16 stages (2407.21783, section 3.3.2), and
    Megatron-LM and torchtitan count embedding and head as a layer each.

    >>> [len(layers_of_stage(126, 16, stage)) for stage in (0, 1, 14, 15)]
    [7, 8, 8, 7]
    >>> layers_of_stage(7, pp=2, stage=0, virtual=2), layers_of_stage(7, pp=2, stage=1, virtual=2)
    ((0, 1, 4, 5), (2, 3, 6))
    """
    starts = _starts(n_layers, pp * virtual)
    chunks = range(stage, pp * virtual, pp)
    return tuple(i for c in chunks for i in range(starts[c], starts[c + 1]))


@cache
def _starts(n_layers: int, n_chunks: int) -> tuple[int, ...]:
    """Where each chunk begins, and where the last one ends."""
    most = -(-n_layers // n_chunks)
    inwards = sorted(range(n_chunks), key=lambda c: (min(c, n_chunks - 1 - c), -c))
    shorter = set(inwards[: most * n_chunks - n_layers])
    starts = [0]
    for chunk in range(n_chunks):
        starts.append(starts[-1] + most - (chunk in shorter))
    return tuple(starts)


def layers_fullest(n_layers: int, pp: Expr) -> Expr:
    """Layers of the stage that has most by `layers_of_stage`, however many chunks it has."""
    return ceil_div(n_layers, pp)


def layers_fullest_pair(n_layers: int, n_stages: Expr) -> Expr:
    """Layers of the fullest pair of stages, one as far from the first as the other from the last.

    >>> from isoflop.quantity import number
    >>> [layers_fullest_pair(n, number(4)).value for n in (8, 9, 10, 11)]
    [4, 5, 6, 6]
    """
    return ceil_div(n_layers, n_stages) + ceil_div(n_layers - 1, n_stages)


def layers_of_ends(n_layers: int, pp: Expr, virtual: Expr) -> tuple[Expr, Expr]:
    """Layers of the first stage and of the last by `layers_of_stage`.

    >>> from isoflop.quantity import number
    >>> [end.value for end in layers_of_ends(126, number(16), number(1))]
    [7, 7]
    """
    chunks = pp * virtual
    most = ceil_div(n_layers, chunks)
    shorter = most * chunks - n_layers
    behind = ceil_div(shorter, 2)
    before = shorter - behind
    first = most * virtual - ceil_div(before, pp) - _whole(behind, pp)
    return first, most * virtual - ceil_div(behind, pp) - _whole(before, pp)


def _whole(size: Expr, ways: Expr) -> Expr:
    """size / ways rounded down, both whole."""
    return ceil_div(size - ways + 1, ways)


def pipeline_rules(n_layers: int, pp: int, virtual: int) -> list[Problem]:
    """What a pipeline asks of the model: a layer for every chunk.

    >>> print(*pipeline_rules(12, pp=5, virtual=3))
    pp * virtual=15: must be at most n_layers=12
    """
    broken = []
    if pp * virtual > n_layers:
        field = "pp" if virtual == 1 else "pp * virtual"
        broken.append(Problem(field, pp * virtual, f"is at most n_layers={n_layers}"))
    if virtual > 1 and pp == 1:
        broken.append(Problem("virtual", virtual, "is 1 where pp is 1"))
    return broken
