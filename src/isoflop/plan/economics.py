"""From accelerator-hours to energy, carbon and money."""

from __future__ import annotations

from isoflop.errors import InputError, Problem
from isoflop.hardware import Chip
from isoflop.plan.assumed import CARBON, PUE, WATTS_SHARE, choose
from isoflop.quantity import Basis, Expr, Node, Symbol, leaf

#: Numbers of a chip that may be unknown: the argument and the option that supply each.
SUPPLIED = {"watts": ("watts", "--watts"), "dollars_per_hour": ("price", "--price")}


def unstated(chip: Chip, **given: float | None) -> list[Problem]:
    """What nobody states of the chip, among the arguments named, that the user left out too.

    >>> from isoflop.hardware import find
    >>> print(*unstated(find("trainium-3"), price=1.0, watts=None))
    watts=not stated: must be known for trainium-3 (give --watts)
    """
    return [
        Problem(field, "not stated", f"is known for {chip.name}", f"give {option}")
        for field, (argument, option) in SUPPLIED.items()
        if argument in given and given[argument] is None and field in chip.not_stated()
    ]


def energy_mwh(hours: Expr, chip: Chip, *, watts: float | None, pue: float | None) -> Node:
    """Energy at the meter: accelerator-hours x watts x PUE.

    `watts` given is the draw of one accelerator with its part of the host; otherwise the
    chip's rated limit times an assumed share. Source: Patterson 2021 (2104.10350), 2.5.

    Raises:
        InputError: `watts` is needed, for nobody states it of this chip.

    >>> from isoflop.hardware import find
    >>> hours = Symbol("accelerator_hours", 82432)
    >>> round(energy_mwh(hours, find("a100-sxm-80gb"), watts=None, pue=None).value)
    36
    """
    drawn: Expr
    if watts is not None:
        drawn = choose(Symbol("watts"), watts)
    elif chip.watts is not None:
        drawn = chip.watts * WATTS_SHARE
    else:
        raise InputError("plan", unstated(chip, watts=None))
    energy = hours * drawn * choose(PUE, pue) / 10**6
    return leaf("energy_mwh", "MWh", energy, basis=Basis.MODELLED)


def tonnes_co2e(energy: Node, carbon: float | None) -> Node:
    """Tonnes of CO2e of the grid that gives the energy: MWh x kg per kWh.

    `carbon` is in kg of CO2e per kWh. Nothing for making the machines. Source: Patterson 2021
    (2104.10350), section 2.5; Touvron 2023 (2302.13971), section 6.

    >>> from isoflop.hardware import find
    >>> hours = Symbol("accelerator_hours", 82432)
    >>> energy = energy_mwh(hours, find("a100-sxm-80gb"), watts=400, pue=1.1)
    >>> round(tonnes_co2e(energy, 0.385).value, 1)
    14.0
    """
    size = energy.total * choose(CARBON, carbon)
    return leaf("tonnes_co2e", "tonnes", size, basis=Basis.MODELLED)


def price_of(chip: Chip, price: float | None) -> Symbol:
    """Dollars per accelerator-hour: the user's, or the catalogue's with its range.

    Raises:
        InputError: `price` is needed, for nobody states it of this chip.
    """
    if chip.dollars_per_hour is None and price is None:
        raise InputError("plan", unstated(chip, price=None))
    return choose(chip.dollars_per_hour or Symbol("dollars_per_hour"), price)


def dollars(hours: Expr, price: Symbol) -> Node:
    """Rent of the accelerators at work; nothing for storage, network, people or failures."""
    return leaf("dollars", "dollars", hours * price, basis=Basis.MODELLED)


def dollars_per_million_tokens(n_accelerators: Expr, price: Symbol, rate: Expr) -> Node:
    """Rent over output tokens, at full load."""
    size = n_accelerators * price * (10**6 / (3600 * rate))
    return leaf("dollars_per_million_tokens", "dollars", size, basis=Basis.MODELLED)
