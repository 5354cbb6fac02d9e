"""The best split of a budget that also pays for serving, or that repeats its data.

* Serving: a budget pays 6 N for each training token and 2 N for each token served, so a
  model that serves much is best smaller and trained longer (Sardana 2024, 2401.00448).
* Few data: tokens seen again are worth less each time, and so are parameters beyond what
  the unique tokens can use (Muennighoff 2023, 2305.16264, section 3.1 and appendix A).

With neither, the split is the law's own closed form.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from isoflop.errors import Infeasible, InputError, Problem
from isoflop.laws.form import FLOPS_PER_PARAM_TOKEN, Allocation, Law, require

#: FLOPs of a forward pass per parameter and token: Kaplan 2020 (2001.08361), section 2.1.
FLOPS_PER_PARAM_TOKEN_SERVED = 2.0

#: After so many repetitions, further tokens (further parameters) are worth 1 / e of new ones:
#: the fit of 182 runs of Muennighoff 2023 (2305.16264), unrounded in huggingface/datablations.
REPEATS_TOKENS, REPEATS_PARAMS = 15.387756, 5.309743


@dataclass(frozen=True, slots=True)
class Demand:
    """What a model is for: the tokens it will serve, and the unique tokens there are.

    Raises:
        InputError: served tokens that are negative or not finite, unique ones not above 0.
    """

    tokens_served: float = 0.0
    tokens_unique: float = math.inf

    def __post_init__(self) -> None:
        bad = []
        if not 0 <= self.tokens_served < math.inf:
            bad.append(Problem("tokens_served", self.tokens_served, "is at least 0 and finite"))
        if not self.tokens_unique > 0:
            bad.append(Problem("tokens_unique", self.tokens_unique, "is above 0"))
        if bad:
            raise InputError("demand", bad)

    @property
    def plain(self) -> bool:
        """Nothing is served and data have no end."""
        return not self.tokens_served and math.isinf(self.tokens_unique)

    def flops(self, params: float, tokens: float) -> float:
        """Training and serving together."""
        train = FLOPS_PER_PARAM_TOKEN * params * tokens
        return train + FLOPS_PER_PARAM_TOKEN_SERVED * params * self.tokens_served

    def tokens(self, params: float, flops: float) -> float:
        """Training tokens that `flops` pay for, less what serving takes; negative where none."""
        served = FLOPS_PER_PARAM_TOKEN_SERVED * params * self.tokens_served
        return (flops - served) / (FLOPS_PER_PARAM_TOKEN * params)

    def loss(self, law: Law, params: float, tokens: float) -> float:
        """The loss of `params` trained on `tokens`, of which only the unique ones are new.

        >>> from isoflop.laws.published import find_law
        >>> few = Demand(tokens_unique=25e9)
        >>> round(few.loss(find_law("muennighoff-2023"), 6.34e9, 242e9), 4)
        2.2256
        """
        if math.isinf(self.tokens_unique):
            return law.loss(params, tokens)
        unique = min(tokens, self.tokens_unique)
        useful = min(params, params_for(law, self.tokens_unique))
        return law.loss(
            _worth(params, useful, REPEATS_PARAMS), _worth(tokens, unique, REPEATS_TOKENS)
        )

    def optimum(self, law: Law, flops: float) -> Allocation:
        """The split of `flops`, training and serving together, that reaches the lowest loss.

        Raises:
            Infeasible: serving takes more than `flops` at any size.

        >>> from isoflop.laws.published import find_law
        >>> law = find_law("besiroglu-2024")
        >>> served = Demand(tokens_served=2e12).optimum(law, 1e23)
        >>> round(served.params / law.optimum(1e23).params, 2)
        0.35
        """
        require(law.name, flops=flops)
        if self.plain:
            return law.optimum(flops)
        most = flops / (FLOPS_PER_PARAM_TOKEN + FLOPS_PER_PARAM_TOKEN_SERVED * self.tokens_served)
        if most <= 1:
            served = f"serving {self.tokens_served:g} tokens takes more than {flops:g} FLOPs"
            raise Infeasible(f"{served} at any size")

        def loss(log_params: float) -> float:
            params = math.exp(log_params)
            tokens = self.tokens(params, flops)
            return self.loss(law, params, tokens) if tokens > 0 else math.inf

        params = math.exp(lowest(loss, 0.0, math.log(most)))
        tokens = self.tokens(params, flops)
        return Allocation(params, tokens, self.loss(law, params, tokens))


def params_for(law: Law, tokens: float) -> float:
    """The parameters for which `tokens` tokens are compute-optimal: `law.tokens_for` turned round.

    >>> from isoflop.laws.published import find_law
    >>> law = find_law("besiroglu-2024")
    >>> round(params_for(law, law.tokens_for(7e9)))
    7000000000
    """
    require(law.name, tokens=tokens)
    tilt = math.log(law.alpha * law.A) - math.log(law.beta * law.B)
    return math.exp((tilt + law.beta * math.log(tokens)) / law.alpha)


def _worth(amount: float, unique: float, repeats: float) -> float:
    """The amount of new things that `amount` is worth, `unique` of it new.

    Muennighoff 2023, equation 5: the k-th repetition is worth e^(-k / repeats) of the first.
    """
    again = amount / unique - 1
    return unique + unique * repeats * -math.expm1(-again / repeats)


def lowest(function: Callable[[float], float], low: float, high: float, steps: int = 64) -> float:
    """Where `function` is lowest between `low` and `high`: the best of a grid, then refined.

    >>> round(lowest(lambda x: (x - 2) ** 2, 0, 9), 6)
    2.0
    """
    grid = [low + (high - low) * k / steps for k in range(steps + 1)]
    best = min(range(steps + 1), key=lambda k: function(grid[k]))
    a, b = grid[max(best - 1, 0)], grid[min(best + 1, steps)]
    golden = (math.sqrt(5) - 1) / 2
    while b - a > 1e-9 * max(1.0, abs(a)):
        c, d = b - golden * (b - a), a + golden * (b - a)
        a, b = (a, d) if function(c) < function(d) else (c, b)
    return (a + b) / 2
