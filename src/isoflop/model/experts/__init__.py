"""Mixtures of experts: router.py chooses, dispatch.py says who works on what, grouped.py
multiplies, module.py wires them, balance.py keeps the load even.
"""

from isoflop.model.experts.balance import (
    correct_scores,
    load_balancing_loss,
    record_routing,
    router_z_loss,
)
from isoflop.model.experts.dispatch import Capacity, Dispatch, Dropless, RoundRobin
from isoflop.model.experts.module import ExpertsModule, set_dispatch
from isoflop.model.experts.router import Router, Routing

__all__ = [
    "Capacity",
    "Dispatch",
    "Dropless",
    "ExpertsModule",
    "RoundRobin",
    "Router",
    "Routing",
    "correct_scores",
    "load_balancing_loss",
    "record_routing",
    "router_z_loss",
    "set_dispatch",
]
