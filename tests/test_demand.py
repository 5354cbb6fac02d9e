"""Splits for serving and for few data, and laws drawn from their uncertainty."""

from __future__ import annotations

import math
import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from isoflop.errors import Infeasible, InputError
from isoflop.laws import Demand, Law, find_law, params_for, published_laws, read_runs, spread_of
from isoflop.laws.demand import lowest
from isoflop.laws.fit import fit

SHARED = Path(os.environ.get("ISOFLOP_SHARED", Path(__file__).parents[2] / "shared" / "data"))
POINTS = SHARED / "laws" / "epoch_chinchilla_svg.csv"
FLOPS = st.floats(1e18, 1e27)
LAWS = st.sampled_from([*published_laws().values()])


@given(LAWS, FLOPS)
def test_a_trifle_of_serving_gives_the_closed_form(law: Law, flops: float) -> None:
    nearly, exact = Demand(tokens_served=1.0).optimum(law, flops), law.optimum(flops)
    assert nearly.params == pytest.approx(exact.params, rel=1e-3)
    assert nearly.loss == pytest.approx(exact.loss, rel=1e-9)


@given(LAWS, FLOPS)
def test_data_without_end_give_the_closed_form(law: Law, flops: float) -> None:
    nearly, exact = Demand(tokens_unique=1e35).optimum(law, flops), law.optimum(flops)
    assert nearly.params == pytest.approx(exact.params, rel=1e-3)
    assert Demand().optimum(law, flops) == exact


def test_sardana_finds_the_chinchilla_13b_in_a_smaller_model() -> None:
    """2401.00448, section 3: the quality of a 13B, 2e12 tokens served, 17 % fewer FLOPs as a 7B."""
    law = Law(A=406.4, B=410.7, E=1.69, alpha=0.336, beta=0.283)
    demand = Demand(tokens_served=2e12)
    loss = law.loss(13e9, law.tokens_for(13e9))
    flops = 8.005e22
    found = demand.optimum(law, flops)
    assert found.params == pytest.approx(6.969e9, rel=0.01)  # "7B"
    assert found.tokens == pytest.approx(1.248e12, rel=0.01)
    assert found.loss == pytest.approx(loss, rel=1e-4)
    assert flops / demand.flops(13e9, law.tokens_for(13e9)) == pytest.approx(0.826, abs=0.002)


@given(LAWS, FLOPS, st.floats(0.01, 1.0))
def test_no_neighbour_of_the_served_optimum_is_better(law: Law, flops: float, share: float) -> None:
    demand = Demand(tokens_served=share * law.optimum(flops).tokens)
    found = demand.optimum(law, flops)
    assert demand.flops(found.params, found.tokens) == pytest.approx(flops)
    for factor in (0.97, 1.03):
        params = factor * found.params
        assert demand.loss(law, params, demand.tokens(params, flops)) >= found.loss
    assert found.params < law.optimum(flops).params


@pytest.mark.parametrize(
    ("params", "tokens", "unique", "loss"),
    [(6.34e9, 242e9, 25e9, 2.2256440889984477), (8.67e9, 178e9, 25e9, 2.2269634087075867)],
)
def test_repeated_data_lose_what_datablations_computes(
    params: float, tokens: float, unique: float, loss: float
) -> None:
    # Values of huggingface/datablations' own code at its own constants.
    demand = Demand(tokens_unique=unique)
    assert demand.loss(find_law("muennighoff-2023"), params, tokens) == pytest.approx(
        loss, rel=1e-6
    )


@given(FLOPS, st.floats(0.02, 0.8))
def test_repeating_costs_loss_and_asks_for_more_epochs_on_a_smaller_model(
    flops: float, share: float
) -> None:
    law = find_law("muennighoff-2023")
    free = law.optimum(flops)
    found = Demand(tokens_unique=share * free.tokens).optimum(law, flops)
    assert found.loss > free.loss
    assert found.tokens >= share * free.tokens * 0.999


def test_params_for_tokens_is_the_inverse_of_tokens_for_params() -> None:
    law = find_law("hoffmann-2022")
    assert params_for(law, law.tokens_for(3e9)) == pytest.approx(3e9)


@pytest.mark.parametrize("bad", [{"tokens_served": -1.0}, {"tokens_unique": 0.0},
                                 {"tokens_served": math.inf}])  # fmt: skip
def test_an_impossible_demand_is_refused(bad: dict[str, float]) -> None:
    with pytest.raises(InputError, match=next(iter(bad))):
        Demand(**bad)


def test_serving_beyond_the_budget_is_infeasible() -> None:
    with pytest.raises(Infeasible, match="serving 1e\\+20 tokens"):
        Demand(tokens_served=1e20).optimum(find_law("besiroglu-2024"), 1e20)


@given(st.floats(-5, 5))
def test_the_lowest_point_of_a_lopsided_curve_is_found(at: float) -> None:
    assert lowest(lambda x: math.exp(x - at) - (x - at), -10, 10) == pytest.approx(at, abs=1e-4)


# --- uncertainty ------------------------------------------------------------------------------


def test_only_the_law_itself_has_its_spread() -> None:
    law = find_law("besiroglu-2024-minimum")
    assert spread_of(law) is not None
    assert spread_of(replace(law, E=1.7)) is None
    assert spread_of(find_law("hoffmann-2022")) is None


@pytest.mark.skipif(not POINTS.is_file(), reason=f"no measured runs at {POINTS}")
@pytest.mark.parametrize(("params", "tokens"), [(1e9, 2e10), (7e9, 1.4e11), (7e10, 1.4e12)])
def test_drawn_laws_give_the_intervals_of_a_bootstrap(params: float, tokens: float) -> None:
    runs = read_runs(POINTS, params="Model Size", flops="Training FLOP")
    result = fit(runs.params, runs.tokens, runs.loss, drop_worst=5, bootstrap=300, seed=7)
    spread = spread_of(find_law("besiroglu-2024-minimum"))
    assert spread is not None
    losses = [Law(*map(float, row)).loss(params, tokens) for row in result.draws]
    low, high = np.percentile(losses, [5, 95])
    span = spread.interval(lambda law: law.loss(params, tokens))
    assert span.high - span.low == pytest.approx(high - low, rel=0.3)
    assert span.low == pytest.approx(low, abs=0.3 * (high - low))
    run = spread.interval_of_run(lambda law: law.loss(params, tokens))
    predicted = result.predict(params, tokens).interval
    assert predicted is not None
    assert run.high - run.low == pytest.approx(predicted.high - predicted.low, rel=0.35)
