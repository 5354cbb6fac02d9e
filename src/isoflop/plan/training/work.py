"""The work of a training run: its FLOPs by a named convention, and accelerator-seconds."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Literal, TypeAlias

from isoflop.arch import Arch
from isoflop.count import (
    TRAINING_STATES,
    Precision,
    TrainingState,
    Workload,
    flops_backward,
    flops_forward,
    params,
)
from isoflop.count.flops import BACKWARD
from isoflop.hardware import Chip
from isoflop.hardware.chip import Precision as Format
from isoflop.plan.assumed import UTILIZATION, choose
from isoflop.plan.memory.shard import Recompute
from isoflop.plan.roofline import Rates, Stored, seconds_forward
from isoflop.quantity import Expr, Node, Symbol, branch, leaf, number, total

#: Which work "the FLOPs of a run" counts. `model`: every matrix product and all scores, as
#: in PaLM's MFU (Chowdhery 2022, appendix B). `causal`: only the scores that the causal
#: mask leaves. `6nd`: 6 x active parameters x tokens, no scores (Kaplan 2020, 2.1).
Counting: TypeAlias = Literal["model", "causal", "6nd"]
COUNTINGS: tuple[Counting, ...] = ("model", "causal", "6nd")

#: How a run stores its state, by the precision it computes in.
STATES: dict[Format, TrainingState] = {
    "fp32": TRAINING_STATES["fp32"],
    "tf32": TRAINING_STATES["fp32"],
    "bf16": TRAINING_STATES["bf16"],
    "fp16": replace(TRAINING_STATES["bf16"], name="fp16", activation=Precision.FP16),
    "fp8": TRAINING_STATES["bf16"],
}


@dataclass(frozen=True, slots=True)
class Work:
    """What a run does, whatever it runs on.

    `tokens` are those that the decoder reads, in sequences of `seq_len`; beside each of them
    an encoder reads `source_len` tokens (None: as many), a vision tower `images`.
    """

    arch: Arch
    tokens: int
    seq_len: int
    convention: Counting = "model"
    recompute: Recompute = "none"
    source_len: int | None = None
    images: int = 1

    def batch(self, n_sequences: int, *, causal_skip: bool = False) -> Workload:
        """So many of its sequences at once."""
        plain = Workload.train(n_sequences, self.seq_len, causal_skip=causal_skip)
        return replace(plain, source_len=self.source_len, images=self.images)

    @property
    def flops(self) -> Node:
        """The model's own: forward and backward, over all tokens."""
        return self._counted(again=False)

    @property
    def flops_hardware(self) -> Node:
        """With what is run again: full recomputation repeats each layer's forward pass."""
        return self._counted(again=self.recompute == "full")

    @property
    def flops_6nd(self) -> Node:
        """The rule of thumb, whatever the convention."""
        tokens = Symbol("tokens", self.tokens)
        return leaf("flops_6nd", "flops", 6 * self._weights_met() * tokens)

    def _weights_met(self) -> Expr:
        """Active weights that one token of the decoder's meets: N.

        A tower's count as often as it reads tokens of its own for each of them.
        """
        tree, read = params(self.arch, active=True), self._tokens_read_beside()
        if not read:
            return tree.total
        ratios = {name: tokens / self.batch(1).T for name, tokens in read.items()}
        return total(node.total * ratios.get(node.name, number(1)) for node in tree.children)

    def _tokens_read_beside(self) -> dict[str, Expr]:
        """Tokens per sequence that each tower reads."""
        read: dict[str, Expr] = {}
        if self.arch.encoder is not None:
            read["encoder"] = self.batch(1).source
        if (tower := self.arch.vision) is not None:
            patches = (tower.image // tower.patch) ** 2 + tower.class_token
            read["vision"] = self.images * Symbol(
                "n_patches", patches, meaning="tokens of an image"
            )
        return read

    def _counted(self, *, again: bool) -> Node:
        times: Expr = Symbol("tokens", self.tokens, meaning="tokens trained on")
        if self.convention == "6nd":
            each = 2 * self._weights_met()
            forward = leaf("forward", "flops", each, source="2 N per token")
            backward = replace(forward, name="backward", times=number(BACKWARD))
            repeated = replace(forward, name="recompute")
        else:
            work = self.batch(1, causal_skip=self.convention == "causal")
            forward = replace(flops_forward(self.arch, work), name="forward")
            backward = replace(flops_backward(self.arch, work), name="backward")
            repeated = branch("recompute", "flops", _layers(self.arch, forward))
            times = times / work.T
        steps = [forward, backward]
        return branch("flops", "flops", [*steps, repeated] if again else steps, times=times)


def _layers(arch: Arch, forward: Node) -> Iterator[Node]:
    """The layers of a forward pass, those of a tower within it; the head is not among them."""
    towers = {"encoder": arch.encoder, "vision": arch.vision}
    for node in forward.children:
        tower = towers.get(node.name)
        if tower is not None:
            names = {layer.name for layer in tower.layers}
            yield branch(node.name, "flops", [c for c in node.children if c.name in names])
        elif node.name in arch.kinds:
            yield node


def accelerator_seconds(
    work: Work,
    chip: Chip,
    precision: Format,
    *,
    micro_batch: int = 1,
    mfu: float | None = None,
    tflops: float | None = None,
) -> Expr:
    """One accelerator's seconds for all of the work.

    `tflops` is its achieved rate in 10^12 hardware FLOPs per second, `mfu` the share of peak
    that the model's own FLOPs reach; with neither, the roofline times an assumed utilization.
    """
    peak = chip.peak(precision)
    if mfu is not None:
        return named("flops", work.flops) / (Symbol("mfu", mfu, source="given") * peak)
    hardware = named("flops_hardware", work.flops_hardware)
    if tflops is not None:
        return hardware / Symbol("flops_per_second_achieved", tflops * 1e12, source="given")
    batch = work.batch(micro_batch)
    stored = Stored(*3 * (STATES[precision].activation,))
    rates = Rates(peak, chip.bytes_per_second_memory)
    roofline = seconds_forward(work.arch, batch, rates, stored).total
    per_pass = named("flops_forward", flops_forward(work.arch, batch))
    return hardware / per_pass * roofline / choose(UTILIZATION, None)


def named(name: str, node: Node) -> Symbol:
    """A finished number under its own name, so that what is built on it stays readable.

    Only for nodes without uncertain parts: a name carries no range.
    """
    assert node.interval is None, f"{name} is uncertain"
    return Symbol(name, node.value, source=f"the tree {node.name!r} of this plan")


def sequences_per_step(tokens: float, seq_len: int, n_accelerators: int) -> int:
    """A batch of about 0.58 D^0.571 tokens, in sequences that share evenly over a cluster.

    The published batches lie near it: 3.2 M for GPT-3 (Brown 2020, table 2.1), 4 M growing to
    16 M for Llama 3 (2407.21783, section 3.4.1). The batch that trains best grows with the tokens seen, whatever the size (Step Law, Li
    2025, 2503.04715, equation 1). Taken to the nearest multiple of the accelerators by 2^k or
    3 x 2^k, so that micro-batches divide it, or, where they are more than the sequences, down
    to a divisor of their number.

    >>> sequences_per_step(15.6e12, 8192, 2048), sequences_per_step(1e11, 4096, 1000)
    (2048, 250)
    >>> sequences_per_step(3e10, 4096, 8) / 8
    16.0
    """
    wanted: float = 0.5807 * tokens**0.5709 / seq_len
    if wanted >= n_accelerators:
        share = wanted / n_accelerators
        even = [n << k for k in range(int(share).bit_length() + 1) for n in (1, 3)]
        return n_accelerators * min(even, key=lambda n: abs(n - share))
    divisors = [d for d in range(1, n_accelerators + 1) if n_accelerators % d == 0]
    return max(d for d in divisors if d <= max(1.0, wanted))
