"""Goodput: simulated failures are the oracle, beside identities and published runs."""

from __future__ import annotations

import math
import random
from statistics import fmean, stdev

import pytest
from hypothesis import given
from hypothesis import strategies as st

from isoflop.errors import InputError
from isoflop.plan.goodput import (
    LUCK,
    Rhythm,
    interval_daly,
    interval_young,
    rhythm,
    slowdown_stragglers,
)
from isoflop.quantity import Symbol, number
from isoflop.quantity.expr import FUNCTIONS, Value

HOUR, DAY = 3600.0, 86400.0


def fixed(
    between: float, interval: float, stall: float, lag: float = 0.0, restart: float = 0.0
) -> Rhythm:
    return Rhythm(*map(number, (between, interval, stall, lag, restart)))


def simulate(run: Rhythm, training: float, draw: random.Random) -> tuple[float, int]:
    """Wall seconds of one run and its failures: checkpoint by checkpoint, failure by failure."""
    between, interval, stall, lag, restart = (
        float(e.value) for e in (run.between_failures, run.interval, run.stall, run.lag, run.restart)
    )  # fmt: skip
    clock, safe, failures = 0.0, 0.0, 0
    while True:
        fails_at = clock + draw.expovariate(1 / between)
        now, work = clock, safe
        written: list[tuple[float, float]] = []
        while now < fails_at:
            step = min(interval, training - work)
            if now + step > fails_at:
                break
            now, work = now + step, work + step
            if work >= training:
                return now, failures
            now += stall
            written.append((now + lag, work))
        clock, failures = fails_at, failures + 1
        safe = max([safe, *(state for moment, state in written if moment <= fails_at)])
        while (again := draw.expovariate(1 / between)) < restart:
            clock, failures = clock + again, failures + 1
        clock += restart


def many(run: Rhythm, training: float, runs: int, seed: int) -> tuple[list[float], list[int]]:
    draw = random.Random(seed)
    walls, failures = zip(*(simulate(run, training, draw) for _ in range(runs)), strict=True)
    return list(walls), list(failures)


RUNS = {
    "rare failures": fixed(8 * HOUR, 1800, 60, restart=600),
    "failures every few checkpoints": fixed(HOUR, 1200, 120, restart=900),
    "a lag shorter than the interval": fixed(2.75 * HOUR, 600, 10, lag=300, restart=600),
    "several checkpoints on their way": fixed(2 * HOUR, 300, 5, lag=1000, restart=300),
}


@pytest.mark.parametrize("run", RUNS.values(), ids=RUNS)
def test_goodput_is_that_of_simulated_runs(run: Rhythm) -> None:
    training = 40 * DAY
    walls, _ = many(run, training, runs=60, seed=1)
    shares = [training / wall for wall in walls]
    error = stdev(shares) / math.sqrt(len(shares))
    assert error < 0.004
    assert abs(float(run.goodput.value) - fmean(shares)) < 3 * error + 1e-4  # ends of a run


def test_expected_failures_are_those_of_simulated_runs() -> None:
    run = RUNS["rare failures"]
    walls, failures = many(run, 20 * DAY, runs=200, seed=2)
    expected = float(run.failures(number(fmean(walls))).value)
    assert abs(fmean(failures) - expected) < 3 * stdev(failures) / math.sqrt(len(failures))


def test_the_probability_of_a_failure_is_the_share_of_simulated_runs_with_one() -> None:
    run = fixed(30 * DAY, 1800, 10, restart=600)
    walls, failures = many(run, 20 * DAY, runs=2000, seed=3)
    share = fmean(n > 0 for n in failures)
    without = float(run.probability_of_failure(number(min(walls))).value)
    assert without == pytest.approx(share, abs=3 * math.sqrt(share * (1 - share) / 2000))


@pytest.mark.parametrize("days_more", [-1.0, 0.0, 1.0, 2.0])
def test_the_risk_of_a_missed_deadline_is_that_of_simulated_runs(days_more: float) -> None:
    run = fixed(6 * HOUR, 2400, 30, restart=1200)
    training = 60 * DAY
    wall = run.seconds_wall(number(training))
    deadline = float(wall.value) + days_more * 0.1 * DAY
    walls, _ = many(run, training, runs=400, seed=4)
    share = fmean(w <= deadline for w in walls)
    assert wall.probability_below(deadline) == pytest.approx(share, abs=0.08)


@pytest.mark.parametrize(
    "run", [RUNS["rare failures"], fixed(30 * HOUR, 1200, 30, restart=2 * HOUR)]
)
def test_the_spread_of_wall_time_is_that_of_simulated_runs(run: Rhythm) -> None:
    """Where a period is most of what a failure costs, and where the restart is."""
    walls, _ = many(run, 60 * DAY, runs=400, seed=5)
    wall = run.seconds_wall(number(60 * DAY))
    lucky = float(wall.evaluate({LUCK.name: 1})) - float(wall.value)
    assert lucky == pytest.approx(stdev(walls), rel=0.15)


