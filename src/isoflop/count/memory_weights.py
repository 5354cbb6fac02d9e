"""Stored weights: plain precisions, and quantised formats with their scales."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TypeAlias

from isoflop.arch.spec import Arch
from isoflop.count.blocks import Part, Weight, describe
from isoflop.count.params import has_weights
from isoflop.count.workload import Precision, Workload
from isoflop.errors import UnknownName
from isoflop.quantity import Basis, Expr, Node, Symbol, branch, ceil_div, leaf, number, total

#: Parts at the ends of a model.
ENDS = frozenset({"embedding", "head"})
#: What quantisers leave alone: the ends, and a vision tower with its projector.
UNQUANTISED = ENDS | {"vision"}


@dataclass(frozen=True, slots=True)
class Scale:
    """One constant of `bits` for every `group` weights."""

    bits: int
    group: int


@dataclass(frozen=True, slots=True)
class Format:
    """How a model's weights are stored.

    `bits` per weight and `scales` on top for the matrices inside the layers. Everything
    else (embedding, head, vision tower, norms, biases) has 16 bits where `ends` is False, as quantisers
    leave it; `head` says that the head is quantised all the same.

    >>> FORMATS["int4"].bits_per_weight, round(FORMATS["nf4-dq"].bits_per_weight, 3)
    (4.125, 4.127)
    """

    name: str
    bits: int
    scales: tuple[Scale, ...] = ()
    ends: bool = True
    source: str = ""
    head: bool = False

    @property
    def bits_per_weight(self) -> float:
        """Of a quantised matrix, scales included."""
        return self.bits + sum(scale.bits / scale.group for scale in self.scales)

    @property
    def basis(self) -> Basis:
        """What is left in 16 bits is a habit of quantisers, not arithmetic on the spec."""
        return Basis.EXACT if self.ends else Basis.ASSUMED

    def bytes_of(self, weight: Weight, held: Expr, *, inside: bool) -> Expr:
        """Bytes of `held` numbers of a weight, `inside` a layer or at the model's ends."""
        return self.bytes_held(held, quantised=inside and weight.multiplies)

    def bytes_held(self, held: Expr, *, quantised: bool) -> Expr:
        """Bytes of `held` numbers, `quantised` where they are of a matrix inside a layer."""
        if not self.ends and not quantised:
            return held * Precision.BF16.bytes_each
        name = self.name.replace("-", "_")
        size = Symbol(f"bits_{name}", self.bits, meaning=f"bits of one {self.name} weight")
        stored = held * size / 8 if self.bits % 8 else held * _bytes(name, self.bits // 8)
        return total([stored, *(_bytes_scale(held, scale) for scale in self.scales)])


def _bytes(name: str, size: int) -> Expr:
    return Symbol(f"bytes_{name}", size, meaning=f"bytes of one {name}")


def _bytes_scale(held: Expr, scale: Scale) -> Expr:
    group = Symbol(f"weights_per_{scale.bits}_bit_scale", scale.group, Basis.ASSUMED,
                   meaning=f"weights that share one constant of {scale.bits} bits")  # fmt: skip
    return ceil_div(held, group) * number(scale.bits) / 8


_QUANTISED = "; embedding, head, vision, norms and biases stay in 16 bits"
#: The formats by name; those of `Precision` mean these.
FORMATS = {
    f.name: f
    for f in (
        Format("fp32", 32),
        Format("bf16", 16),
        Format("fp16", 16),
        Format("fp8", 8, (), False, "8-bit floats, one scale per tensor (not counted)" + _QUANTISED),
        Format("int8", 8, (), False,
               "one scale per output channel, below 0.1 % and not counted (Dettmers 2022, 2208.07339)"
               + _QUANTISED),
        Format("int4", 4, (Scale(16, 128),), False,
               "groups of 128 with a 16-bit scale, 4.125 bits (Lin 2023, 2306.00978)" + _QUANTISED),
        Format("int4-zero", 4, (Scale(32, 128),), False,
               "groups of 128 with a 16-bit scale and zero point, 4.25 bits (Frantar 2022, 2210.17323)"
               + _QUANTISED),
        Format("nf4", 4, (Scale(32, 64),), False,
               "blocks of 64 with a 32-bit scale, 4.5 bits (Dettmers 2023, 2305.14314)" + _QUANTISED),
        Format("nf4-dq", 4, (Scale(8, 64), Scale(32, 64 * 256)), False,
               "blocks of 64 with an 8-bit scale, and a 32-bit one per 256 of those, 4.127 bits "
               "(Dettmers 2023, 2305.14314, section 3)" + _QUANTISED),
    )
}  # fmt: skip

Stored: TypeAlias = Precision | Format | str


def format_of(stored: Stored) -> Format:
    """The format meant by a precision or a name.

    Raises:
        UnknownName: no format has that name.

    >>> format_of("nf4").bits_per_weight
    4.5
    """
    if isinstance(stored, Format):
        return stored
    if stored not in FORMATS:
        raise UnknownName("format", stored, FORMATS, f"choose one of {', '.join(FORMATS)}")
    return FORMATS[stored]


def bytes_weights(arch: Arch, stored: Stored) -> Node:
    """Stored weights by path.

    Raises:
        UnknownName: no format has that name.

    >>> from isoflop.arch import gpt
    >>> gpt2 = gpt("gpt2", d_model=768, n_layers=12, n_heads=12, vocab_size=50257, max_seq_len=1024)
    >>> bytes_weights(gpt2, Precision.FP16).value
    248879616
    >>> bytes_weights(gpt2, "int4").find("layer/feed_forward/up").size.digits
    '768 * 3072 * 4 / 8 + ceil_div(768 * 3072, 128) * 16 / 8 + 3072 * 2'
    """
    root, how = describe(arch, Workload(1, 1, 1)), format_of(stored)
    left = UNQUANTISED - {"head"} if how.head else UNQUANTISED
    children = [_fold(part, how, inside=part.name not in left) for part in _weighty(root.parts)]
    return branch("bytes_weights", "bytes", children, source=how.source)


def _fold(part: Part, how: Format, *, inside: bool) -> Node:
    if part.parts:
        children = [_fold(p, how, inside=inside) for p in _weighty(part.parts)]
        return branch(part.name, "bytes", children, times=part.times)
    size = total(how.bytes_of(w, w.size, inside=inside) for w in part.weights)
    return leaf(part.name, "bytes", size, times=part.times, basis=how.basis, source=how.source)


def _weighty(parts: Iterable[Part]) -> list[Part]:
    return [part for part in parts if has_weights(part)]
