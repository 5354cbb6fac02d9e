"""Feed-forwards: dense ones and mixtures of experts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, TypeAlias

from isoflop.arch.rules import Rules

#: gelu_quick is x sigmoid(1.702 x) (CLIP). silu_clamped is GPT-OSS's gated unit: the gate g
#: and the other factor u are clamped at 7, and g sigmoid(1.702 g) (u + 1) is passed on.
Activation: TypeAlias = Literal[
    "relu", "gelu", "gelu_tanh", "gelu_quick", "silu", "silu_clamped", "relu_squared"
]


@dataclass(frozen=True, slots=True)
class Dense:
    """Two matrices, or three when `gated` (SwiGLU is silu gated, GeGLU gelu gated)."""

    d_ff: int
    activation: Activation = "gelu"
    gated: bool = False
    bias: bool = False
    dropout: float = 0.0
    kind: Literal["dense"] = "dense"

    def __post_init__(self) -> None:
        Rules(self).size("d_ff").one_of("activation", Activation).share("dropout").close()


@dataclass(frozen=True, slots=True)
class Experts:
    """A mixture of experts: each token goes to `n_active` of `n_experts`.

    `shared` is read by every token, `shared_gate` scales it by a learned gate
    (Qwen2-MoE). `router_bias` is a trained bias on the router's scores, `score_correction`
    the auxiliary-loss-free correction that is a buffer, not a weight (DeepSeek-V3).

    With `n_groups` experts are chosen from the `n_active_groups` best groups; a group is worth
    its best expert (DeepSeek-V2), with a `score_correction` its best two (DeepSeek-V3).
    """

    n_experts: int
    n_active: int
    expert: Dense
    shared: Dense | None = None
    shared_gate: bool = False
    router_bias: bool = False
    score_correction: bool = False
    score: Literal["softmax", "sigmoid"] = "softmax"
    normalize: bool = True
    scale: float = 1.0
    n_groups: int = 1
    n_active_groups: int = 1
    kind: Literal["experts"] = "experts"

    def __post_init__(self) -> None:
        rules = (
            Rules(self).size("n_experts").size("n_active").size("n_groups").size("n_active_groups")
        )
        if not rules.broken:
            rules.must("n_active", f"is at most n_experts={self.n_experts}",
                       self.n_active <= self.n_experts)  # fmt: skip
            rules.divides("n_groups", "n_experts")
            rules.must("n_active_groups", f"is at most n_groups={self.n_groups}",
                       self.n_active_groups <= self.n_groups)  # fmt: skip
        if not rules.broken:
            open_to_choice = self.n_active_groups * (self.n_experts // self.n_groups)
            rules.must("n_active", f"is at most {open_to_choice}, the experts of the active groups",
                       self.n_active <= open_to_choice)  # fmt: skip
        rules.must("shared_gate", "is False where nothing is shared",
                   self.shared is not None or not self.shared_gate)  # fmt: skip
        rules.close()


FeedForward: TypeAlias = Dense | Experts
