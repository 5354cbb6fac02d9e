"""What a server is asked to do: the model, the machine, the requests, how all is stored."""

from __future__ import annotations

from dataclasses import dataclass

from isoflop.arch import Arch
from isoflop.count import Precision
from isoflop.count.blocks import beside
from isoflop.count.memory_weights import FORMATS, Format, format_of
from isoflop.errors import InputError, Problem
from isoflop.hardware import Chip, Cluster
from isoflop.hardware.chip import Precision as Computed
from isoflop.plan.ask import at_most, one_of, whole
from isoflop.plan.assumed import (
    EFFICIENCY_BANDWIDTH,
    EFFICIENCY_COMPUTE,
    SECONDS_ALL_REDUCE,
    SECONDS_LAYER,
    choose,
)
from isoflop.plan.economics import unstated
from isoflop.plan.memory.room import Request
from isoflop.plan.roofline import Rates, Stored, Waits

#: What products run in where weights are stored in a plain precision.
_PLAIN: dict[str, Computed] = {"fp32": "fp32", "fp16": "fp16", "bf16": "bf16"}
#: A limit of this many seconds is none.
LONGEST = 10**6


@dataclass(frozen=True, slots=True)
class Asked:
    """The question that a serving plan answers; `plan_serve` explains each part."""

    arch: Arch
    cluster: Cluster
    input_tokens: int
    output_tokens: int
    batch: int | None = None
    precision: Format | str = "bf16"
    kv_precision: Precision | str | None = None
    page: int | None = None
    tp: int | None = None
    ttft: float | None = None
    tpot: float | None = None
    price: float | None = None
    efficiency_compute: float | None = None
    efficiency_bandwidth: float | None = None
    seconds_layer: float | None = None
    seconds_all_reduce: float | None = None

    def check(self) -> None:
        """Refuse what cannot be planned.

        Raises:
            InputError: one problem for each number out of bounds, or a precision that the
                chip does not compute in.
        """
        named = isinstance(self.precision, str)
        limits = [
            problem
            for field in ("ttft", "tpot", "seconds_layer", "seconds_all_reduce")
            for problem in at_most(field, getattr(self, field), LONGEST, "a million seconds")
        ]
        bad = [
            *beside(self.arch, "is none: plans are made for decoders"),
            *_check_lengths(self.arch, self.input_tokens, self.output_tokens),
            *([] if self.batch is None else whole("batch", self.batch, 10**9)),
            *([] if self.page is None else whole("page", self.page, 10**6)),
            *(one_of("precision", str(self.precision), tuple(FORMATS)) if named else []),
            *one_of("kv_precision", self.kv_precision or "bf16", tuple(Precision)),
            *at_most("efficiency_compute", self.efficiency_compute, 1, "all of the peak"),
            *at_most("efficiency_bandwidth", self.efficiency_bandwidth, 1, "all of the bandwidth"),
            *limits,
            *unstated(self.cluster.chip, price=self.price),
        ]
        if bad:
            raise InputError("plan serve", bad)
        self.cluster.chip.peak(self.compute)

    @property
    def compute(self) -> Computed:
        """What products run in: fp8 where weights are so and the chip can, else 16 or 32 bits.

        int8 and int4 are storage: products run in 16 bits, of the kind that the chip has.
        """
        chip, name = self.cluster.chip, format_of(self.precision).name
        if name == "fp8" and "fp8" in chip.peaks:
            return "fp8"
        return _PLAIN.get(name) or _half(chip)

    @property
    def stored(self) -> Stored:
        """Activations and, unless said otherwise, the cache take 16 bits; all of fp32 takes 32."""
        how = format_of(self.precision)
        working = Precision(_PLAIN.get(how.name) or _half(self.cluster.chip))
        return Stored(how, working, Precision(self.kv_precision or working))

    @property
    def request(self) -> Request:
        return Request(self.arch, self.cluster.chip, self.stored, self.input_tokens,
                       self.output_tokens, self.page)  # fmt: skip

    @property
    def rates(self) -> Rates:
        """Of one accelerator."""
        chip = self.cluster.chip
        return Rates(
            chip.peak(self.compute) * choose(EFFICIENCY_COMPUTE, self.efficiency_compute),
            chip.bytes_per_second_memory * choose(EFFICIENCY_BANDWIDTH, self.efficiency_bandwidth),
        )

    def waits(self, tp: int) -> Waits:
        """What one step waits for beside the memory, split over `tp` accelerators."""
        return Waits(
            choose(SECONDS_LAYER, self.seconds_layer),
            None if tp == 1 else choose(SECONDS_ALL_REDUCE, self.seconds_all_reduce),
        )


def _half(chip: Chip) -> Computed:
    """The 16-bit floats that the chip multiplies."""
    return "bf16" if "bf16" in chip.peaks else "fp16"


def _check_lengths(arch: Arch, input_tokens: int, output_tokens: int) -> list[Problem]:
    bad = [
        *whole("input_tokens", input_tokens, arch.max_seq_len),
        *whole("output_tokens", output_tokens, arch.max_seq_len),
    ]
    if not bad and input_tokens + output_tokens > arch.max_seq_len:
        rule = f"with input_tokens is at most max_seq_len={arch.max_seq_len}"
        bad.append(Problem("output_tokens", output_tokens, rule))
    return bad
