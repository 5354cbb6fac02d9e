"""One training configuration: everything that the time of its step depends on."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal, TypeAlias

from isoflop.arch import Arch
from isoflop.count.memory_saved import Recompute
from isoflop.hardware import Cluster
from isoflop.hardware.fitted import Beliefs, shipped
from isoflop.plan.layout import Layout

#: What the matrix products of layers compute in. fp8: one scale per tensor; mxfp8 and
#: nvfp4: one per block of 32 and of 16 numbers. Scores and the head stay in 16 bits.
Compute: TypeAlias = Literal["fp32", "tf32", "fp16", "bf16", "fp8", "mxfp8", "nvfp4"]


@dataclass(frozen=True, slots=True)
class Setting:
    """A model on a cluster under a layout, one step of `global_batch` sequences.

    `beliefs` are the uncertain numbers of chips and software as they are known: those that
    isoflop was fitted to, or a user's own. `stack` names the trainer's software with its release, as in `hardware/stacks.toml`
    (`megatron-core-0.8`, `llm-foundry`, `unknown`).
    """

    arch: Arch
    cluster: Cluster
    layout: Layout
    seq_len: int
    global_batch: int
    compute: Compute = "bf16"
    recompute: Recompute = "none"
    stack: str = "unknown"
    beliefs: Beliefs = field(default_factory=shipped)

    @property
    def tokens_per_step(self) -> int:
        return self.global_batch * self.seq_len

    @property
    def n_micro_batches(self) -> int:
        """Micro-batches that each pipeline runs per step."""
        return self.layout.n_micro_batches(self.global_batch)
