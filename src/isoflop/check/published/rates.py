"""What publications mean by TFLOP/s and MFU, and the seconds of a step behind them.

Each source counts FLOPs its own way; a rate is turned into seconds by the convention of
its source and never by another.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from fractions import Fraction
from functools import cache

from isoflop.arch import Arch
from isoflop.check.published.table import Cells
from isoflop.count import FLOPS_CONVENTIONS, Workload
from isoflop.hardware.chip import Precision
from isoflop.plan.step.setting import Compute, Setting

TERA = 10**12


@dataclass(frozen=True, slots=True)
class Counted:
    """A convention of count/flops.py, `times` over; recomputation counted `times` more."""

    convention: str
    times: Fraction = Fraction(1)

    def flops(self, arch: Arch, tokens: int, seq_len: int) -> float:
        """FLOPs of one step over `tokens`."""
        return float(self.times) * tokens * _per_token(self.convention, arch, seq_len)


@cache
def _per_token(convention: str, arch: Arch, seq_len: int) -> float:
    work = Workload.train(1, seq_len)
    return float(FLOPS_CONVENTIONS[convention].count(arch, work).value) / seq_len


#: Conventions by source: of its model TFLOP/s and MFU, then of its hardware TFLOP/s and HFU.
#: megatron: Narayanan 2021 (2104.04473), equation 3, which Megatron-DeepSpeed prints too.
#: palm: 6 N + 12 L d s, as llm-foundry's table says. exact-causal is 6 (N - V d) + 6 L d s,
#: with which Megatron-Bridge's tables reproduce; exact, 6 (N - V d) + 12 L d s, those of
#: NeMo in 2024 (rows that state tokens per second beside TFLOP/s tell the two apart).
CONVENTIONS: dict[str, tuple[str, str]] = {
    "megatron-2021": ("megatron-model", "megatron"),
    "korthikanti-2022": ("megatron-model", "megatron"),
    "bloom-tr11": ("megatron-model", "megatron"),
    "llm-foundry": ("palm", ""),
    "megatron-bridge": ("exact-causal", ""),
    "nemo-docs": ("exact", ""),
}

#: What a share of peak is a share of.
PEAK: dict[Compute, Precision] = {"mxfp8": "fp8", "nvfp4": "fp4"}


@dataclass(frozen=True, slots=True)
class Rate:
    """A stated rate of one accelerator, in FLOP/s, and FLOPs per step as its source counts."""

    column: str
    flops_per_second: float
    flops_step: float


def stated_rates(cells: Cells, setting: Setting) -> tuple[Rate, ...]:
    """The FLOP/s that a row states, those whose convention is known."""
    family = cells.text("source_family")
    if cells.text("task").casefold() == "sft":
        return ()  # NeMo's tables of fine-tuning count no scores, and packing is not stated
    found = []
    for column, part in COLUMNS.items():
        value = cells.real(column)
        counted = _counted(family, part, setting)
        if value is not None and counted is not None:
            flops = counted.flops(setting.arch, setting.tokens_per_step, setting.seq_len)
            found.append(Rate(column, value * _unit(column, setting), flops))
    return tuple(found)


#: Columns of rates, and which of a source's two conventions each is in.
COLUMNS: Mapping[str, int] = {
    "model_tflops_per_gpu": 0,
    "hw_tflops_per_gpu": 1,
    "mfu_pct": 0,
    "hfu_pct": 1,
}


def _counted(family: str, part: int, setting: Setting) -> Counted | None:
    if family == "bigscience-v100":  # 2 N per token and pass, 4 passes with recomputation
        passes = Fraction(4, 3) if setting.recompute == "full" else Fraction(1)
        return Counted("6n", passes)
    name = CONVENTIONS.get(family, ("", ""))[part]
    if family == "llm-foundry" and part == 1:
        return Counted("palm", Fraction(4, 3) if setting.recompute == "full" else Fraction(1))
    if family == "korthikanti-2022" and part == 1 and setting.recompute != "full":
        return None
    if name == "megatron" and setting.recompute != "full":
        name = "megatron-model"
    return Counted(name) if name else None


def _unit(column: str, setting: Setting) -> float:
    if column.endswith("_pct"):
        precision = PEAK.get(setting.compute, setting.compute)
        return float(setting.cluster.chip.peak(precision).value) / 100  # type: ignore[arg-type]
    return TERA


def seconds_step(cells: Cells, setting: Setting, rates: tuple[Rate, ...]) -> float | None:
    """Seconds of a step: stated, or from tokens per second, or from the first stated rate."""
    stated, tokens = cells.real("step_time_s"), cells.real("tokens_per_s_per_gpu")
    if stated is not None:
        return stated
    n = setting.cluster.count
    if tokens is not None:
        return setting.tokens_per_step / (n * tokens)
    if not rates:
        return None
    first = rates[0]
    cells.assume(f"step_time_s: from {first.column} by its source's convention")
    return first.flops_step / (n * first.flops_per_second)
