"""Which experts a token goes to, and how much each counts.

Letters: B batch · T tokens · D d_model · E n_experts · k n_active · G n_groups. Leading axes
are free.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from isoflop.arch.spec import Experts
from isoflop.attention.options import no_autocast
from isoflop.errors import InputError, Problem


@dataclass(frozen=True, slots=True)
class Routing:
    """What a router decided of every token.

    Attributes:
        logits: [B, T, E], before the score function, in at least single precision.
        scores: [B, T, E], softmax or sigmoid of them, the correction not in it.
        experts: [B, T, k], the experts chosen, best first.
        gates: [B, T, k], what their outputs are multiplied with.
    """

    logits: Tensor
    scores: Tensor
    experts: Tensor
    gates: Tensor

    @property
    def load(self) -> Tensor:
        """How many tokens chose each expert, [E]."""
        return count_experts(self.experts, self.scores.shape[-1])


def count_experts(experts_BTk: Tensor, n_experts: int) -> Tensor:
    """How often each expert stands in a choice, [E], counted without waiting for the device."""
    chosen = experts_BTk.flatten()
    return chosen.new_zeros(n_experts).scatter_add(0, chosen, torch.ones_like(chosen))


class Router(nn.Module):
    """Scores of every expert, a choice among them, gates from the scores of the chosen.

    Logits and scores are computed in at least single precision, under autocast too: rounded
    logits change choices (Fedus 2021, 2101.03961, section 2.4). `correction` is a lasting
    buffer that the choice alone sees (Wang 2024, 2408.15664); `correct` moves it. `last` is
    what `record_routing` has seen and not yet handed on.
    """

    correction: Tensor | None
    last: Routing | None = None

    def __init__(self, spec: Experts, d_model: int) -> None:
        super().__init__()
        self.spec = spec
        self.weight = nn.Parameter(torch.empty(spec.n_experts, d_model))
        self.bias = nn.Parameter(torch.empty(spec.n_experts)) if spec.router_bias else None
        correction = torch.zeros(spec.n_experts) if spec.score_correction else None
        self.register_buffer("correction", correction)

    def forward(self, x_BTD: Tensor, forced_BTk: Tensor | None = None) -> Routing:
        """The routing of each token; `forced_BTk` stands in for the router's own choice."""
        logits_BTE = self._logits(x_BTD)
        softmax = self.spec.score == "softmax"
        scores_BTE = logits_BTE.softmax(dim=-1) if softmax else logits_BTE.sigmoid()
        experts_BTk = self.choose(scores_BTE.detach()) if forced_BTk is None else forced_BTk
        gates_BTk = scores_BTE.gather(-1, experts_BTk)
        if self.spec.normalize:
            # Sigmoid scores may all underflow; softmax's best k never sum to less than k / E.
            gates_BTk = gates_BTk / (gates_BTk.sum(dim=-1, keepdim=True) + 1e-20)
        return Routing(logits_BTE, scores_BTE, experts_BTk, gates_BTk * self.spec.scale)

    def choose(self, scores_BTE: Tensor) -> Tensor:
        """The k best experts [B, T, k] by corrected score, of the best groups where limited."""
        if self.correction is not None:
            scores_BTE = scores_BTE + self.correction
        if self.spec.n_active_groups < self.spec.n_groups:
            scores_BTE = self._within_best_groups(scores_BTE)
        return scores_BTE.topk(self.spec.n_active, dim=-1).indices

    @torch.no_grad()
    def correct(self, load_E: Tensor, rate: float) -> None:
        """Raise the correction of experts with less than the mean load by `rate`, lower others'.

        b += rate * sign(mean load - load): Wang 2024 (2408.15664), algorithm 1.

        Raises:
            InputError: the spec has no score correction.
        """
        if self.correction is None:
            rule = "is True where the correction is to be moved"
            raise InputError("router", [Problem("score_correction", False, rule)])
        load_E = load_E.to(self.correction.dtype)
        self.correction += rate * torch.sign(load_E.mean() - load_E)

    def _logits(self, x_BTD: Tensor) -> Tensor:
        wide = torch.promote_types(x_BTD.dtype, torch.float32)
        bias = None if self.bias is None else self.bias.to(wide)
        with no_autocast(x_BTD.device):
            return F.linear(x_BTD.to(wide), self.weight.to(wide), bias)

    def _within_best_groups(self, scores_BTE: Tensor) -> Tensor:
        """Scores outside the best groups become -inf.

        A group is worth its best expert (DeepSeek 2024, 2405.04434, section 2.2.2), with a
        score correction its best two (2412.19437, section 2.1.2).
        """
        scores_BTGX = torch.unflatten(scores_BTE, -1, (self.spec.n_groups, -1))
        n_best = 1 if self.correction is None else min(2, scores_BTGX.shape[-1])
        worth_BTG = scores_BTGX.topk(n_best, dim=-1).values.sum(dim=-1)
        best = worth_BTG.topk(self.spec.n_active_groups, dim=-1).indices
        shut_BTG = torch.ones_like(worth_BTG, dtype=torch.bool).scatter(-1, best, value=False)
        return scores_BTGX.masked_fill(shut_BTG[..., None], -torch.inf).flatten(-2)
