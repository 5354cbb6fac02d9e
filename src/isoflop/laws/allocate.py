"""How a law would split a budget, and how far a known model is from that split."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from isoflop.laws.form import FLOPS_PER_PARAM_TOKEN, Allocation, Law, require


@dataclass(frozen=True, slots=True)
class Standing:
    """A trained model beside what a law would have done with the same compute.

    Attributes:
        optimum: the law's own split of `flops`.
        tokens_wanted: the tokens at which this size would be the optimal one.
    """

    params: float
    tokens: float
    flops: float
    loss: float
    optimum: Allocation
    tokens_wanted: float

    @property
    def undertrained(self) -> float:
        """How many times more tokens this size wanted; below 1 it was overtrained."""
        return self.tokens_wanted / self.tokens

    @property
    def loss_given_up(self) -> float:
        """The loss above what the same compute would have reached, in the law's unit."""
        return self.loss - self.optimum.loss

    def to_json(self) -> dict[str, object]:
        return {
            "params": self.params,
            "tokens": self.tokens,
            "tokens_per_param": self.tokens / self.params,
            "flops": self.flops,
            "loss": self.loss,
            "optimum": self.optimum.to_json(),
            "tokens_wanted": self.tokens_wanted,
            "undertrained": self.undertrained,
            "loss_given_up": self.loss_given_up,
        }


def standing(
    law: Law,
    params: float,
    tokens: float,
    flops_per_param_token: float = FLOPS_PER_PARAM_TOKEN,
) -> Standing:
    """Where a model of `params` parameters trained on `tokens` tokens stands under `law`.

    `params` are counted as `law.params_convention` says.

    >>> from isoflop.laws.published import find_law
    >>> gpt3 = standing(find_law("besiroglu-2024"), params=174.6e9, tokens=300e9)
    >>> round(gpt3.undertrained, 1), round(gpt3.loss_given_up, 3)
    (10.2, 0.016)
    """
    require(law.name, params=params, tokens=tokens)
    flops = flops_per_param_token * params * tokens
    return Standing(
        params=params,
        tokens=tokens,
        flops=flops,
        loss=law.loss(params, tokens),
        optimum=law.optimum(flops, flops_per_param_token),
        tokens_wanted=law.tokens_for(params),
    )


def allocation_table(law: Law, budgets_flops: Iterable[float]) -> tuple[Allocation, ...]:
    """The law's optimum at each training budget, in FLOPs.

    >>> from isoflop.laws.published import find_law
    >>> rows = allocation_table(find_law("besiroglu-2024"), [1e21, 1e24])
    >>> [round(row.tokens_per_param) for row in rows]
    [22, 18]
    """
    return tuple(law.optimum(flops) for flops in budgets_flops)
