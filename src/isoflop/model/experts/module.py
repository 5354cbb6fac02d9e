"""A mixture of experts in place of a feed-forward.

Letters: B batch · T tokens · M tokens of all sequences · D d_model · F d_ff of an expert ·
E n_experts · k n_active · R rows that experts work on.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from isoflop.arch.spec import Dense, Experts
from isoflop.model.experts.combine import combine
from isoflop.model.experts.dispatch import Dispatch, Dropless, RoundRobin, deal, make_plan
from isoflop.model.experts.grouped import grouped_linear
from isoflop.model.experts.router import Router, Routing
from isoflop.model.parts import FeedForwardModule, Linear, hidden_unit, product_dtype


class ExpertsModule(nn.Module):
    """sum over the chosen of gate * expert(x), plus what the shared experts say.

    `dispatch` may be set at any time; `set_dispatch` does for a whole model.
    """

    def __init__(self, spec: Experts, d_model: int) -> None:
        super().__init__()
        self.spec = spec
        self.dispatch: Dispatch = Dropless()
        self.router = Router(spec, d_model)
        self.experts = ExpertStack(spec.expert, spec.n_experts, d_model)
        self.shared = None if spec.shared is None else FeedForwardModule(spec.shared, d_model)
        self.shared_gate = Linear(d_model, 1, bias=False) if spec.shared_gate else None

    def forward(self, x_BTD: Tensor) -> Tensor:
        routing: Routing = self.router(x_BTD, self._forced(x_BTD))
        y_BTD = self._routed(x_BTD.flatten(0, -2), routing).view_as(x_BTD)
        if self.shared is None:
            return y_BTD
        shared_BTD: Tensor = self.shared(x_BTD)
        if self.shared_gate is not None:
            shared_BTD = self.shared_gate(x_BTD).sigmoid() * shared_BTD
        return y_BTD + shared_BTD

    def _forced(self, x_BTD: Tensor) -> Tensor | None:
        if not isinstance(self.dispatch, RoundRobin):
            return None
        shape, spec = x_BTD.shape[:-1], self.spec
        dealt_Mk = deal(shape.numel(), spec.n_experts, spec.n_active, x_BTD.device)
        return dealt_Mk.view(*shape, -1)

    def _routed(self, x_MD: Tensor, routing: Routing) -> Tensor:
        """Rows are gathered expert by expert and added up where they came from.

        With index_add forward and backward of 2048 tokens of 512 numbers, 2 experts each, take
        8.0 ms on a CPU (one thread, fp32); with a sum over the choices set back in order, 11.0.
        """
        plan = make_plan(self.dispatch, routing)
        token_R = plan.choices // self.spec.n_active
        gates_R = routing.gates.flatten().index_select(0, plan.choices)
        if plan.kept is not None:
            gates_R = gates_R * plan.kept
        y_RD: Tensor = self.experts(x_MD.index_select(0, token_R), plan.ends)
        return combine(y_RD, gates_R.to(y_RD.dtype), token_R, len(x_MD))


class ExpertStack(nn.Module):
    """Experts of one shape: the matrices of a feed-forward, one of each per expert."""

    def __init__(self, spec: Dense, n_experts: int, d_model: int) -> None:
        super().__init__()
        self.spec = spec
        into, out = (n_experts, d_model, spec.d_ff), (n_experts, spec.d_ff, d_model)
        self.gate = GroupedLinear(*into, bias=spec.bias) if spec.gated else None
        self.up = GroupedLinear(*into, bias=spec.bias)
        self.down = GroupedLinear(*out, bias=spec.bias)

    def forward(self, x_RD: Tensor, ends_E: Tensor) -> Tensor:
        gate_RF = None if self.gate is None else self.gate(x_RD, ends_E)
        return self.shrink(self.up(x_RD, ends_E), gate_RF, ends_E)

    def shrink(self, up_RF: Tensor, gate_RF: Tensor | None, ends_E: Tensor) -> Tensor:
        """What stands between the matrices, and back to the stream's width."""
        h_RF = hidden_unit(self.spec.activation, up_RF, gate_RF)
        h_RF = F.dropout(h_RF, self.spec.dropout, self.training)
        y_RD: Tensor = self.down(h_RF, ends_E)
        return y_RD


class GroupedLinear(nn.Module):
    """A linear map per expert, applied to its own rows; weights [E, width out, width in]."""

    def __init__(self, n_experts: int, d_in: int, d_out: int, *, bias: bool) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(n_experts, d_out, d_in))
        self.bias = nn.Parameter(torch.empty(n_experts, d_out)) if bias else None

    def forward(self, x_RX: Tensor, ends_E: Tensor) -> Tensor:
        dtype = product_dtype(x_RX)
        y_RY: Tensor = grouped_linear(x_RX.to(dtype), self.weight.to(dtype), ends_E)
        if self.bias is None:
            return y_RY
        rows_R = torch.arange(len(x_RX), device=x_RX.device, dtype=ends_E.dtype)
        expert_R = torch.searchsorted(ends_E, rows_R, right=True)
        return y_RY + self.bias.to(dtype).index_select(0, expert_R)


def set_dispatch(model: nn.Module, dispatch: Dispatch) -> None:
    """Let every mixture of a model dispatch in one way."""
    for module in model.modules():
        if isinstance(module, ExpertsModule):
            module.dispatch = dispatch
