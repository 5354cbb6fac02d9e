"""Search of all legal layouts: the formulas of a plan over arrays of sizes.

space.py says what there is to choose from; formula.py compiles memory and step time to numpy;
weigh.py evaluates every layout; scores.py ranks them; pipeline.py runs the best event by
event; sway.py asks what the uncertain constants change; run.py is the search, found.py its
answer.
"""

from isoflop.plan.search.found import OBJECTIVES, Choice, Found, Limits, Objective
from isoflop.plan.search.run import search

__all__ = ["OBJECTIVES", "Choice", "Found", "Limits", "Objective", "search"]
