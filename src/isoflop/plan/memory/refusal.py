"""A layout that a memory has no room for."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from isoflop.count.memory_saved import Recompute
from isoflop.plan.layout import Layout
from isoflop.quantity.units import format_bytes


@dataclass(frozen=True, slots=True)
class Refusal:
    """A legal layout that does not fit, by how much, and its largest part.

    `recompute` is what it would have made again; `of` says whose memory is too small: that of
    an accelerator, or of its host.
    """

    layout: Layout
    bytes_needed: int
    bytes_available: int
    largest: str
    largest_share: float
    recompute: Recompute = "none"
    of: Literal["accelerator", "host"] = "accelerator"

    @property
    def bytes_over(self) -> int:
        return self.bytes_needed - self.bytes_available

    def __str__(self) -> str:
        again = "" if self.recompute == "none" else f" recompute={self.recompute}"
        return (
            f"{self.layout}{again}: {format_bytes(self.bytes_needed)} > "
            f"{format_bytes(self.bytes_available)}{' of a host' if self.of == 'host' else ''}, "
            f"largest part {self.largest} "
            f"{self.largest_share:.0%}"
        )

    def to_json(self) -> dict[str, Any]:
        return {
            "layout": self.layout.to_json(),
            "recompute": self.recompute,
            "bytes_needed": self.bytes_needed,
            "bytes_available": self.bytes_available,
            "largest": self.largest,
            "largest_share": self.largest_share,
            "of": self.of,
            "text": str(self),
        }
