"""Seconds of what an accelerator's host does for it: copies over its link, and Adam."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

from isoflop.count import TRAINING_STATES
from isoflop.count.blocks import Part
from isoflop.count.memory_rank import Trained, keeping_of
from isoflop.count.memory_saved import FLASH, KERNELS
from isoflop.count.workload import Workload
from isoflop.hardware.stack import Stack
from isoflop.plan.memory.shard import shards_of
from isoflop.plan.step.constants import Constants
from isoflop.plan.step.setting import Setting
from isoflop.quantity import Expr, Node, Symbol, minimum, total

#: Bytes per weight that Adam reads and writes: master weight, two moments and gradient in
#: fp32 read, the first three written, and the 16-bit weight.
BYTES_WEIGHT = 2
BYTES_ADAM = 4 * 4 + 3 * 4 + BYTES_WEIGHT


def shown(work: Expr, beside: Expr, share: Expr) -> Expr:
    """What `beside` adds to `work` where all but `share` of the shorter of the two is hidden."""
    return beside - (1 - share) * minimum(work, beside)


@dataclass(frozen=True, slots=True)
class HostRates:
    """One accelerator's part of its host: bytes per second over the link, and of Adam."""

    link: Expr
    adam: Expr
    share_shown: Symbol

    @classmethod
    def of(cls, setting: Setting, use: Constants) -> Self:
        host = setting.cluster.chip.host
        assert host is not None, "no layout that offloads is legal without a host"
        each = Symbol("accelerators_per_host", host.chips, meaning="that share a host's memory")
        return cls(
            link=host.bytes_per_second_link * use.share_host_link,
            adam=host.bytes_per_second_memory * use.share_host_memory / each,
            share_shown=use.share_shown_offload,
        )

    def update(self, weights: Expr, bytes_grad: int) -> Expr:
        """The optimizer's step on the host: gradients out and weights back beside it.

        Ren 2021 (2101.06840), section 4.2: copies overlap with the update, bucket by bucket.
        """
        moved = weights * (bytes_grad + BYTES_WEIGHT) / self.link
        adam = weights * BYTES_ADAM / self.adam
        return adam + shown(adam, moved, self.share_shown)

    def copies(self, kept: Expr, layer: Node) -> Expr:
        """What copying `kept` bytes out beside a layer's forward pass and back beside the rest adds."""
        once = kept / self.link
        forward = layer.find("forward").total
        rest = total(part.total for part in layer.children if part.name != "forward")
        return total(shown(work, once, self.share_shown) for work in (forward, rest))


def bytes_kept(setting: Setting, stack: Stack, layer: Part) -> Expr:
    """What one layer keeps of one micro-batch on a rank; 8 and 4 bits multiply, 16 are kept."""
    state = TRAINING_STATES["fp32" if setting.compute in ("fp32", "tf32") else "bf16"]
    kernels = KERNELS["korthikanti"] if stack.attention == "unfused" else FLASH
    work = Workload.train(setting.layout.micro_batch, setting.seq_len)
    job = Trained(setting.arch, work, state, setting.recompute, kernels)
    return keeping_of(job, shards_of(setting.layout), layer).tree(layer).size
