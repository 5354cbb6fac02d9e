"""What each parallelism sends in a training step: bytes per rank, and seconds on a fabric.

Two folds over one list of messages (message.py). The seconds are of the messages one after
the other: what hides behind compute is not said here.
"""

from __future__ import annotations

from collections.abc import Callable

from isoflop.hardware.fabric import Fabric, fabric_of
from isoflop.plan.network.exchange import DEFAULT, Exchange
from isoflop.plan.step.job import Groups
from isoflop.plan.step.message import Message, messages, settled
from isoflop.plan.step.setting import Setting
from isoflop.quantity import Basis, Expr, Node, branch, leaf


def communication(setting: Setting, exchange: Exchange = DEFAULT) -> Node:
    """Bytes that a rank sends in a step, by parallelism.

    Sources: tensor parallelism Shoeybi 2019 (1909.08053), section 3, and with sequence
    parallelism Korthikanti 2022 (2205.05198), section 4.2.2; ZeRO Rajbhandari 2020
    (1910.02054), section 7; experts Lepikhin 2020 (2006.16668), section 3.

    >>> from isoflop.arch import gpt
    >>> from isoflop.hardware import parse_cluster
    >>> from isoflop.plan.layout import Layout
    >>> small = gpt("gpt2", d_model=768, n_layers=12, n_heads=12, vocab_size=50257, max_seq_len=1024)
    >>> step = Setting(small, parse_cluster("8xa100-sxm-80gb"), Layout(dp=8, micro_batch=4), 1024, 64)
    >>> communication(step).value == 2 * 7 * 2 * 124_439_808 // 8
    True
    """
    around = settled(setting, fabric_of(setting.cluster))
    return _tree("bytes_sent", "bytes", setting, exchange, around, lambda m: m.bytes_sent(around))


def seconds_communication(
    setting: Setting, fabric: Fabric | None = None, exchange: Exchange = DEFAULT
) -> Node:
    """Seconds of all messages of a step one after the other, by parallelism.

    `fabric` brings other constants than those of benchmarks.

    Raises:
        InputError: a group spans domains and the chip's network is not stated.
    """
    chosen = fabric_of(setting.cluster) if fabric is None else fabric
    around = settled(setting, chosen)
    return _tree("seconds_communication", "seconds", setting, exchange, around,
                 lambda m: m.seconds(around, chosen))  # fmt: skip


def _tree(
    name: str,
    unit: str,
    setting: Setting,
    exchange: Exchange,
    around: Groups,
    measure: Callable[[Message], Expr],
) -> Node:
    """Messages to anyone, measured and nested by their paths."""
    heard = [
        m
        for m in messages(setting, exchange)
        if around[m.dimension].size.value != 1 and m.times.value
    ]
    basis = Basis.EXACT if unit == "bytes" else Basis.MODELLED
    leaves = [(m.path.split("/"), measure(m), m.times) for m in heard]
    return _nested(name, unit, leaves, basis)


def _nested(name: str, unit: str, leaves: list[tuple[list[str], Expr, Expr]], basis: Basis) -> Node:
    below: dict[str, list[tuple[list[str], Expr, Expr]]] = {}
    for (first, *rest), size, times in leaves:
        below.setdefault(first, []).append((rest, size, times))
    children = [
        _nested(part, unit, found, basis)
        if found[0][0]
        else leaf(part, unit, found[0][1], times=found[0][2], basis=basis)
        for part, found in below.items()
    ]
    return branch(name, unit, children)
