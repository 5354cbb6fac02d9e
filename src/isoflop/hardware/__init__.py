"""What a machine offers.

chip.py holds the `Chip`: peaks, memory, links, power and price, each a `Symbol` with
source and date. node.py holds the `Node`, chips in a machine as it is sold or rented.
catalog.toml lists those we know, catalog.py finds them by name. cluster.py holds the
`Cluster`, `count` chips, and reads it from text.
"""

from isoflop.hardware.catalog import find, find_node, look_up, names, node_names
from isoflop.hardware.chip import Chip, Precision
from isoflop.hardware.cluster import Cluster, parse_cluster
from isoflop.hardware.node import Node

__all__ = [
    "Chip",
    "Cluster",
    "Node",
    "Precision",
    "find",
    "find_node",
    "look_up",
    "names",
    "node_names",
    "parse_cluster",
]
