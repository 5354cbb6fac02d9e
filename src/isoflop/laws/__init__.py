"""What loss parameters and tokens buy.

* `Law` (form.py): the Chinchilla form as a value, with its optimum in closed form.
* `published_laws`, `find_law` (published.py): laws from papers, each with its source.
* `allocation_table`, `standing` (allocate.py): how to split a budget, and how far a
  known model is from the split.
* `Demand` (demand.py): the same where the budget also pays for serving, or data are few.
* `spread_of` (spread.py): how well a published law is known.
* `read_runs` (table.py): measured runs from a CSV file.

All of it is standard library. Fitting a law to runs needs numpy and lives in
`isoflop.laws.fit`, which is imported by that name only.
"""

from isoflop.laws.allocate import Standing, allocation_table, standing
from isoflop.laws.demand import Demand, params_for
from isoflop.laws.form import Allocation, Law
from isoflop.laws.published import find_law, published_laws
from isoflop.laws.spread import Spread, spread_of
from isoflop.laws.table import Runs, read_runs

__all__ = [
    "Allocation",
    "Demand",
    "Law",
    "Runs",
    "Spread",
    "Standing",
    "allocation_table",
    "find_law",
    "params_for",
    "published_laws",
    "read_runs",
    "spread_of",
    "standing",
]
