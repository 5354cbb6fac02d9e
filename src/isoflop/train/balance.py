"""Experts kept evenly loaded while they train, as the recipe's `balance` says.

The loss that is reported stays the cross entropy; a step's row has the rest beside it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from isoflop.arch import Arch
from isoflop.arch.spec import Experts
from isoflop.errors import Problem
from isoflop.model.experts import (
    Capacity,
    Dispatch,
    Dropless,
    Routing,
    correct_scores,
    load_balancing_loss,
    router_z_loss,
)
from isoflop.train.recipe import BIAS_UPDATE_RATE, Balance


@dataclass(frozen=True, slots=True)
class Balancer:
    """What is done with the routings of a step, of the routers by name; nothing where none are."""

    balance: Balance

    @property
    def dispatch(self) -> Dispatch:
        """Which choices are served in training."""
        factor = self.balance.capacity_factor
        return Dropless() if factor is None else Capacity(factor)

    def losses(self, routings: Mapping[str, Routing]) -> dict[str, Tensor]:
        """The losses that have a weight, each added up over the layers, without it."""
        balance, losses = self.balance, {}
        if routings and balance.aux_loss_weight:
            each = [load_balancing_loss(r, balance.aux_loss_per) for r in routings.values()]
            losses["aux_loss"] = torch.stack(each).sum()
        if routings and balance.z_loss_weight:
            losses["z_loss"] = torch.stack([router_z_loss(r) for r in routings.values()]).sum()
        return losses

    def added(self, losses: Mapping[str, Tensor]) -> Tensor | float:
        """What is added to the cross entropy: Fedus 2021, section 2.2; Zoph 2022, equation 6."""
        balance = self.balance
        weights = {"aux_loss": balance.aux_loss_weight, "z_loss": balance.z_loss_weight}
        return sum(weights[name] * loss for name, loss in losses.items())

    def correct(self, model: nn.Module, routings: Mapping[str, Routing]) -> None:
        """Move the corrections of the routers that have one, by the loads of a step."""
        rate = self.balance.bias_update_rate
        loads = {
            name: routing.load
            for name, routing in routings.items()
            if getattr(model.get_submodule(name), "correction", None) is not None
        }
        correct_scores(model, loads, BIAS_UPDATE_RATE if rate is None else rate)

    @torch.no_grad()
    def row(
        self, routings: Mapping[str, Routing], losses: Mapping[str, Tensor]
    ) -> dict[str, float]:
        """What a step's row says, the worst layer's load first.

        Of all layers: the share of choices that was dropped, and the mean of each loss (the
        load-balancing one is 1 at balance).
        """
        loads = [routing.load.double() for routing in routings.values()]
        if not loads:
            return {}
        row = {"load_max_over_mean": torch.stack([x.max() / x.mean() for x in loads]).max()}
        if isinstance(self.dispatch, Capacity):
            dropped = [_dropped(self.dispatch, r) for r in routings.values()]
            row["dropped_share"] = torch.stack(dropped).sum() / torch.stack(loads).sum()
        row |= {name: loss / len(loads) for name, loss in losses.items()}
        return {name: float(value) for name, value in row.items()}


def balance_problems(balance: Balance | None, arch: Arch) -> Iterator[Problem]:
    """What of a recipe's balance a model has no use for."""
    if balance is None:
        return
    mixtures = [x.feed_forward for x in arch.layers if isinstance(x.feed_forward, Experts)]
    if not mixtures:
        yield Problem("balance", "given", "is left out: this model has no experts")
        return
    rate, factor = balance.bias_update_rate, balance.capacity_factor
    if rate is not None and not any(mixture.score_correction for mixture in mixtures):
        rule = "is left out: no layer of this model has a correction of scores"
        hint = "the spec's experts have one with score_correction = true"
        yield Problem("balance.bias_update_rate", rate, rule, hint)
    most = max(mixture.n_experts / mixture.n_active for mixture in mixtures)
    if factor is not None and factor > most:
        rule = f"is at most n_experts / n_active = {most:g}, where nothing can be dropped"
        yield Problem("balance.capacity_factor", factor, rule, "leave it out to serve all choices")


def _dropped(capacity: Capacity, routing: Routing) -> Tensor:
    """How many choices found no room."""
    load_E = routing.load.double()
    n_rows = capacity.rows(routing.experts.numel(), len(load_E))
    return (load_E - n_rows).clamp(min=0).sum()
