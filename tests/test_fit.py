"""The fit: its optimum, its derivatives, what it refuses, and whether its intervals hold."""

import json
import math
import os
from functools import cache
from pathlib import Path

import numpy as np
import pytest

from isoflop.errors import InputError
from isoflop.laws import Law, Runs, find_law, read_runs
from isoflop.laws.fit import FitResult, fit
from isoflop.laws.fit.minimise import EXPONENTS_GIVEN, FREE, RATIO_GIVEN, Surface, minimise

SHARED = Path(os.environ.get("ISOFLOP_SHARED", Path(__file__).parents[2] / "shared" / "data"))
POINTS = SHARED / "laws" / "epoch_chinchilla_svg.csv"
needs_points = pytest.mark.skipif(not POINTS.is_file(), reason=f"no measured runs at {POINTS}")

#: Three sizes by three token counts: the ladder of a small study.
LADDER = [(n, d) for n in (1e4, 1e5, 1e6) for d in (1e5, 1e6, 1e7)]


def planted(law: Law, sizes=LADDER, noise: float = 0.0, seed: int = 0):
    """Columns (params, tokens, loss) of runs that follow `law` but for log-normal noise."""
    scatter = noise * np.random.default_rng(seed).standard_normal(len(sizes))
    losses = [law.loss(n, d) * math.exp(s) for (n, d), s in zip(sizes, scatter, strict=True)]
    return [n for n, _ in sizes], [d for _, d in sizes], losses


SMALL = Law(A=14.0, B=60.0, E=1.2, alpha=0.35, beta=0.4)


@cache
def chinchilla() -> Runs:
    return read_runs(POINTS, params="Model Size", flops="Training FLOP")


@cache
def chinchilla_fit() -> FitResult:
    runs = chinchilla()
    return fit(runs.params, runs.tokens, runs.loss, drop_worst=5, bootstrap=200)


@needs_points
def test_the_240_published_runs_give_the_certified_minimum():
    result = chinchilla_fit()
    # Found independently, by other programs: facts of Besiroglu 2024's objective.
    certified = {"A": 477.826, "B": 2143.417, "E": 1.817218, "alpha": 0.347310, "beta": 0.367172}
    for name, value in certified.items():
        assert getattr(result.law, name) == pytest.approx(value, rel=1e-4), name
    assert result.objective == pytest.approx(1.0182740178e-3, rel=1e-9)
    assert result.slope < 1e-9
    assert result.starts_agreeing == result.starts_tried > 100
    assert (result.n_points, len(result.dropped), result.tied) == (240, 5, "none")


@needs_points
def test_the_printed_constants_lie_within_a_tenth_of_a_standard_error():
    result = chinchilla_fit()
    printed = find_law("besiroglu-2024")
    errors = np.std(result.draws, axis=0)
    for name, error in zip(("A", "B", "E", "alpha", "beta"), errors, strict=True):
        assert abs(getattr(result.law, name) - getattr(printed, name)) < 0.1 * error, name


@needs_points
def test_the_objective_of_printed_laws_is_the_known_one():
    runs = chinchilla()
    kept = np.argsort(runs.loss)[:240]
    n, d, loss = (np.array(c)[kept] for c in (runs.params, runs.tokens, runs.loss))
    surface = Surface(np.log(n), np.log(d), np.log(loss), np.ones(240), 1e-3)
    known = {"hoffmann-2022": 0.00412101, "hoffmann-2022-unrounded": 0.00123116}
    for name, objective in known.items():
        law = find_law(name)
        point = np.log([[law.A, law.B, law.E, law.alpha, law.beta]])
        assert surface.value(point)[0] == pytest.approx(objective, rel=1e-4), name


@needs_points
def test_the_intervals_of_the_240_runs_hold_the_fit_and_a_prediction_says_how_far_it_reaches():
    result = chinchilla_fit()
    for name, interval in result.intervals.items():
        assert interval is not None
        assert getattr(result.law, name) in interval
    far = result.predict(70e9, 1.4e12)
    assert far.interval is not None
    assert far.loss in far.interval
    assert far.extrapolation_flops == pytest.approx(45.4, abs=0.1)
    best = result.optimum(5.76e23)
    for interval, value in ((best.params, best.allocation.params),
                            (best.tokens, best.allocation.tokens),
                            (best.loss, best.allocation.loss)):  # fmt: skip
        assert interval is not None
        assert value in interval


@pytest.mark.parametrize("seed", range(5))
def test_derivatives_agree_with_finite_differences(seed):
    stream = np.random.default_rng(seed)
    n = 40
    surface = Surface(*stream.normal(size=(2, n)), stream.normal(1, 0.3, n), stream.random(n), 0.1)
    point = stream.normal(scale=0.5, size=5)
    at = surface.derivatives(point[None])
    step = 1e-6 * np.eye(5)
    gradient = (surface.value(point + step) - surface.value(point - step)) / 2e-6
    np.testing.assert_allclose(at.gradient[0], gradient, atol=1e-7)
    up, down = (surface.derivatives(point + s).gradient for s in (step, -step))
    np.testing.assert_allclose(at.hessian[0], (up - down) / 2e-6, atol=1e-6)
    log_up, log_down = (surface.predicted(point + s) for s in (step, -step))
    np.testing.assert_allclose(
        surface.slopes(point[None])[0], (log_up - log_down) / 2e-6, atol=1e-7
    )


