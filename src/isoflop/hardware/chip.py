"""An accelerator, as its vendor describes it: the same few numbers for every kind."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, TypeAlias, get_args

from isoflop.errors import InputError, Problem
from isoflop.hardware.host import Host
from isoflop.hardware.join import Join
from isoflop.quantity import Expr, Symbol
from isoflop.quantity.node import plain

Precision: TypeAlias = Literal["fp32", "tf32", "fp16", "bf16", "fp8", "int8", "fp4"]
PRECISIONS: tuple[Precision, ...] = get_args(Precision)


@dataclass(frozen=True, slots=True)
class Chip:
    """One accelerator.

    Attributes:
        peaks: dense FLOP/s by precision (integer operations per second for int8); the
            2:4 sparse figures of datasheets are never used. A precision that the chip
            does not compute in is absent.
        bytes_memory: what the driver reports as total, before any program runs.
        bytes_per_second_memory: of the chip's own memory.
        bytes_per_second_link: to the other chips of its node, one direction, all links
            of one chip together; None for a chip that stands alone.
        bytes_per_second_network: to chips of other nodes, one direction, per chip.
        per_node: how many chips the fast link joins; for a TPU, a full pod.
        watts: of one chip at its rated limit, without its host.
        dollars_per_hour: the rent of one chip, on demand, with the range seen.
        joined: how the fast link joins chips; None for a chip that stands alone.
        host: the processors of the machine that it usually comes in.

    Network, watts, price and host are None where nobody states them; what needs one asks for it.

    Raises:
        InputError: a number is not above zero, a precision is unknown, or chips are joined
            by a link of no speed.
    """

    name: str
    vendor: str
    year: int
    peaks: Mapping[Precision, Symbol] = field(hash=False)
    bytes_memory: Symbol
    bytes_per_second_memory: Symbol
    bytes_per_second_link: Symbol | None
    bytes_per_second_network: Symbol | None
    per_node: int
    watts: Symbol | None
    dollars_per_hour: Symbol | None
    joined: Join | None = None
    host: Host | None = None

    def __post_init__(self) -> None:
        broken = [
            Problem(symbol.name, symbol.given, "is above 0")
            for symbol in self.numbers()
            if symbol.given is None or not symbol.given > 0
        ]
        broken += [
            Problem("peaks", name, f"is one of {', '.join(PRECISIONS)}")
            for name in self.peaks
            if name not in PRECISIONS
        ]
        if not self.peaks:
            broken.append(Problem("peaks", "none", "has at least one precision"))
        if self.per_node < 1:
            broken.append(Problem("per_node", self.per_node, "is at least 1"))
        if self.per_node > 1 and self.bytes_per_second_link is None:
            rule = "is 1 where no link is stated"
            broken.append(Problem("per_node", self.per_node, rule))
        if (self.joined is None) != (self.bytes_per_second_link is None):
            rule = "is stated where a link is, and only there"
            broken.append(Problem("joined", self.joined, rule))
        if broken:
            raise InputError(self.name, broken)

    def peak(self, precision: Precision) -> Symbol:
        """Dense FLOP/s in `precision`.

        Raises:
            InputError: the chip does not compute in it; the hint lists those it does.
        """
        if precision not in self.peaks:
            rule = f"is a precision that {self.name} computes in"
            hint = f"choose one of {', '.join(self.peaks)}"
            raise InputError(self.name, [Problem("precision", precision, rule, hint)])
        return self.peaks[precision]

    def ridge(self, precision: Precision) -> Expr:
        """FLOPs per byte of memory traffic above which compute is the limit.

        >>> from isoflop.hardware import find
        >>> round(float(find("a100-sxm-80gb").ridge("bf16").value))
        153
        """
        return self.peak(precision) / self.bytes_per_second_memory

    def numbers(self) -> Iterator[Symbol]:
        """Every number stated of the chip, with what it is and where it comes from."""
        yield from self.peaks.values()
        yield self.bytes_memory
        yield self.bytes_per_second_memory
        yield from (number for number in self._optional().values() if number is not None)
        if self.host is not None:
            yield from self.host.numbers()

    def not_stated(self) -> tuple[str, ...]:
        """Names of the numbers that nobody states.

        >>> from isoflop.hardware import find
        >>> find("m3-ultra").not_stated()
        ('bytes_per_second_link', 'bytes_per_second_network', 'dollars_per_hour', 'host')
        """
        absent = [name for name, number in self._optional().items() if number is None]
        return (*absent, *(["host"] if self.host is None else []))

    def _optional(self) -> dict[str, Symbol | None]:
        names = ("bytes_per_second_link", "bytes_per_second_network", "watts", "dollars_per_hour")
        return {name: getattr(self, name) for name in names}

    def to_json(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "vendor": self.vendor,
            "year": self.year,
            "per_node": self.per_node,
            "numbers": {symbol.name: number_json(symbol) for symbol in self.numbers()},
            "not_stated": list(self.not_stated()),
        }


def number_json(symbol: Symbol) -> dict[str, Any]:
    """A number of the catalogue as plain data."""
    out: dict[str, Any] = {
        "value": plain(symbol.value),
        "basis": symbol.basis.value,
        "source": symbol.source,
    }
    if symbol.spread is not None:
        out["interval"] = symbol.spread.to_json()
    if symbol.meaning:
        out["note"] = symbol.meaning
    return out
