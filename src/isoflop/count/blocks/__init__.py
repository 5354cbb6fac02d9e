"""What each kind of block is made of: the one description that everything is folded from.

`describe(arch, workload)` gives a tree of `Part`s. A leaf part has the weights it
trains, the operator it runs forward and the tensors it keeps for backward; sizes are
expressions over the spec's letters. Parameters, FLOPs, memory and the operator list
are folds over this tree, so a new kind of block is described here once and then counts,
plans and prices by itself.

The paths (`layer/attention/k`) are those of the built module, which is written
independently; `isoflop check` holds the two against each other.
"""

from isoflop.count.blocks.ends import CAPPED
from isoflop.count.blocks.feed_forward import dense_parts
from isoflop.count.blocks.part import Ground, Part, Saved, Scope, Weight, linear
from isoflop.count.blocks.towers import beside
from isoflop.count.blocks.whole import describe, names_of

__all__ = [
    "CAPPED",
    "Ground",
    "Part",
    "Saved",
    "Scope",
    "Weight",
    "beside",
    "dense_parts",
    "describe",
    "linear",
    "names_of",
]