@pytest.mark.parametrize(
    "law",
    [
        SMALL,
        find_law("hoffmann-2022"),
        find_law("muennighoff-2023"),
        Law(A=900.0, B=3e4, E=0.7, alpha=0.6, beta=0.65),
    ],
)
def test_a_planted_law_is_recovered_without_noise(law):
    sizes = [(n, d) for n in (1e6, 1e7, 1e8, 1e9) for d in (1e8, 1e9, 1e10)]
    result = fit(*planted(law, sizes))
    for name in ("A", "B", "E", "alpha", "beta"):
        assert getattr(result.law, name) == pytest.approx(getattr(law, name), rel=1e-6), name
    assert result.converged
    assert result.rms_left_out < 1e-8


def test_resamples_fitted_in_a_batch_equal_each_fitted_alone():
    n, d, loss = (np.log(c) for c in planted(SMALL, noise=0.01))
    stream = np.random.default_rng(3)
    weights = stream.integers(1, 4, size=(7, 9)).astype(float)
    start = np.log([[0.3, 0.3, 1.2, 0.35, 0.4]])
    x, y = n - n.mean(), d - d.mean()
    batch = minimise(Surface(x, y, loss, weights, 1e-3), np.repeat(start, 7, axis=0))
    for row in range(7):
        alone = minimise(Surface(x, y, loss, weights[row], 1e-3), start)
        assert alone.value[0] == pytest.approx(batch.value[row], rel=1e-9)


@pytest.mark.parametrize("tie", [FREE, RATIO_GIVEN, EXPONENTS_GIVEN])
def test_a_minimum_under_a_tie_is_lower_than_its_neighbours_and_keeps_the_tie(tie):
    n, d, loss = (np.log(c) for c in planted(SMALL, noise=0.01))
    surface = Surface(n - n.mean(), d - d.mean(), loss, np.ones(9), 1e-3)
    start = np.log([[0.3, 0.3, 1.2, 0.35, 0.35]])
    found = minimise(surface, start, tie)
    assert found.converged.all()
    stream = np.random.default_rng(0)
    moves = 1e-3 * stream.standard_normal((200, tie.n_free)) @ tie.matrix.T
    assert (surface.value(found.points + moves) >= found.value * (1 - 1e-9)).all()
    if tie is not FREE:
        assert found.points[0, 4] - found.points[0, 3] == pytest.approx(0)


def test_few_runs_tie_what_they_cannot_tell_and_say_so():
    free = fit(*planted(SMALL, LADDER[:8], noise=0.001))
    assert (free.tied, free.identifiable) == ("none", "all five parameters are identified")
    five = fit(*planted(SMALL, [LADDER[i] for i in (0, 1, 2, 3, 6)], noise=0.0005))
    assert five.tied == "ratio"
    assert five.law.alpha == pytest.approx(five.law.beta)
    assert "5 runs are too few for 5 free parameters" in five.tied_reason
    four = fit(*planted(SMALL, [LADDER[i] for i in (0, 1, 3, 4)]))
    assert four.tied == "exponents"
    assert "published" in four.identifiable


def test_two_sizes_do_not_determine_an_exponent_of_their_own():
    sizes = [(n, d) for n in (1e5, 1e6) for d in (1e5, 1e6, 1e7, 1e8)]
    result = fit(*planted(SMALL, sizes))
    assert result.tied == "ratio"


def test_a_tie_widens_the_interval_of_a_prediction():
    loud, quiet = (
        fit(*planted(SMALL, LADDER[:8], noise=s, seed=2), bootstrap=100) for s in (0.03, 0.001)
    )
    spans = [r.predict(1e6, 1e7).interval for r in (loud, quiet)]
    assert loud.tied != "none"
    assert spans[0].high - spans[0].low > 5 * (spans[1].high - spans[1].low)


@pytest.mark.parametrize(
    ("noise", "alpha", "beta"), [(0.003, 0.34, 0.28), (0.003, 0.33, 0.5), (0.01, 0.5, 0.35)]
)
def test_ninety_percent_intervals_hold_the_largest_run_about_ninety_percent_of_the_time(
    noise, alpha, beta
):
    law = Law(A=0.35 * 1e5**alpha, B=0.35 * 1e6**beta, E=1.1, alpha=alpha, beta=beta)
    held, tried = 0, 70
    for seed in range(tried):
        n, d, loss = planted(law, noise=noise, seed=seed)
        interval = fit(n[:8], d[:8], loss[:8], bootstrap=100).predict(n[8], d[8]).interval
        assert interval is not None
        held += loss[8] in interval
    assert 0.80 <= held / tried <= 0.98


