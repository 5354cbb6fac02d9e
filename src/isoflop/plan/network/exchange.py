"""How a trainer's software exchanges what its layout asks for: dtypes and variants."""

from __future__ import annotations

from dataclasses import dataclass

from isoflop.quantity import Basis, Interval, Symbol

EXPERT_IMBALANCE = Symbol(
    "expert_imbalance",
    1.1,
    Basis.ASSUMED,
    Interval(1.0, 1.5),
    "1.0 where routing is forced even, as benchmarks do; a guess for trained routers",
    "tokens of the busiest rank's experts over the mean",
)


@dataclass(frozen=True, slots=True)
class Exchange:
    """How a trainer exchanges what it must.

    Attributes:
        bytes_grad, bytes_weight: of one number reduced, of one gathered; None: as activations.
        bytes_dispatch: of one number sent to experts; None: as activations.
        reshard: with ZeRO 3, whether backward gathers the weights again.
        once_per_domain: one copy of a token serves all its experts in a domain.
        imbalance: of the experts' load.
    """

    bytes_grad: int | None = None
    bytes_weight: int | None = None
    bytes_dispatch: int | None = None
    reshard: bool = True
    once_per_domain: bool = False
    imbalance: Symbol = EXPERT_IMBALANCE


DEFAULT = Exchange()
