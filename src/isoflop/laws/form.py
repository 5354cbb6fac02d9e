"""The Chinchilla form of a scaling law as a value: L(N, D) = E + A / N^alpha + B / D^beta.

Source: Hoffmann 2022 (2203.15556), equation 10; the optimum is its equation 4.
The loss is in nats per token or per byte, whichever the law was fitted to.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Literal, TypeAlias, get_args

from isoflop.errors import InputError, Problem

#: Which parameters N counts. One set of runs gives different exponents under each.
ParamsConvention: TypeAlias = Literal["total", "non_embedding", "active", "unstated"]

#: FLOPs of training per parameter and token: Kaplan 2020 (2001.08361), section 2.1.
FLOPS_PER_PARAM_TOKEN = 6.0


@dataclass(frozen=True, slots=True)
class Allocation:
    """Parameters and tokens, and the loss a law gives them."""

    params: float
    tokens: float
    loss: float

    @property
    def tokens_per_param(self) -> float:
        return self.tokens / self.params

    def to_json(self) -> dict[str, float]:
        return asdict(self) | {"tokens_per_param": self.tokens_per_param}


@dataclass(frozen=True, slots=True)
class Law:
    """L(N, D) = E + A / N^alpha + B / D^beta, for N parameters and D training tokens.

    Attributes:
        A, B, E, alpha, beta: positive and finite.
        params_convention: which parameters N counts.
        source: where the five numbers come from.

    Raises:
        InputError: a number that is not positive and finite, or an unknown convention.

    >>> law = Law(A=406.4, B=410.7, E=1.69, alpha=0.34, beta=0.28)
    >>> round(law.loss(params=70e9, tokens=1.4e12), 3)
    1.937
    >>> round(law.optimum(flops=5.76e23).tokens_per_param, 1)
    92.6
    """

    A: float
    B: float
    E: float
    alpha: float
    beta: float
    name: str = "law"
    source: str = ""
    params_convention: ParamsConvention = "total"
    note: str = ""

    def __post_init__(self) -> None:
        problems = broken({field: getattr(self, field) for field in PARAMETERS})
        if self.params_convention not in get_args(ParamsConvention):
            rule = f"is one of {', '.join(get_args(ParamsConvention))}"
            problems.append(Problem("params_convention", self.params_convention, rule))
        if problems:
            raise InputError(self.name, problems)

    @property
    def params_exponent(self) -> float:
        """a in N* ~ C^a; the tokens' exponent is 1 - a.

        >>> round(Law(A=406.4, B=410.7, E=1.69, alpha=0.34, beta=0.28).params_exponent, 2)
        0.45
        """
        return self.beta / (self.alpha + self.beta)

    def loss(self, params: float, tokens: float) -> float:
        """The loss of `params` parameters trained on `tokens` tokens seen once."""
        require(self.name, params=params, tokens=tokens)
        return self._loss(params, tokens)

    def _loss(self, params: float, tokens: float) -> float:
        try:
            excess: float = self.A / params**self.alpha + self.B / tokens**self.beta
        except ArithmeticError:  # a power past the largest float, or below the least
            excess = math.inf
        if not excess < math.inf:
            raise self._unwritable()
        return self.E + excess

    def _unwritable(self) -> InputError:
        numbers = ", ".join(f"{name}={getattr(self, name):g}" for name in PARAMETERS)
        rule = "gives sizes and losses that can be written"
        return InputError(self.name, [Problem("law", numbers, rule, "look at its numbers")])

    def optimum(
        self, flops: float, flops_per_param_token: float = FLOPS_PER_PARAM_TOKEN
    ) -> Allocation:
        """The split of a training budget that reaches the lowest loss.

        `flops` = `flops_per_param_token` x params x tokens.
        """
        require(self.name, flops=flops, flops_per_param_token=flops_per_param_token)
        product = flops / flops_per_param_token
        both = self.alpha + self.beta
        tilt = math.log(self.alpha) + math.log(self.A) - math.log(self.beta) - math.log(self.B)
        params = tilt / both + self.params_exponent * math.log(product)
        if not abs(params) < LARGEST_LOG:
            raise self._unwritable()
        return self._allocation(math.exp(params), product / math.exp(params))

    def optimum_for_loss(self, loss: float) -> Allocation:
        """The cheapest parameters and tokens that reach `loss`.

        At an optimum alpha A / N^alpha = beta B / D^beta, so each term is a fixed share
        of what `loss` leaves above E.

        >>> law = Law(A=406.4, B=410.7, E=1.69, alpha=0.34, beta=0.28)
        >>> there = law.optimum(flops=1e21)
        >>> round(law.optimum_for_loss(there.loss).params / there.params, 9)
        1.0
        """
        require(self.name, loss=loss)
        if loss <= self.E:
            rule = f"is above E={self.E:g}, the loss that no size and no data go below"
            raise InputError(self.name, [Problem("loss", loss, rule)])
        both = self.alpha + self.beta
        left = math.log(loss - self.E)
        params = (math.log(self.A * both / self.beta) - left) / self.alpha
        tokens = (math.log(self.B * both / self.alpha) - left) / self.beta
        if max(params, tokens) > LARGEST_LOG:
            rule = f"is far enough above E={self.E:g} to be reached by a size that can be written"
            raise InputError(self.name, [Problem("loss", loss, rule)])
        return self._allocation(math.exp(params), math.exp(tokens))

    def tokens_for(self, params: float) -> float:
        """The tokens at which `params` parameters are the compute-optimal size.

        >>> law = Law(A=482.01, B=2085.43, E=1.8172, alpha=0.3478, beta=0.3658)
        >>> round(law.tokens_for(70e9) / 70e9, 1)
        18.4
        """
        require(self.name, params=params)
        tilt = math.log(self.beta * self.B) - math.log(self.alpha * self.A)
        return math.exp(min(LARGEST_LOG, (tilt + self.alpha * math.log(params)) / self.beta))

    def _allocation(self, params: float, tokens: float) -> Allocation:
        return Allocation(params, tokens, self._loss(params, tokens))

    def to_json(self) -> dict[str, float | str]:
        return asdict(self)


#: The five numbers of a law, in the order that every table of them uses.
PARAMETERS = ("A", "B", "E", "alpha", "beta")

#: No size, budget or loss beyond this is read; e^LARGEST_LOG is still a float.
LARGEST_INPUT, LARGEST_LOG = 1e40, 690.0


def require(where: str, **values: float) -> None:
    """Raise `InputError` for each value that is not a positive, finite number."""
    problems = broken(values)
    problems += [
        Problem(field, value, f"is at most {LARGEST_INPUT:g}")
        for field, value in values.items()
        if not problems and value > LARGEST_INPUT
    ]
    if problems:
        raise InputError(where, problems)


def broken(values: Mapping[str, float]) -> list[Problem]:
    """The values that are not positive, finite numbers."""
    return [
        Problem(field, value, "is a finite number above 0")
        for field, value in values.items()
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not _positive(value)
    ]


def _positive(value: float) -> bool:
    try:
        return 0 < float(value) < math.inf
    except OverflowError:  # an integer past the largest float
        return False
