"""From accelerator-hours to energy and money."""

from __future__ import annotations

from isoflop.hardware import Chip
from isoflop.plan.assumed import PUE, WATTS_SHARE, choose
from isoflop.quantity import Basis, Expr, Node, Symbol, leaf


def energy_mwh(hours: Expr, chip: Chip, *, watts: float | None, pue: float | None) -> Node:
    """Energy at the meter: accelerator-hours x watts x PUE.

    `watts` given is the draw of one accelerator with its part of the host; otherwise the
    chip's rated limit times an assumed share. Source: Patterson 2021 (2104.10350), 2.5.

    >>> from isoflop.hardware import find
    >>> hours = Symbol("accelerator_hours", 82432)
    >>> round(energy_mwh(hours, find("a100-sxm-80gb"), watts=None, pue=None).value)
    36
    """
    if watts is None:
        drawn: Expr = chip.watts * WATTS_SHARE
    else:
        drawn = choose(Symbol("watts"), watts)
    energy = hours * drawn * choose(PUE, pue) / 10**6
    return leaf("energy_mwh", "MWh", energy, basis=Basis.MODELLED)


def price_of(chip: Chip, price: float | None) -> Symbol:
    """Dollars per accelerator-hour: the user's, or the catalogue's with its range."""
    return choose(chip.dollars_per_hour, price)


def dollars(hours: Expr, price: Symbol) -> Node:
    """Rent of the accelerators at work; nothing for storage, network, people or failures."""
    return leaf("dollars", "dollars", hours * price, basis=Basis.MODELLED)


def dollars_per_million_tokens(n_accelerators: Expr, price: Symbol, rate: Expr) -> Node:
    """Rent over output tokens, at full load."""
    size = n_accelerators * price * (10**6 / (3600 * rate))
    return leaf("dollars_per_million_tokens", "dollars", size, basis=Basis.MODELLED)
