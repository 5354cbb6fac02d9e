"""Plans: what training or serving a model takes on a cluster, and what was refused.

layout.py says which layouts are legal; step.py how long a step takes, search/ (not imported
here) which layout is best, emit.py and diff.py write and compare plans; shard.py what one accelerator holds under one;
roofline.py first-order seconds; work.py the FLOPs and seconds of a run; train.py and serve.py
put them together; economics.py turns hours into energy, carbon and money; assumed.py lists
every default with its range; quoted.py holds what others quote against its own inputs.
"""

from isoflop.plan.layout import Layout, Refusal, broken_rules, legal_layouts
from isoflop.plan.serve import ServePlan, plan_serve
from isoflop.plan.train import TrainPlan, plan_train, what_if

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
