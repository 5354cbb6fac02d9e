"""How fast one chip runs each kind of work inside a training step."""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction
from typing import Self

from isoflop.hardware import Chip
from isoflop.hardware.chip import Precision
from isoflop.hardware.fitted import Beliefs
from isoflop.hardware.stack import Stack
from isoflop.hardware.sustained import cores, share_attention, share_matmul
from isoflop.plan.step.constants import constants as constants_of
from isoflop.plan.step.setting import Compute
from isoflop.quantity import Expr, Symbol, maximum, number

#: The chip's format behind each way to compute, and bytes per operand with its scales:
#: mxfp8 has a byte of scale per 32 numbers, nvfp4 one per 16.
PEAK_OF: dict[Compute, Precision] = {
    "fp32": "fp32", "tf32": "tf32", "fp16": "fp16", "bf16": "bf16",
    "fp8": "fp8", "mxfp8": "fp8", "nvfp4": "fp4",
}  # fmt: skip
BYTES_OPERAND: dict[Compute, Fraction | int] = {
    "fp32": 4, "tf32": 4, "fp16": 2, "bf16": 2,
    "fp8": 1, "mxfp8": Fraction(33, 32), "nvfp4": Fraction(9, 16),
}  # fmt: skip
#: Formats that tensors are cast to before a product; activations are otherwise 16 bits.
CAST: frozenset[Compute] = frozenset({"fp8", "mxfp8", "nvfp4"})

#: Results that one core makes at once: cuBLAS's usual tile.
ELEMENTS_TILE = 128 * 256
#: Numbers that a row must be a multiple of for the matrix units: 16 bytes of 2
#: (NVIDIA, Matrix Multiplication Background User's Guide, section 3).
ALIGNED = 8
#: FLOPs of a flash kernel's backward over its forward: scores are made again
#: (Dao 2023, 2307.08691, section 4.1).
FLASH_BACKWARD = Fraction(5, 2)
#: Keys per query at which a causal kernel reaches half its rate on long sequences: 99, 133,
#: 155, 173, 182 of 192 TFLOP/s at 512 to 8192 on A100 and 163 to 308 of 330 on H100
#: (Dao-AILab/flash-attention, assets flash2_a100 and flash2_h100, read 2026-11).
KEYS_RAMP = 450
#: The same over the head's size: 284 TFLOP/s at 64 and 328 at 128 on H100, same source.
HEAD_RAMP = 24


@dataclass(frozen=True, slots=True)
class Rates:
    """FLOPs and bytes per second of one chip, and what its formats take."""

    layer: Expr
    full: Expr
    attention: Expr
    bandwidth: Expr
    bytes_operand: Expr
    casts: bool
    serial: Symbol
    wave: Expr
    unaligned: Expr

    @classmethod
    def of(cls, chip: Chip, compute: Compute, stack: Stack, beliefs: Beliefs) -> Self:
        constants = constants_of(beliefs)
        peak = PEAK_OF[compute]
        sixteen: Precision = "bf16" if compute in CAST else peak
        lasting = constants.share_sustained
        full = chip.peak(sixteen) * share_matmul(chip, sixteen, beliefs) * lasting
        kernel = stack.attention
        attention = (
            full
            if kernel == "unfused"
            else chip.peak(sixteen)
            * share_attention(chip, kernel, beliefs)
            * constants.share_attention
        )
        return cls(
            layer=chip.peak(peak) * share_matmul(chip, peak, beliefs) * lasting,
            full=full,
            attention=attention,
            bandwidth=chip.bytes_per_second_memory * constants.share_bandwidth,
            bytes_operand=number(BYTES_OPERAND[compute]),
            casts=compute in CAST,
            serial=constants.serial_memory,
            wave=2 * ELEMENTS_TILE * cores(chip) * constants.share_wave_idle,
            unaligned=chip.peak("fp32") * constants.share_unaligned,
        )

    def product(self, flops: Expr, depth: Expr, moved: Expr, rate: Expr) -> Expr:
        """Seconds of a matrix product: arithmetic, the idle end of its last wave, its traffic.

        `depth` is the length of the sums. A product's tiles run in waves over the chip's
        cores, and the last is part empty: that costs a share of one wave, whatever the
        product's size. The first loads and the last stores of a tile do not overlap with its
        arithmetic.
        """
        memory = moved / self.bandwidth
        work = (flops + self.wave * depth) / rate
        return maximum(work + self.serial * memory, memory)

    def move(self, moved: Expr) -> Expr:
        """Seconds that bytes take through memory."""
        return moved / self.bandwidth
