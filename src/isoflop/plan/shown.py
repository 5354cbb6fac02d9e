"""What plans are called where people read them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from isoflop.quantity import Node

#: How the numbers of a plan are called in text.
LABELS = {
    "flops": "FLOPs",
    "flops_6nd": "6 N D",
    "accelerator_hours": "accelerator-hours",
    "days": "days",
    "energy_mwh": "energy, MWh",
    "tonnes_co2e": "CO2e, tonnes",
    "dollars": "dollars",
}


def labelled(nodes: Mapping[str, Node]) -> Iterator[tuple[str, Node]]:
    """A plan's numbers by what they are called, the parts of the days below them."""
    for name, label in LABELS.items():
        if name not in nodes:
            continue
        yield label, nodes[name]
        if name == "days":
            yield from ((f"  {part.name}", part) for part in nodes[name].children)
