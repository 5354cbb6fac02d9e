"""Where the width of predicted ranges comes from: which uncertain numbers, and what would pin them."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from isoflop.check.published.score import Judged

#: The largest parts that are told.
MOST_TOLD = 3

#: What would tell most of a number, by the beginning of its name.
PINNED = {
    "residual_": "three steps of one's own: isoflop calibrate --from",
    "error_of_": "nothing: single steps lie so far from any fit",
    "share_matmul_": "a large matrix product timed on the chip",
    "share_attention": "attention timed inside a step",
    "share_flash": "the attention kernel timed alone",
    "share_cudnn": "the attention kernel timed alone",
    "share_sustained": "matrix products timed for minutes on a warm chip",
    "share_bandwidth": "a copy timed on the chip",
    "share_link": "collectives timed inside a machine",
    "share_network": "collectives timed across machines",
    "share_shown_": "a trace of a step: traffic beside work",
    "share_sorting_": "the permutation of tokens timed alone",
    "share_unaligned": "products of heads that are no multiple of 8, timed alone",
    "share_wave_idle": "matrix products of many sizes, timed alone",
    "share_elementwise_": "norms and activations timed in the trainer",
    "serial_memory": "matrix products of many depths, timed alone",
    "seconds_host_": "a trace of the host",
    "expert_imbalance_": "the router's loads",
}


@dataclass(frozen=True, slots=True)
class Part:
    """One number's share of the squared width, and what would pin it ("" where not known)."""

    name: str
    share: float
    pinned_by: str

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def width_from(rows: Sequence[Judged]) -> tuple[Part, ...]:
    """The numbers that the ranges of these rows come from, largest first, on the rows' average.

    >>> row = Judged("a", "f", "g", "m", "seconds", 1.0, 1.0, widths=(("share_link", 0.03), ("x", 0.01)))
    >>> [(part.name, part.share) for part in width_from([row])]
    [('share_link', 0.75), ('x', 0.25)]
    """
    shares: dict[str, float] = defaultdict(float)
    told = [row for row in rows if row.widths]
    for row in told:
        whole = sum(squared for _, squared in row.widths)
        for name, squared in row.widths:
            shares[name] += squared / whole / len(told)
    ordered = sorted(shares.items(), key=lambda item: -item[1])
    return tuple(Part(name, share, pinned_by(name)) for name, share in ordered)


def pinned_by(name: str) -> str:
    """What would pin a number.

    >>> pinned_by("share_matmul_fp8_gb200")
    'a large matrix product timed on the chip'
    """
    return next((how for start, how in PINNED.items() if name.startswith(start)), "")
