"""Budgets: the optimum is one, the money adds up, and what cannot be is said."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from functools import cache
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from isoflop.cli.outputs import validate
from isoflop.count import params
from isoflop.errors import Infeasible, InputError
from isoflop.hardware import parse_cluster
from isoflop.laws import Demand, find_law
from isoflop.plan import plan_train
from isoflop.plan.budgeting.plan import Ask, BudgetPlan, Choice, Kind, Refused
from isoflop.plan.budgeting.settle import plan_budget
from isoflop.plan.training.work import sequences_per_step
from isoflop.quantity.expr import FUNCTIONS

LAW = find_law("besiroglu-2024-minimum")


@cache
def spent(kind: Kind, amount: float, on: str, **more: Any) -> BudgetPlan:
    return plan_budget(Ask(kind, amount, parse_cluster(on), LAW, **more))


BUDGETS: list[tuple[Kind, float, str]] = [
    ("dollars", 1e3, "8xa100-sxm-80gb"),
    ("dollars", 2e6, "256xh100-sxm"),
    ("gpu_hours", 5e4, "64xh100-sxm"),
    ("flops", 1e21, "64xh100-sxm"),
]
budgets = pytest.mark.parametrize(("kind", "amount", "on"), BUDGETS)


@budgets
def test_the_size_chosen_beats_half_and_double(kind: Kind, amount: float, on: str) -> None:
    plan = spent(kind, amount, on)
    for other in (plan.half, plan.double):
        assert isinstance(other, Choice)
        assert other.loss > plan.chosen.loss


@budgets
def test_the_size_is_near_what_the_law_says_for_the_flops_bought(
    kind: Kind, amount: float, on: str
) -> None:
    chosen = spent(kind, amount, on).chosen
    best = LAW.optimum(6.0 * chosen.n_params * chosen.tokens)
    assert chosen.n_params == pytest.approx(best.params, rel=0.35)
    assert chosen.loss == pytest.approx(best.loss, rel=0.002)  # the optimum is flat
    assert chosen.loss >= best.loss


@budgets
def test_a_plan_of_the_chosen_model_costs_the_budget(kind: Kind, amount: float, on: str) -> None:
    plan = spent(kind, amount, on)
    nodes, chosen = plan.nodes(), plan.chosen
    assert chosen.n_params == params(chosen.arch).value
    # Again by hand: wall days from plan_train, on every accelerator paid for; and the days of
    # the steps over goodput, times what a run overruns.
    run = plan_train(chosen.arch, chosen.tokens, plan.ask.cluster, seq_len=4096,
                     global_batch=chosen.run.ask.global_batch, layout=chosen.run.layout,
                     recompute=chosen.run.ask.work.recompute)  # fmt: skip
    hours = float(run.days.value) * 24 * plan.ask.cluster.count
    steps = float(run.days.find("steps").value) * 24 * plan.ask.cluster.count
    assert hours == pytest.approx(1.25 * steps / float(nodes["goodput"].value))
    assert float(nodes["accelerator_hours"].value) == pytest.approx(hours, rel=1e-9)
    price = float(plan.ask.cluster.chip.dollars_per_hour.value)  # type: ignore[union-attr]
    spending = {
        "dollars": hours * price,
        "gpu_hours": hours,
        "flops": 6 * chosen.n_params * chosen.tokens,
    }
    assert spending[kind] == pytest.approx(amount, rel=1e-6)
    assert float(nodes["dollars"].value) == pytest.approx(hours * price)


def test_every_formula_reads_back_to_its_value() -> None:
    for name, node in spent("dollars", 2e6, "256xh100-sxm").nodes().items():
        names = {symbol.name: symbol.value for symbol in node.total.symbols().values()}
        again = eval(node.total.text, dict(FUNCTIONS), names)
        assert float(again) == pytest.approx(float(node.value), rel=1e-9), name


def test_more_money_buys_a_lower_loss() -> None:
    plans = [spent("dollars", 10.0**k, "64xh100-sxm") for k in (3, 4, 5, 6)]
    losses = [plan.chosen.loss for plan in plans]
    assert losses == sorted(losses, reverse=True)
    sizes = [plan.chosen.n_params for plan in plans]
    assert sizes == sorted(sizes)


def test_the_loss_has_a_range_where_the_law_has_one() -> None:
    plan = spent("flops", 1e21, "64xh100-sxm")
    assert plan.loss_interval is not None
    assert plan.params_interval is not None
    assert plan.chosen.loss in plan.loss_interval
    assert plan.chosen.n_params in plan.params_interval
    other = plan_budget(replace(plan.ask, law=find_law("hoffmann-2022")))
    assert other.loss_interval is None
    assert other.extrapolation is None


def test_a_law_that_leaves_embeddings_out_is_asked_about_the_rest() -> None:
    ask = replace(spent("flops", 1e19, "8xh100-sxm").ask, law=find_law("muennighoff-2023"))
    chosen = plan_budget(ask).chosen
    assert chosen.n_law == chosen.n_params - params(chosen.arch).find("embedding").value


# --- serving and few data -----------------------------------------------------------------------


def test_a_model_that_serves_is_smaller_and_trained_longer() -> None:
    plain = spent("dollars", 1e5, "64xh100-sxm")
    serves = spent("dollars", 1e5, "64xh100-sxm", demand=Demand(tokens_served=1e12))
    assert serves.chosen.n_params < plain.chosen.n_params
    assert serves.chosen.tokens / serves.chosen.n_params > 30
    assert plain.share_served == 0
    served = 2 * serves.chosen.n_params * 1e12
    trained = 6 * serves.chosen.n_params * serves.chosen.tokens
    assert serves.share_served == pytest.approx(served / (served + trained))
    # Training costs the rest of the budget.
    cost = float(serves.nodes()["dollars"].value)
    assert cost == pytest.approx(1e5 * (1 - serves.share_served), rel=1e-6)


def test_few_data_are_repeated_and_cost_loss() -> None:
    plain = spent("gpu_hours", 1e4, "64xh100-sxm")
    few = spent("gpu_hours", 1e4, "64xh100-sxm", demand=Demand(tokens_unique=2e10))
    assert few.chosen.loss > plain.chosen.loss
    assert few.epochs == pytest.approx(few.chosen.tokens / 2e10)
    assert plain.epochs == 1


def test_serving_that_takes_all_is_refused() -> None:
    with pytest.raises(Infeasible):
        plan_budget(Ask("dollars", 100, parse_cluster("8xh100-sxm"), LAW, Demand(1e20)))


# --- risk ---------------------------------------------------------------------------------------


def test_the_probability_of_ending_in_time_grows_with_the_time() -> None:
    plan = spent("dollars", 2e6, "256xh100-sxm")
    days, span = float(plan.days.value), plan.days.interval
    assert span is not None
    limits = [0.3 * days, span.low, days, span.high, 3 * days]
    shares = [plan_of.probability_in_time for plan_of in (
        replace(plan, ask=replace(plan.ask, days=limit)) for limit in limits)]  # fmt: skip
    # The middle is below even chances: what a run overruns has a long upper side.
    assert shares == pytest.approx([0, 0.05, 0.4, 0.95, 1], abs=0.1)
    assert shares[1] == pytest.approx(0.05, abs=0.01)
    assert shares[3] == pytest.approx(0.95, abs=0.01)
    assert plan.probability_in_time is None


def test_more_failures_leave_fewer_tokens() -> None:
    good = spent("dollars", 2e6, "256xh100-sxm")
    bad = spent("dollars", 2e6, "256xh100-sxm", mtbf_hours=500.0, seconds_restart=3600.0)
    assert bad.nodes()["failures"].value > 50 * good.nodes()["failures"].value
    assert bad.nodes()["goodput"].value < 0.7
    assert bad.chosen.loss > good.chosen.loss
    assert "hours_between_failures" not in {s.name for s in bad.assumptions}


# --- what cannot be -----------------------------------------------------------------------------


def test_a_model_that_does_not_fit_is_refused_with_one_that_does() -> None:
    with pytest.raises(Infeasible, match=r"what would help: more accelerators.*parameters fit"):
        spent("dollars", 1e7, "8xa100-sxm-40gb")


def test_a_neighbour_that_does_not_fit_says_so() -> None:
    plan = spent("dollars", 1.2e5, "8xh100-sxm")
    assert isinstance(plan.double, Refused)
    assert "fits" in plan.double.reason


def test_all_problems_of_an_ask_are_listed() -> None:
    with pytest.raises(InputError) as caught:
        Ask("flops", 1e21, parse_cluster("8xh100-sxm"), LAW, seq_len=0, recompute="some")  # type: ignore[arg-type]
    assert {p.field for p in caught.value.problems} == {"seq_len", "recompute"}


@pytest.mark.parametrize("amount", [0.0, -1.0, float("nan"), float("inf")])
def test_an_impossible_amount_is_refused(amount: float) -> None:
    with pytest.raises(InputError, match="dollars"):
        Ask("dollars", amount, parse_cluster("8xh100-sxm"), LAW)


# --- batches ------------------------------------------------------------------------------------


@given(st.floats(1e8, 1e14), st.sampled_from([1024, 4096, 8192]), st.integers(1, 5000))
def test_a_batch_shares_evenly_over_the_cluster(tokens: float, seq_len: int, count: int) -> None:
    batch = sequences_per_step(tokens, seq_len, count)
    assert batch >= 1
    assert batch % count == 0 or count % batch == 0


# --- the command line ---------------------------------------------------------------------------


def isoflop(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "isoflop", "plan", "budget", *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_the_command_prints_its_spec_and_its_chances() -> None:
    done = isoflop("--dollars", "1e5", "--on", "64xh100-sxm", "--days", "40", "--json")
    assert done.returncode == 0, done.stderr
    validate("plan budget", done.stdout)  # with --days, what tests/test_cli.py leaves out
    data = json.loads(done.stdout)
    assert data["dollars"] == pytest.approx(1e5, rel=1e-6)
    assert data["spec"]["d_model"] > 0
    assert 0 <= data["probability_in_time"] <= 1


def test_a_run_longer_than_the_limit_exits_three_after_its_plan() -> None:
    done = isoflop(
        "--dollars", "1e5", "--on", "64xh100-sxm", "--days", "1", "--unique-tokens", "50B"
    )
    assert done.returncode == 3
    assert "done within 1 days with under 1 %" in done.stdout
    assert "unique tokens is seen" in done.stdout
    assert "exceed the limit of 1" in done.stderr
    assert "such accelerators" in done.stderr


@pytest.mark.parametrize("given", [[], ["--flops", "1e21", "--dollars", "1e5"]])
def test_one_budget_is_asked_for(given: list[str]) -> None:
    done = isoflop(*given, "--on", "8xh100-sxm")
    assert done.returncode == 2
    assert "one of --flops, --dollars and --gpu-hours" in done.stderr