def test_one_seed_gives_one_result_and_two_seeds_two():
    columns = planted(SMALL, noise=0.005)
    one, same, other = (fit(*columns, bootstrap=50, seed=s) for s in (1, 1, 2))
    np.testing.assert_array_equal(one.draws, same.draws)
    assert not np.array_equal(one.draws, other.draws)


def test_draws_reproduce_the_closed_form_optimum_of_the_law():
    result = fit(*planted(SMALL), bootstrap=50)  # without noise all draws are the law itself
    best = result.optimum(1e15)
    assert best.params.low == pytest.approx(best.allocation.params, rel=1e-4)
    assert best.tokens.high == pytest.approx(best.allocation.tokens, rel=1e-4)
    assert best.loss.low == pytest.approx(best.allocation.loss, rel=1e-5)


def test_without_resamples_there_is_no_interval_and_a_reason():
    result = fit(*planted(SMALL))
    assert set(result.intervals.values()) == {None}
    assert "bootstrap" in result.intervals_reason
    prediction = result.predict(1e7, 1e8)
    assert prediction.interval is None
    assert "bootstrap" in prediction.interval_reason
    assert (prediction.extrapolation_params, prediction.extrapolation_flops) == (10, 100)
    assert result.predict(1e5, 1e6).extrapolation_tokens == 1


def test_a_result_writes_itself_as_strict_json():
    for bootstrap in (0, 50):
        result = fit(*planted(SMALL, noise=0.003), bootstrap=bootstrap)
        told = json.loads(json.dumps(result.to_json(), allow_nan=False))
        assert set(told["law"]) >= {"A", "B", "E", "alpha", "beta"}
        assert told["objective"] == result.objective
        assert told["starts_agreeing"] == result.starts_agreeing
        assert (told["intervals"]["E"] is None) == (bootstrap == 0)
        json.dumps(result.predict(1e7, 1e7).to_json(), allow_nan=False)
        json.dumps(result.optimum(1e15).to_json(), allow_nan=False)


def test_copies_and_the_worst_are_dropped_with_their_reasons():
    n, d, loss = planted(SMALL)
    result = fit([*n, n[4]], [*d, d[4]], [*loss, loss[4]], drop_worst=1)
    reasons = {run.row: run.reason for run in result.dropped}
    assert reasons == {0: "one of the 1 highest losses", 9: "a copy of an earlier run"}
    assert result.n_points == 8


def test_repeats_of_one_size_with_other_losses_are_kept():
    n, d, loss = planted(SMALL)
    assert fit([*n, n[4]], [*d, d[4]], [*loss, 1.001 * loss[4]]).n_points == 10


def test_starts_may_be_given_as_laws():
    result = fit(*planted(SMALL), starts=[find_law("hoffmann-2022")])
    assert result.starts_tried == 1
    assert result.law.alpha == pytest.approx(SMALL.alpha, rel=1e-6)


N, D, LOSS = planted(SMALL)


@pytest.mark.parametrize(
    ("columns", "rule"),
    [
        ((N[:3], D[:3], LOSS[:3]), "at least 4 runs"),
        (([], [], []), "at least 4 runs"),
        (([1e6] * 9, D, LOSS), "params=.*at least two values"),
        ((N, [1e6] * 9, LOSS), "tokens=.*at least two values"),
        (([1e4, 1e5, 1e6, 1e7], [2e5, 2e6, 2e7, 2e8], LOSS[:4]), "varies apart from params"),
        ((N, D, [*LOSS[:8], math.nan]), r"loss\[8\]=nan"),
        ((N, [-1.0] * 9, LOSS), "6 more like these"),
        ((N, D, LOSS[:8]), "three flat columns of one length"),
        ((N, D, ["x"] * 9), "only numbers"),
        (([N], [D], [LOSS]), "three flat columns"),
    ],
)
def test_runs_that_cannot_hold_a_fit_are_refused(columns, rule):
    with pytest.raises(InputError, match=rule):
        fit(*columns)


@pytest.mark.parametrize(
    "option",
    [{"delta": 0}, {"delta": math.nan}, {"bootstrap": -1}, {"bootstrap": 10**8}, {"seed": 0.5},
     {"drop_worst": 8}, {"drop_worst": -1}, {"starts": []}, {"bootstrap": True}],
)  # fmt: skip
def test_options_out_of_range_are_refused(option):
    with pytest.raises(InputError):
        fit(N, D, LOSS, **option)


@pytest.mark.parametrize("level", [0, 1, 1.5, math.nan])
def test_a_level_that_is_no_probability_is_refused(level):
    result = fit(N, D, LOSS, bootstrap=50)
    with pytest.raises(InputError, match="level"):
        result.predict(1e6, 1e7, level)
    with pytest.raises(InputError, match="level"):
        result.optimum(1e15, level)
