"""The processors beside the accelerators: what can be kept in their memory, and how fast it moves."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from isoflop.errors import InputError, Problem
from isoflop.quantity import Symbol


@dataclass(frozen=True, slots=True)
class Host:
    """One machine's processors and their memory.

    Attributes:
        chips: accelerators that share it.
        bytes_per_second_link: between one accelerator and host memory, one direction.
        bytes_memory: of the machine, as its modules are sold, before any program runs.
        bytes_per_second_memory: of all its processors together, reads and writes.

    Raises:
        InputError: no chips, or a number that is not above zero.
    """

    name: str
    chips: int
    bytes_per_second_link: Symbol
    bytes_memory: Symbol
    bytes_per_second_memory: Symbol

    def __post_init__(self) -> None:
        broken = [
            Problem(symbol.name, symbol.given, "is above 0")
            for symbol in self.numbers()
            if symbol.given is None or not symbol.given > 0
        ]
        if self.chips < 1:
            broken.append(Problem("chips", self.chips, "is at least 1"))
        if broken:
            raise InputError(self.name, broken)

    def numbers(self) -> Iterator[Symbol]:
        """Every number stated of the host."""
        yield self.bytes_per_second_link
        yield self.bytes_memory
        yield self.bytes_per_second_memory
