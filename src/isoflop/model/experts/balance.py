"""Keeping experts evenly loaded: what routers did, losses of it, and a correction without one.

    with record_routing(model) as routings:
        loss = model.loss(tokens, targets)
    loss = loss + 0.01 * sum(load_balancing_loss(r) for r in routings.values())
    loss.backward()
    ...
    correct_scores(model, {name: r.load for name, r in routings.items()}, rate=0.001)

Letters: B batch · T tokens · E n_experts · k n_active.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor, nn

from isoflop.errors import UnknownName
from isoflop.model.experts.router import Router, Routing


@contextmanager
def record_routing(model: nn.Module) -> Iterator[dict[str, Routing]]:
    """What each router decides inside, by the router's name, there when the context is left.

    A second pass replaces the first. Gradients flow through what is recorded.
    """
    seen: dict[str, Routing] = {}
    routers = _routers(model)
    handles = [router.register_forward_hook(_keep) for router in routers.values()]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()
        for name, router in routers.items():
            if router.last is not None:
                seen[name] = router.last
            router.last = None


def _keep(router: Any, _inputs: Any, routing: Routing) -> None:
    """One function for all routers: layers compiled with one each would be compiled one by one."""
    router.last = routing


def load_balancing_loss(routing: Routing, per: Literal["batch", "sequence"] = "batch") -> Tensor:
    """E * sum over experts of (share of the choices) * (mean probability): 1 at balance.

    Choices are the k highest scores, corrections and groups left out, and probabilities are
    scores that sum to 1. Over the whole batch: Fedus 2021 (2101.03961), equations 4 to 6, of k
    choices as in Mixtral; per sequence, then averaged: DeepSeek-V3 (2412.19437), equations 17
    to 20. Multiply with the weight that the paper calls alpha.
    """
    scores_BTE = routing.scores if per == "sequence" else routing.scores.flatten(0, -2)[None]
    n_experts, n_active = scores_BTE.shape[-1], routing.experts.shape[-1]
    best = scores_BTE.topk(n_active, dim=-1).indices
    chosen_BTE = torch.zeros_like(scores_BTE).scatter(-1, best, 1.0)
    share_BE = chosen_BTE.mean(dim=1) / n_active
    probability_BE = (scores_BTE / scores_BTE.sum(dim=-1, keepdim=True)).mean(dim=1)
    return n_experts * (share_BE * probability_BE).sum(dim=-1).mean()


def router_z_loss(routing: Routing) -> Tensor:
    """The mean over tokens of (log sum exp of the logits)^2: Zoph 2022 (2202.08906), equation 5."""
    return routing.logits.logsumexp(dim=-1).square().mean()


def correct_scores(model: nn.Module, loads: Mapping[str, Tensor], rate: float) -> None:
    """Move each named router's score correction towards an even load (`Router.correct`).

    To be called after each step with the loads of all its tokens, of every rank too.

    Raises:
        UnknownName: the model has no such router.
        InputError: a router has no score correction.
    """
    routers = _routers(model)
    for name, load_E in loads.items():
        if name not in routers:
            raise UnknownName("router", name, routers)
        routers[name].correct(load_E, rate)


def _routers(model: nn.Module) -> dict[str, Router]:
    return {name: module for name, module in model.named_modules() if isinstance(module, Router)}
