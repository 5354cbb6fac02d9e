"""What a machine offers.

chip.py holds the `Chip`: peaks, memory, links, power and price, each a `Symbol` with
source and date. catalog.toml lists the chips we know, catalog.py finds them by name.
cluster.py holds the `Cluster`, `count` chips in nodes, and reads it from text.
"""

from isoflop.hardware.catalog import find, names
from isoflop.hardware.chip import Chip, Precision
from isoflop.hardware.cluster import Cluster, parse_cluster

__all__ = ["Chip", "Cluster", "Precision", "find", "names", "parse_cluster"]
