"""The quickest layout against every layout of its list one by one; days and their parts."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from isoflop.arch import Arch, gpt
from isoflop.arch.zoo import entry
from isoflop.check.published.run_recipes import RECIPES
from isoflop.check.published.runs import judge_runs, plan_of, read_run
from isoflop.check.published.table import Cells, Table
from isoflop.errors import Infeasible, InputError
from isoflop.hardware import parse_cluster
from isoflop.plan import Layout, plan_train
from isoflop.plan.goodput import Trouble
from isoflop.plan.memory.place import weigh
from isoflop.plan.search import search
from isoflop.plan.step.seconds import step_time
from isoflop.plan.training.ask import TrainAsk
from isoflop.plan.training.plan import planned, wall_over_steps, what_if
from isoflop.plan.training.quickest import listed, quickest
from isoflop.plan.training.work import Work

SMALL = gpt("small", d_model=512, n_layers=8, n_heads=8, vocab_size=5000, max_seq_len=4096)
LLAMA = entry("llama-3-8b").arch


def asked(arch: Arch, on: str, batch: int, seq_len: int, **more: Any) -> TrainAsk:
    work = Work(arch, 10**10, seq_len)
    return TrainAsk(work, parse_cluster(on), batch, **{"may_recompute": True, **more})


def one_by_one(ask: TrainAsk) -> float:
    """Seconds of the quickest that fits, each weighed and timed by the formulas that print."""
    best = float("inf")
    policies = ("none", "selective", "full") if ask.may_recompute else (ask.work.recompute,)
    for layout in listed(ask):
        for policy in policies:
            own = replace(ask, work=replace(ask.work, recompute=policy), layout=layout)
            seconds = float(step_time(own.setting(layout)).value)
            if seconds < best and weigh(own.job, layout, ask.cluster, ask.global_batch)[1] is None:
                best = seconds
    return best


CASES = {
    "one machine": asked(SMALL, "8xa100-sxm-80gb", 16, 1024),
    "memory binds": asked(LLAMA, "8xh100-sxm", 8, 8192, micro_batch=1),
    "recomputation said": asked(LLAMA, "16xh100-sxm", 16, 2048, micro_batch=2, may_recompute=False),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_the_quickest_is_that_of_all_listed(case: str) -> None:
    found = quickest(CASES[case])
    assert found is not None
    assert found.best.seconds == pytest.approx(one_by_one(CASES[case]), rel=1e-9)
    assert found.runner_up is not None
    assert found.runner_up.seconds >= found.best.seconds


@pytest.mark.parametrize(
    ("model", "on", "batch", "seq_len"),
    [("llama-3-8b", "64xh100-sxm", 1024, 8192), ("gpt3-175b", "1024xa100-sxm-80gb", 512, 2048)],
)
def test_the_list_comes_near_the_search_of_all_layouts(
    model: str, on: str, batch: int, seq_len: int
) -> None:
    ask = asked(entry(model).arch, on, batch, seq_len)
    found, least = quickest(ask), search(ask, n_simulated=1).choice
    assert found is not None
    assert least.seconds <= found.best.seconds * (1 + 1e-9)
    assert found.best.seconds < 1.05 * least.seconds


def test_what_is_refused_is_quicker_and_too_large() -> None:
    ask = CASES["memory binds"]
    found = quickest(ask)
    assert found is not None
    assert found.n_refused >= len(found.refused) > 0
    assert found.binding.startswith("memory")
    for refusal in found.refused:
        work = replace(ask.work, recompute=refusal.recompute)
        own = replace(ask, work=work, layout=refusal.layout)
        assert float(step_time(own.setting(refusal.layout)).value) < found.best.seconds
        assert refusal.bytes_over > 0


def test_more_memory_never_makes_the_quickest_slower() -> None:
    ask, last = CASES["memory binds"], float("inf")
    for gigabytes in (80, 100, 140, 200):
        room = replace(ask.cluster.chip.bytes_memory, given=gigabytes * 10**9)
        chip = replace(ask.cluster.chip, bytes_memory=room)
        found = quickest(replace(ask, cluster=replace(ask.cluster, chip=chip)))
        assert found is not None
        assert found.best.seconds <= last
        last = found.best.seconds


def test_what_is_said_of_the_layout_is_kept() -> None:
    ask = asked(LLAMA, "16xh100-sxm", 64, 8192)
    assert planned(replace(ask, micro_batch=2)).layout.micro_batch == 2
    work = replace(ask.work, recompute="full")
    assert planned(replace(ask, work=work, may_recompute=False)).ask.work.recompute == "full"
    layout = Layout(tp=4, dp=4, zero=1)
    given = planned(replace(ask, layout=layout))
    assert given.layout == layout
    assert given.ranking is None
    assert what_if(planned(ask), recompute="full", layout=None).ask.work.recompute == "full"


def test_a_run_that_fits_nowhere_says_so_under_all_recomputation() -> None:
    with pytest.raises(Infeasible, match="recompute=full"):
        planned(asked(entry("llama-3-70b").arch, "8xh100-sxm", 8, 8192))


# --- wall time ----------------------------------------------------------------------------------


def test_days_are_steps_checkpoints_failures_and_what_overruns() -> None:
    plan = planned(asked(LLAMA, "512xh100-sxm", 1024, 8192))
    parts = {part.name: float(part.value) for part in plan.days.children}
    assert list(parts) == ["steps", "checkpoints", "failures", "overrun"]
    assert sum(parts.values()) == pytest.approx(float(plan.days.value))
    assert plan.seconds_step is not None
    steps = 10**10 / (1024 * 8192) * float(plan.seconds_step.value) / 86_400
    assert parts["steps"] == pytest.approx(steps)
    assert parts["overrun"] == pytest.approx(0.25 * (sum(parts.values()) - parts["overrun"]))
    goodput = float(plan.nodes()["goodput"].value)
    assert float(plan.days.value) == pytest.approx(1.25 * steps / goodput)
    hours = float(plan.accelerator_hours.value)
    assert hours == pytest.approx(24 * 512 * float(plan.days.value))
    ask = plan.ask
    assert wall_over_steps(ask, 512) == pytest.approx(float(plan.days.value) / steps)
    for part in plan.days.children:
        assert part.interval is not None
        assert float(part.value) in part.interval


def test_a_run_under_llama_3s_trouble_trains_over_90_percent_of_the_time() -> None:
    # 2407.21783, 3.3.4: 419 unexpected interruptions of 16,384 H100 in 54 days, > 90 % effective.
    ask = asked(entry("llama-3.1-405b").arch, "16384xh100-sxm", 2048, 8192)
    nodes = planned(replace(ask, trouble=Trouble(54 * 24 * 16384 / 419))).nodes()
    assert 0.9 < float(nodes["goodput"].value) < 0.97


def test_nothing_comes_on_top_of_a_rate_unless_something_is_said() -> None:
    ask = asked(LLAMA, "512xh100-sxm", 1024, 8192, mfu=0.4)
    plain = planned(ask)
    assert plain.days.interval is None
    assert not plain.days.children
    assert plain.seconds_step is None
    assert float(plain.mfu.value) == pytest.approx(0.4)
    failing = planned(replace(ask, trouble=Trouble(mtbf_hours=500)))
    assert float(failing.mfu.value) == pytest.approx(0.4)
    assert float(failing.days_steps.value) == pytest.approx(float(plain.days.value))
    assert float(failing.days.value) > 1.1 * float(plain.days.value)
    free = planned(replace(ask, trouble=Trouble(mtbf_hours=1e12, overrun=1)))
    assert float(free.days.value) == pytest.approx(float(plain.days.value), rel=0.01)


# --- where no step can be timed ------------------------------------------------------------------


@pytest.mark.parametrize(
    ("model", "on", "says"),
    [("t5-base", "8xa100-sxm-80gb", "arch.encoder"), ("llama-3-8b", "64xtpu-v4", "tpu-v4 computes in"),
     ("llama-3-8b", "16xm4-max", "bytes_per_second_network")],
)  # fmt: skip
def test_where_no_step_can_be_timed_a_share_of_the_roofline_is_said_to_be_assumed(
    model: str, on: str, says: str
) -> None:
    prices: dict[str, Any] = {"price": 1, "watts": 100}
    plan = plan_train(
        entry(model).arch, 10**9, parse_cluster(on), seq_len=512, global_batch=64, **prices
    )
    assert plan.seconds_step is None
    assert plan.stack is None
    assert "utilization_of_roofline" in {s.name for s in plan.assumptions}
    (note,) = (n for n in plan.notes if "roofline" in n)
    assert says in note
    with pytest.raises(InputError):
        plan_train(entry(model).arch, 10**9, parse_cluster(on), seq_len=512, global_batch=64,
                   stack="unknown", **prices)  # fmt: skip


# --- whole published runs ------------------------------------------------------------------------


PYTHIA = {"row_id": "R", "model": "Pythia-1.4B", "tokens": "3e11", "hardware": "A100 40GB",
          "num_gpus": "64", "gpu_hours": "7120"}  # fmt: skip


def test_a_run_is_planned_as_its_recipe_says() -> None:
    plan = plan_of(Cells(PYTHIA, 2))
    layout = plan.layout
    assert (layout.tp, layout.dp, layout.micro_batch, layout.zero) == (1, 64, 16, 1)
    assert (plan.ask.work.recompute, plan.stack) == ("full", "gpt-neox-2023")
    assert plan.ranking is None


def test_what_a_row_says_goes_before_its_recipe() -> None:
    ask = read_run(Cells({**PYTHIA, "micro_batch": "2", "global_batch_seqs": "512"}, 2))
    assert (ask.micro_batch, ask.global_batch) == (2, 512)
    said = {"tp": "2", "pp": "1", "stack": "llm-foundry", "recompute": "none", "seq_len": "1024"}
    plan = plan_of(Cells({**PYTHIA, **said}, 2))
    assert (plan.layout.tp, plan.stack, plan.ask.work.seq_len) == (2, "llm-foundry", 1024)


@pytest.mark.parametrize("told", [{"mfu_pct": "99"}, {"gpu_hours": "1"}, {"wall_days": "1"}])
def test_no_rate_and_no_hours_are_inputs_of_a_run(told: dict[str, str]) -> None:
    plain, other = (plan_of(Cells(row, 2)) for row in (PYTHIA, {**PYTHIA, **told}))
    assert other.accelerator_hours.value == plain.accelerator_hours.value


#: Columns that say how a step is split.
LAYOUT_CELLS = ("tp", "pp", "cp", "ep", "virtual_pp", "micro_batch", "recompute", "zero_fsdp",
                "sequence_parallel")  # fmt: skip


def test_no_recipe_holds_a_rate() -> None:
    allowed = {"tokens", "num_gpus", "seq_len", "global_batch_seqs", "precision", "stack",
               *LAYOUT_CELLS}  # fmt: skip
    for recipe in RECIPES.values():
        assert {*recipe.cells, *recipe.instead} <= allowed
        assert recipe.source


def test_bad_cells_of_a_run_are_named_by_row_and_column() -> None:
    for cell, says in (({"num_gpus": "0"}, "num_gpus"), ({"seq_len": "10000"}, "seq_len"),
                       ({"recompute": "some"}, "recompute")):  # fmt: skip
        with pytest.raises(InputError, match="row 2") as error:
            judge_runs(Table("made", "run", ({**PYTHIA, **cell},), (2,)))
        assert says in str(error.value)
