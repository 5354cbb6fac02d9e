"""What training keeps per weight: gradients, fp32 copies and the optimizer's state."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeAlias

from isoflop.count.memory_weights import ENDS
from isoflop.count.workload import Precision
from isoflop.quantity import Expr, Symbol, ceil_div, number, total
from isoflop.quantity.expr import product


@dataclass(frozen=True, slots=True)
class Held:
    """The piece of one weight that a rank holds.

    `part` is the part of the model that it belongs to; `dealt` is set for the weights of
    experts, which expert parallelism deals out to ranks.
    """

    sizes: tuple[Expr, ...]
    part: str
    dealt: bool = False

    @property
    def size(self) -> Expr:
        return product(self.sizes)

    @property
    def is_matrix(self) -> bool:
        return len(self.sizes) == 2


@dataclass(frozen=True, slots=True)
class Sgd:
    """Stochastic gradient descent; momentum keeps one more number per weight."""

    momentum: bool = False

    def bytes_state(self, held: Held) -> Expr:
        return held.size * _moment(4) if self.momentum else number(0)


@dataclass(frozen=True, slots=True)
class Adam:
    """Two moments of each gradient (Kingma 2014, 1412.6980); bf16 ones take 2 bytes."""

    bytes_moment: int = 4

    def bytes_state(self, held: Held) -> Expr:
        return 2 * held.size * _moment(self.bytes_moment)


@dataclass(frozen=True, slots=True)
class Adam8bit:
    """Adam with moments in blocks of 256 8-bit numbers and an fp32 scale.

    Weights below 4,096 numbers keep fp32 moments (Dettmers 2021, 2110.02861, section 2;
    the threshold is bitsandbytes' `min_8bit_size`).
    """

    def bytes_state(self, held: Held) -> Expr:
        if held.size.value < 4096:
            return 2 * held.size * _moment(4)
        block = Symbol("moments_per_scale", 256, meaning="8-bit moments that share an fp32 scale")
        return 2 * (held.size * _moment(1) + 4 * ceil_div(held.size, block))


@dataclass(frozen=True, slots=True)
class Adafactor:
    """The second moment of a matrix by its row and column sums; no first moment.

    Vectors keep a full second moment (Shazeer 2018, 1804.04235, algorithm 4).
    """

    def bytes_state(self, held: Held) -> Expr:
        return (total(held.sizes) if held.is_matrix else held.size) * _moment(4)


@dataclass(frozen=True, slots=True)
class Muon:
    """One momentum for the matrices inside the layers; Adam for all else.

    Embedding, head and vectors go to Adam (Jordan 2024, kellerjordan.github.io/posts/muon).
    """

    def bytes_state(self, held: Held) -> Expr:
        hidden = held.is_matrix and held.part not in ENDS
        return held.size * _moment(4) if hidden else Adam().bytes_state(held)


Optimizer: TypeAlias = Adam | Adam8bit | Adafactor | Muon | Sgd

OPTIMIZERS: dict[str, Optimizer] = {
    "adam": Adam(),
    "adam-bf16": Adam(2),
    "adam-8bit": Adam8bit(),
    "adafactor": Adafactor(),
    "muon": Muon(),
    "sgd": Sgd(),
    "sgd-momentum": Sgd(momentum=True),
}


def _moment(size: int) -> Symbol:
    name = "bytes_per_moment" if size == 4 else f"bytes_per_moment_{8 * size}_bit"
    return Symbol(name, size, meaning="bytes of one number of the optimizer's state")


@dataclass(frozen=True, slots=True)
class TrainingState:
    """How a run stores its state: bytes per weight, and the optimizer.

    `master` are the fp32 copies kept beside the optimizer's state and sharded with it: the
    weights', and in one recipe the gradients'. `activation` is what activations are kept in.
    """

    name: str
    weights: int
    grads: int
    master: int
    activation: Precision
    source: str
    optimizer: Optimizer = Adam()

    def bytes_weights(self, held: Held) -> Expr:
        return held.size * Symbol("bytes_per_weight", self.weights)

    def bytes_grads(self, held: Held) -> Expr:
        return held.size * Symbol("bytes_per_grad", self.grads)

    def bytes_optimizer(self, held: Held) -> Expr:
        copies = [held.size * Symbol("bytes_master", self.master)] if self.master else []
        return total([*copies, self.optimizer.bytes_state(held)])


#: Adam's recipes by bytes per weight: 16, 16, 18, 20, and 8 where nothing is kept in fp32.
TRAINING_STATES = {
    s.name: s
    for s in (
        TrainingState("fp32", 4, 4, 0, Precision.FP32, "weights, gradients, m, v: all fp32"),
        TrainingState("bf16", 2, 2, 4, Precision.BF16,
                      "bf16 weights and gradients; fp32 master, m, v (Rajbhandari 2020, 1910.02054, 3.1)"),
        TrainingState("bf16-fp32-grads", 2, 4, 4, Precision.BF16,
                      "bf16 weights; fp32 gradients, master, m, v (Megatron-Core dist_optimizer.md)"),
        TrainingState("fp16-fp32-main-grads", 2, 2, 8, Precision.FP16,
                      "fp16 weights and gradients; fp32 copies of both, m, v "
                      "(Megatron-Core dist_optimizer.md)"),
        TrainingState("bf16-pure", 2, 2, 0, Precision.BF16,
                      "everything bf16, the moments too: torch.optim.AdamW on bf16 weights", Adam(2)),
    )
}  # fmt: skip
