"""Which rows each expert works on: all that chose it, or no more than it has room for.

A run-time setting, not part of the architecture: weights are the same under each, and a model
may be trained with one and evaluated with another.

Letters: M tokens of all sequences · E n_experts · k n_active · P choices, M k · R rows that are
worked on · C rows of one expert.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from fractions import Fraction
from typing import Literal, TypeAlias

import torch
from torch import Tensor

from isoflop.arch.rules import Rules
from isoflop.model.experts.router import Routing, count_experts


@dataclass(frozen=True, slots=True)
class Dropless:
    """Every choice is served, however uneven the load (Gale 2022, 2211.15841)."""


@dataclass(frozen=True, slots=True)
class Capacity:
    """An expert has room for `factor` times its even share; choices beyond it are dropped.

    What is dropped adds nothing to its token, and the other gates stay as they are. `first`
    says who is served: first choices before second ones, then by position (Lepikhin 2020,
    2006.16668, algorithm 1), or the highest gates (Riquelme 2021, 2106.05974, section 4).

    Raises:
        InputError: the factor is not above 0, or the order is unknown.
    """

    factor: float
    first: Literal["position", "probability"] = "position"
    _ratio: tuple[int, int] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        Rules(self).real("factor", above=0.0).one_of("first", ("position", "probability")).close()
        # Plain integers from the start: torch.compile knows no fractions.
        object.__setattr__(self, "_ratio", Fraction(str(self.factor)).as_integer_ratio())

    def rows(self, n_choices: int, n_experts: int) -> int:
        """Rows of one expert, the decimal that was said taken exactly (1.1 is 11 / 10).

        >>> Capacity(1.1).rows(100, 10)
        11
        """
        numerator, denominator = self._ratio
        return -(-numerator * n_choices // (denominator * n_experts))


@dataclass(frozen=True, slots=True)
class RoundRobin:
    """Experts are dealt out in turn, whatever the scores: the same load for each.

    For measuring speed and counting work where weights are random; gates are still scores.
    """


Dispatch: TypeAlias = Dropless | Capacity | RoundRobin


@dataclass(frozen=True, slots=True)
class Plan:
    """The rows that experts work on, an expert's rows together.

    Attributes:
        choices: [R], the choice (k times the token, plus its rank) that a row serves.
        ends: [E], where each expert's rows end, int32.
        kept: [R], False where a row serves nobody; None where every row serves.
    """

    choices: Tensor
    ends: Tensor
    kept: Tensor | None = None


def deal(n_tokens: int, n_experts: int, n_active: int, device: torch.device) -> Tensor:
    """Experts in turn, [M, k]; loads differ by 1 at most.

    >>> deal(4, 3, 2, torch.device("cpu")).tolist()
    [[0, 1], [2, 0], [1, 2], [0, 1]]
    """
    return (torch.arange(n_tokens * n_active, device=device) % n_experts).view(-1, n_active)


def make_plan(dispatch: Dispatch, routing: Routing) -> Plan:
    """The rows of each expert. Shapes depend on no data, so no device is waited for."""
    n_experts = routing.scores.shape[-1]
    experts_P = routing.experts.flatten()
    load_E = count_experts(experts_P, n_experts)
    match dispatch:
        case Capacity():
            choices_P = _first_come(dispatch, routing)
            choices_P = choices_P[experts_P[choices_P].argsort(stable=True)]
            return _limit(choices_P, load_E, dispatch.rows(len(choices_P), n_experts))
        case Dropless() | RoundRobin():
            return Plan(experts_P.argsort(stable=True), load_E.cumsum(0).int())


def _first_come(capacity: Capacity, routing: Routing) -> Tensor:
    """Choices in the order in which they are served, [P]."""
    gates_Mk = routing.gates.detach().flatten(0, -2)
    if capacity.first == "probability":
        return gates_Mk.flatten().argsort(descending=True, stable=True)
    return torch.arange(gates_Mk.numel(), device=gates_Mk.device).view_as(gates_Mk).T.flatten()


def _limit(choices_P: Tensor, load_E: Tensor, n_rows: int) -> Plan:
    """The first `n_rows` of each expert's choices; one with fewer works on rows for nobody."""
    rank_C = torch.arange(n_rows, device=load_E.device)
    place_EC = (load_E.cumsum(0) - load_E)[:, None] + rank_C
    choices_EC = choices_P[place_EC.clamp(max=len(choices_P) - 1)]
    ends_E = torch.arange(1, len(load_E) + 1, device=load_E.device) * n_rows
    return Plan(choices_EC.flatten(), ends_E.int(), (rank_C < load_E[:, None]).flatten())
