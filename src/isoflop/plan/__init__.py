"""Plans: what training or serving a model takes on a cluster, and what was refused.

layout.py says which layouts are legal. memory/ holds what one accelerator holds under one, network/
what ranks send, schedule/ the pipelines' orders, step/ how long a step takes, search/ (not imported
here) which layout is best; training/, serving/ and budgeting/ put them together. roofline.py is
seconds to first order and cost.py seconds from a measured profile; goodput.py failures;
economics.py turns hours into energy, carbon and money; assumed.py lists every default with its
range; emit/ writes plans for trainers and diff.py compares two.
"""

from isoflop.plan.layout import Layout, broken_rules, legal_layouts
from isoflop.plan.memory.refusal import Refusal
from isoflop.plan.serving.plan import ServePlan, plan_serve
from isoflop.plan.training.plan import TrainPlan, plan_train, what_if

__all__ = [
    "Layout",
    "Refusal",
    "ServePlan",
    "TrainPlan",
    "broken_rules",
    "legal_layouts",
    "plan_serve",
    "plan_train",
    "what_if",
]
