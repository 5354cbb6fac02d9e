"""How a model is laid out over a cluster, and which layouts are legal.

`broken_rules` is the one definition of legal: every other part of isoflop asks it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from fractions import Fraction
from typing import Any, Literal

from isoflop.arch import Arch, Attention, Dense, Experts
from isoflop.errors import Problem
from isoflop.hardware import Cluster
from isoflop.quantity.units import format_bytes


@dataclass(frozen=True, slots=True)
class Layout:
    """How one training step is split over accelerators.

    tp: tensor parallel; with `sequence_parallel`, what lies between the sharded matrices is
    split over the sequence (Korthikanti 2022, 2205.05198, section 4.2.2). pp: pipeline
    stages, each of `virtual` chunks of layers (Narayanan 2021, 2104.04473, section 2.2).
    cp: context parallel, each rank a part of every sequence. dp: data-parallel copies.
    ep: ranks that the experts are dealt over, out of dp x cp. zero: 1 splits the optimizer's
    state over dp x cp, 2 gradients too, 3 weights too (Rajbhandari 2020, 1910.02054).
    micro_batch: sequences that one copy works on at once.
    """

    tp: int = 1
    pp: int = 1
    dp: int = 1
    zero: Literal[0, 1, 2, 3] = 0
    micro_batch: int = 1
    cp: int = 1
    ep: int = 1
    virtual: int = 1
    sequence_parallel: bool = True

    @property
    def n_accelerators(self) -> int:
        return self.tp * self.pp * self.dp * self.cp

    def n_micro_batches(self, global_batch: int) -> int:
        """Micro-batches that each pipeline runs per step."""
        return global_batch // (self.dp * self.micro_batch)

    def bubble(self, global_batch: int) -> Fraction:
        """Idle time of a 1F1B pipeline over its ideal time (Narayanan 2021, 2104.04473, 2.2).

        >>> Layout(tp=8, pp=12, dp=4).bubble(global_batch=1536)
        Fraction(11, 384)
        """
        return Fraction(self.pp - 1, self.n_micro_batches(global_batch) * self.virtual)

    def __str__(self) -> str:
        """The sizes, leaving out what is as it is by default.

        >>> print(Layout(tp=8, pp=2, dp=4, cp=2))
        tp=8 pp=2 dp=4 zero=0 cp=2
        """
        text = f"tp={self.tp} pp={self.pp} dp={self.dp} zero={self.zero}"
        rest = ("cp", "ep", "virtual", "micro_batch")
        text += "".join(
            f" {name}={getattr(self, name)}" for name in rest if getattr(self, name) > 1
        )
        return text if self.sequence_parallel else f"{text} without sequence parallelism"

    def to_json(self) -> dict[str, int | bool]:
        return asdict(self)


@dataclass(frozen=True, slots=True)
class Refusal:
    """A legal layout that does not fit, by how much, and its largest part."""

    layout: Layout
    bytes_needed: int
    bytes_available: int
    largest: str
    largest_share: float

    @property
    def bytes_over(self) -> int:
        return self.bytes_needed - self.bytes_available

    def __str__(self) -> str:
        return (
            f"{self.layout}: {format_bytes(self.bytes_needed)} > "
            f"{format_bytes(self.bytes_available)}, largest part {self.largest} "
            f"{self.largest_share:.0%}"
        )

    def to_json(self) -> dict[str, Any]:
        return {
            "layout": self.layout.to_json(),
            "bytes_needed": self.bytes_needed,
            "bytes_available": self.bytes_available,
            "largest": self.largest,
            "largest_share": self.largest_share,
            "text": str(self),
        }


def broken_rules(layout: Layout, arch: Arch, cluster: Cluster, global_batch: int) -> list[Problem]:
    """The rules that a layout breaks; legal means none.

    >>> from isoflop.arch import gpt
    >>> from isoflop.hardware import parse_cluster
    >>> tiny = gpt("tiny", d_model=96, n_layers=6, n_heads=6, vocab_size=64, max_seq_len=8)
    >>> for problem in broken_rules(Layout(tp=4, pp=4), tiny, parse_cluster("16xh100-sxm"), 8):
    ...     print(problem)
    tp=4: must hold: divides n_heads=6 of layer
    pp=4: must hold: divides n_layers=6
    """
    sizes = ("tp", "pp", "dp", "micro_batch", "cp", "ep", "virtual")
    low = [Problem(f, getattr(layout, f), "is at least 1") for f in sizes if getattr(layout, f) < 1]
    if low:
        return low
    return [
        *tensor_rules(layout.tp, arch),
        *_rules_of_place(layout, cluster),
        *_rules_of_work(layout, arch, global_batch),
    ]


def tensor_rules(tp: int, arch: Arch) -> list[Problem]:
    """What tensor parallelism asks of the model: every sharded axis splits evenly.

    Key-value heads fewer than `tp` are copied, so one must divide the other.
    """
    broken = []
    for name, layer in arch.kinds.items():
        for axis, size in _sharded_axes(layer.attention, layer.feed_forward):
            if size % tp:
                broken.append(Problem("tp", tp, f"divides {axis}={size} of {name}"))
        if isinstance(layer.attention, Attention):
            kv = layer.attention.n_kv_heads
            if kv < layer.attention.n_heads and kv % tp and tp % kv:
                rule = f"divides n_kv_heads={kv} of {name}, or is divided by it"
                broken.append(Problem("tp", tp, rule))
    return broken


def _sharded_axes(attention: Any, feed_forward: Dense | Experts) -> Iterator[tuple[str, int]]:
    yield "n_heads", attention.n_heads
    match feed_forward:
        case Dense(d_ff=width):
            yield "d_ff", width
        case Experts(expert=expert, shared=shared):
            yield "d_ff of an expert", expert.d_ff
            if shared is not None:
                yield "d_ff of the shared experts", shared.d_ff


def _rules_of_place(layout: Layout, cluster: Cluster) -> list[Problem]:
    node = cluster.size_node
    rules = [
        ("tp", layout.tp, f"divides the {node} accelerators of a node", node % layout.tp == 0),
        ("layout", layout, f"uses at most {cluster.count} accelerators",
         layout.n_accelerators <= cluster.count),
    ]  # fmt: skip
    return [Problem(field, value, rule) for field, value, rule, holds in rules if not holds]


def _rules_of_work(layout: Layout, arch: Arch, global_batch: int) -> list[Problem]:
    per_step, chunks = layout.dp * layout.micro_batch, layout.pp * layout.virtual
    rules = [
        ("pp" if layout.virtual == 1 else "pp * virtual", chunks,
         f"divides n_layers={arch.n_layers}", arch.n_layers % chunks == 0),
        ("dp * micro_batch", per_step, f"divides global_batch={global_batch}",
         global_batch % per_step == 0),
        ("zero", layout.zero, "is 0, 1, 2 or 3", layout.zero in (0, 1, 2, 3)),
        ("virtual", layout.virtual, "is 1 where pp is 1", layout.virtual == 1 or layout.pp > 1),
        ("ep", layout.ep, f"divides dp * cp = {layout.dp * layout.cp}",
         layout.dp * layout.cp % layout.ep == 0),
    ]  # fmt: skip
    return [Problem(field, value, rule) for field, value, rule, holds in rules if not holds]


def legal_layouts(
    arch: Arch, cluster: Cluster, global_batch: int, micro_batch: int = 1
) -> tuple[Layout, ...]:
    """Every legal (tp, pp, ZeRO stage), each with as many data-parallel copies as fit.

    Fewer copies are legal too, and slower.
    """
    return tuple(
        layout
        for tp in _divisors(min(layer.attention.n_heads for layer in arch.kinds.values()))
        for pp in _divisors(arch.n_layers)
        if tp * pp <= cluster.count
        for layout in _with_copies(tp, pp, cluster, global_batch, micro_batch)
        if not broken_rules(layout, arch, cluster, global_batch)
    )


def _with_copies(
    tp: int, pp: int, cluster: Cluster, global_batch: int, micro_batch: int
) -> Iterator[Layout]:
    room = cluster.count // (tp * pp)
    dp = max(d for d in _divisors(max(1, global_batch // micro_batch)) if d <= room)
    yield Layout(tp, pp, dp, 0, micro_batch)
    if dp > 1:
        yield Layout(tp, pp, dp, 1, micro_batch)


def _divisors(whole: int) -> list[int]:
    """All divisors, ascending.

    >>> _divisors(12)
    [1, 2, 3, 4, 6, 12]
    """
    small = [d for d in range(1, int(whole**0.5) + 1) if whole % d == 0]
    return small + [whole // d for d in reversed(small) if d * d != whole]