def test_a_lucky_run_takes_its_steps_and_its_checkpoints() -> None:
    """A day of a run that fails once a month, where a normal distribution would give time back."""
    run = fixed(30 * DAY, 1800, 60, restart=600)
    wall = run.wall(number(DAY))
    failures = wall.find("failures").interval
    assert failures is not None
    assert failures.low == 0 < failures.high
    assert float(wall.total.evaluate({LUCK.name: -9})) == pytest.approx(DAY * (1 + 60 / 1800))


# --- identities ---------------------------------------------------------------------------

seconds = st.floats(1.0, 1e4)


@given(seconds, seconds, seconds)
def test_without_failures_only_the_stalls_are_lost(
    interval: float, stall: float, restart: float
) -> None:
    run = fixed(1e30, interval, stall, restart=restart)
    assert float(run.goodput.value) == pytest.approx(interval / (interval + stall))
    assert float(fixed(1e30, interval, 0, restart=restart).goodput.value) == pytest.approx(1)
    assert float(run.failures(number(1e6)).value) == pytest.approx(0, abs=1e-20)


@given(seconds, seconds, seconds, seconds, st.floats(1e3, 1e7))
def test_goodput_is_a_share_that_every_trouble_lowers(
    interval: float, stall: float, lag: float, restart: float, between: float
) -> None:
    run = fixed(between, interval, stall, lag, restart)
    share = float(run.goodput.value)
    assert 0 < share < 1
    worse = [
        fixed(between / 2, interval, stall, lag, restart),
        fixed(between, interval, 2 * stall, lag, restart),
        fixed(between, interval, stall, 2 * lag, restart),
        fixed(between, interval, stall, lag, 2 * restart),
    ]
    assert all(float(other.goodput.value) < share for other in worse)


@pytest.mark.parametrize("stall", [1.0, 30.0, 300.0, 1500.0])
def test_the_daly_interval_is_the_minimum_of_lost_time(stall: float) -> None:
    between = 2.8 * HOUR
    best = float(interval_daly(number(stall), number(between)).value)

    def share(interval: float) -> float:
        return float(fixed(between, interval, stall, restart=600).goodput.value)

    tried = [best * (1 + k / 200) for k in range(-150, 151)]
    top = max(tried, key=share)
    assert top == pytest.approx(best, rel=0.02)
    assert share(best) > share(top) - 1e-5
    young = float(interval_young(number(stall), number(between)).value)
    assert share(best) >= share(young)


def test_a_stall_beyond_twice_the_time_between_failures_is_followed_by_that_time() -> None:
    assert interval_daly(number(1000), number(400)).value == 400  # Daly 2006, equation 37


# --- the rhythm of real runs ------------------------------------------------------------------


def llama3_405b() -> Rhythm:
    """405B parameters of 14 bytes on 16,384 accelerators, isoflop's own assumptions."""
    return rhythm(14 * number(405.9e9), Symbol("n_accelerators_used", 16384))


def test_llama_3_trained_more_than_nine_tenths_of_its_time() -> None:
    run = llama3_405b()
    # 2407.21783, section 3.3.4: 419 unexpected interruptions in 54 days, over 90 % effective.
    failures = float(run.failures(number(54 * DAY)).value)
    assert failures == pytest.approx(419, rel=0.2)
    assert 0.9 < float(run.goodput.value) < 0.97


def test_blocking_checkpoints_cost_more() -> None:
    state, accelerators = number(5.7e12), Symbol("n_accelerators_used", 16384)
    waits = rhythm(state, accelerators, blocking=True)
    assert float(waits.goodput.value) < float(rhythm(state, accelerators).goodput.value)
    assert waits.lag.value == 0


def test_a_checkpoint_is_written_before_the_next_is_taken() -> None:
    run = rhythm(number(1e15), Symbol("n_accelerators_used", 16384))
    assert run.interval.value == run.lag.value


def test_the_formula_of_goodput_reads_back_to_its_value() -> None:
    goodput = llama3_405b().goodput
    names: dict[str, Value] = {name: s.value for name, s in goodput.symbols().items()}
    assert eval(goodput.text, dict(FUNCTIONS), names) == pytest.approx(goodput.value, rel=1e-12)
    span = goodput.interval()
    assert span is not None
    assert 0 < span.low < float(goodput.value) < span.high < 1


# --- stragglers -------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [1, 2, 8, 256, 4096])
def test_a_step_waits_for_the_slowest_of_simulated_accelerators(n: int) -> None:
    draw = random.Random(n)
    slowest = [max(draw.gauss(1, 0.02) for _ in range(n)) for _ in range(60 if n > 256 else 600)]
    error = stdev(slowest) / math.sqrt(len(slowest))
    predicted = float(slowdown_stragglers(n, number(0.02)).value)
    assert abs(predicted - fmean(slowest)) < 3 * error + 0.02 * 0.05  # Blom: within 0.05 sd


def test_no_accelerators_have_no_slowest() -> None:
    with pytest.raises(InputError, match="n_accelerators=0"):
        slowdown_stragglers(0, number(0.01))
