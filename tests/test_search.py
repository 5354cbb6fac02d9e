"""The search: its arrays are the plan's formulas, its space is what is legal, its answer the best."""

from __future__ import annotations

import itertools
import json
import random
from dataclasses import replace
from itertools import product
from typing import Any

import numpy as np
import pytest

from isoflop.arch import Arch, Experts, gpt, llama
from isoflop.arch.zoo import entry
from isoflop.errors import Infeasible, InputError
from isoflop.hardware import Cluster, parse_cluster
from isoflop.plan.layout import Layout, broken_rules
from isoflop.plan.memory.place import bytes_per_accelerator
from isoflop.plan.schedule import SCHEDULES
from isoflop.plan.search import Found, Limits
from isoflop.plan.search import search as search_all
from isoflop.plan.search.pipeline import seconds_simulated
from isoflop.plan.search.run import sub_counts
from isoflop.plan.search.space import IDLE_ONE_IN, MOST_MICRO_BATCH, Space
from isoflop.plan.search.weigh import Room, weigh
from isoflop.plan.step.seconds import step_time
from isoflop.plan.training.ask import TrainAsk
from isoflop.plan.training.work import Work

SMALL = gpt("small", d_model=512, n_layers=6, n_heads=8, vocab_size=5000, max_seq_len=4096)
GROUPED = llama("grouped", d_model=2048, n_layers=14, n_heads=16, n_kv_heads=2, d_ff=5632,
                vocab_size=32000, max_seq_len=4096)  # fmt: skip


def search(ask: TrainAsk, **more: Any) -> Found:
    """A search that simulates a few of the best only, for these tests' time."""
    return search_all(ask, n_simulated=5, **more)


def mixture() -> Arch:
    """Latent attention, one dense layer and six of experts: deepseek-v2-lite, cut short."""
    whole = entry("deepseek-v2-lite").arch
    return replace(whole, name="mixture", layers=whole.layers[:7])


def asked(arch: Arch, on: str, global_batch: int, seq_len: int = 2048, **more: Any) -> TrainAsk:
    more = {"stack": "nemo-24", **more}
    return TrainAsk(Work(arch, 10**9, seq_len), parse_cluster(on), global_batch, **more)


def space_of(ask: TrainAsk, **more: Any) -> Space:
    return Space(ask.work.arch, ask.cluster, ask.work.seq_len, ask.global_batch, **more)


def choices(space: Space) -> list[tuple[int, int]]:
    return [(int(row), int(v)) for row, v in zip(*np.nonzero(space.applies), strict=True)]


def by_one(ask: TrainAsk, layout: Layout, recompute: Any) -> tuple[float, float]:
    """Seconds and bytes of one layout, by the formulas that a plan prints."""
    own = replace(ask, layout=layout, work=replace(ask.work, recompute=recompute))
    held = bytes_per_accelerator(own.job, layout, ask.global_batch)
    return float(step_time(own.setting(layout)).value), float(held.value)


# --- arrays are the formulas ------------------------------------------------------------------


@pytest.mark.parametrize(
    "ask",
    [
        asked(SMALL, "8xa100-sxm-80gb", 48),
        asked(GROUPED, "48xh100-sxm", 96, stack="megatron-2022"),
        asked(mixture(), "64xh100-sxm", 128, seq_len=4096, stack="nemo-26"),
        asked(GROUPED, "12xmi300x", 24, stack="torchtitan"),
    ],
    ids=["one node", "grouped, no flash", "experts, one copy a domain", "mesh"],
)
def test_arrays_equal_the_printed_formulas_one_by_one(ask: TrainAsk) -> None:
    space = space_of(ask)
    timed = weigh(space, ask.job, ask.setting(Layout()), Room(np.inf))
    assert timed.row.size == len(choices(space)) > 100
    by_schedule: dict[str, list[int]] = {name: [] for name in SCHEDULES}
    for i in random.Random(1).sample(range(timed.row.size), timed.row.size):
        by_schedule[space.variations[timed.variation[i]].schedule].append(i)
    for i in itertools.chain(
        by_schedule["1f1b"][:16], *(each[:3] for each in by_schedule.values())
    ):
        varied = space.variations[timed.variation[i]]
        layout = space.layout(int(timed.row[i]), varied)
        seconds, held = by_one(ask, layout, varied.recompute)
        assert timed.seconds[i] == pytest.approx(seconds, rel=1e-9), layout
        assert timed.bytes_held[i] == pytest.approx(held, rel=1e-9), layout


# --- the space is what is legal ---------------------------------------------------------------


def brute_force(ask: TrainAsk, most_cp: int) -> set[Layout]:
    """Every legal layout of small sizes, of those with as many copies as fit, few idle."""
    arch, cluster, n = ask.work.arch, ask.cluster, ask.cluster.count
    has_experts = any(isinstance(k.feed_forward, Experts) for k in arch.kinds.values())
    found: dict[tuple[Any, ...], list[Layout]] = {}
    for tp, pp, cp, micro, virtual, sp in product(
        range(1, 9), range(1, arch.n_layers + 1), range(1, most_cp + 1),
        range(1, MOST_MICRO_BATCH + 1), range(1, arch.n_layers + 1), (True, False),
    ):  # fmt: skip
        if tp * pp * cp > n or pp * virtual > arch.n_layers or (tp == 1 and not sp):
            continue
        for dp in range(1, n // (tp * pp * cp) + 1):
            if ask.global_batch % (dp * micro):
                continue
            ways = ("ring", "all_to_all") if cp > 1 else ("ring",)
            for ep, by in product(range(1, dp * cp + 1) if has_experts else (1,), ways):
                layout = Layout(tp, pp, dp, 0, micro, cp, ep, virtual, sp, cp_by=by)  # type: ignore[arg-type]
                found.setdefault((tp, pp, cp, micro), []).append(layout)
    kept = set()
    for alike in found.values():
        most = max(layout.dp for layout in alike)
        for layout in alike:
            idle = n - layout.n_accelerators
            if layout.dp == most and IDLE_ONE_IN * idle <= n:
                broken = broken_rules(layout, arch, cluster, ask.global_batch, ask.work.seq_len)
                kept |= set() if broken else {layout}
    return kept


@pytest.mark.parametrize(
    ("ask", "most_cp"),
    [(asked(SMALL, "12xh100-sxm", 24), 1), (asked(mixture(), "16xh100-sxm", 12, seq_len=4096), 2)],
    ids=["dense", "experts"],
)
def test_the_space_is_what_brute_force_finds_legal(ask: TrainAsk, most_cp: int) -> None:
    space = space_of(ask)
    plain = next(v for v in space.variations if v.zero == 0)
    split = next(v for v in space.variations if v.zero == 1)
    legal = brute_force(ask, most_cp)
    found = [space.layout(row, plain) for row in range(space.size)]
    assert len(found) == len(set(found))
    assert {layout for layout in found if layout.shard is None} == legal
    parted = {space.layout(row, split) for row, x in enumerate(found) if x.shard is not None}
    assert parted == in_few_nodes(ask, legal)


def in_few_nodes(ask: TrainAsk, layouts: set[Layout]) -> set[Layout]:
    """Every legal way to split a copy over one, two or four nodes of eight, but not over all."""
    node = ask.cluster.size_node
    return {
        layout
        for whole in layouts
        for shard in range(2, whole.dp * whole.cp)
        if shard * whole.tp in (node, 2 * node, 4 * node)
        and not broken_rules(
            layout := replace(whole, zero=1, shard=shard),
            ask.work.arch, ask.cluster, ask.global_batch, ask.work.seq_len,
        )
    }  # fmt: skip


@pytest.mark.parametrize("arch", [SMALL, GROUPED], ids=["6 layers", "14 layers"])
def test_schedules_are_tried_wherever_they_are_legal(arch: Arch) -> None:
    ask = asked(arch, "16xh100-sxm", 48)
    space = space_of(ask, fixed={"zero": 0, "tp": 1}, recompute="none")
    tried = set()
    for row, offered in enumerate(space.applies):
        for variation, is_tried in zip(space.alike, offered, strict=True):
            layout = space.layout(row, variation)
            legal = not broken_rules(layout, arch, ask.cluster, ask.global_batch, 2048)
            assert is_tried == legal, layout
            tried |= {variation.schedule} if legal else set()
    assert tried == set(SCHEDULES)


def test_a_search_keeps_to_the_schedules_it_is_given() -> None:
    found = search(asked(SMALL, "8xa100-sxm-80gb", 48), schedules=("zb-h1", "dualpipe"))
    assert {c.layout.schedule for c in found.ranked} <= {"zb-h1", "dualpipe"}
    assert all(c.layout.pp > 1 for c in found.ranked)
    with pytest.raises(InputError, match="schedule=zb-h1: must be 1f1b where pp is 1"):
        search(ASK, schedules=("zb-h1",), fixed={"pp": 1})


def test_zero_is_tried_where_there_are_copies_to_split_over() -> None:
    space = space_of(asked(SMALL, "8xa100-sxm-80gb", 48))
    for row, v in choices(space):
        layout = space.layout(row, space.variations[v])
        assert layout.zero == 0 or layout.dp * layout.cp > 1


def test_sizes_that_the_user_fixed_stay() -> None:
    fixed = {"tp": 2, "micro_batch": 3, "zero": 2, "sequence_parallel": 0}
    space = space_of(asked(SMALL, "8xa100-sxm-80gb", 48), fixed=fixed)
    assert space.size
    for row, v in choices(space):
        layout = space.layout(row, space.variations[v])
        sizes = layout.tp, layout.micro_batch, layout.zero, layout.sequence_parallel
        assert sizes == (2, 3, 2, False)


def test_sub_counts_are_whole_nodes_that_divide_the_cluster() -> None:
    assert sub_counts(parse_cluster("48xh100-sxm")) == (8, 16, 24, 48)
    assert sub_counts(parse_cluster("4xh100-sxm")) == (4,)
    assert sub_counts(parse_cluster("12xh100-sxm")) == (12,)


# --- the answer is the best -------------------------------------------------------------------

ASK = asked(SMALL, "16xa100-sxm-80gb", 32)


@pytest.fixture(scope="module")
def found() -> Found:
    return search(ASK)


def test_brute_force_finds_the_same_best() -> None:
    fixed = {"virtual": 1, "micro_batch": 2, "sequence_parallel": 1}
    more = {"schedules": ("1f1b", "zb-h1")}
    space = space_of(ASK, counts=sub_counts(ASK.cluster), fixed=fixed, recompute="none", **more)
    assert 50 < len(choices(space)) < 500
    room = float(ASK.cluster.chip.bytes_memory.value)
    times = {}
    for row, v in choices(space):
        layout = space.layout(row, space.variations[v])
        seconds, held = by_one(ASK, layout, "none")
        if held <= room:
            times[layout] = seconds
    found = search_all(ASK, fixed=fixed, recompute_too=False, **more)
    least = min(found.ranked, key=lambda choice: choice.seconds)
    assert least.seconds == pytest.approx(min(times.values()), rel=1e-9)
    assert times[least.layout] == pytest.approx(least.seconds, rel=1e-9)


def test_the_best_is_first_by_simulation_and_its_plan_is_its_own(found: Found) -> None:
    simulated = [choice.seconds_simulated for choice in found.ranked]
    assert None not in simulated
    assert simulated == sorted(simulated)  # type: ignore[type-var]
    best = found.choice
    assert found.best.layout == best.layout
    assert found.best.seconds_step is not None
    assert float(found.best.seconds_step.value) == pytest.approx(best.seconds, rel=1e-9)
    assert float(found.best.days.value) == pytest.approx(best.days, rel=1e-9)
    assert float(found.best.dollars.value) == pytest.approx(best.dollars, rel=1e-9)
    assert float(found.best.energy_mwh.value) == pytest.approx(best.energy_mwh, rel=1e-9)


def test_more_memory_never_worsens_the_best() -> None:
    ask = asked(GROUPED, "8xa100-sxm-80gb", 16, seq_len=4096)
    times = []
    for margin in (0.93, 0.85, 0.0):
        try:
            found = search(ask, limits=Limits(memory_margin=margin), recompute_too=False)
            times.append(min(choice.seconds for choice in found.ranked))
        except Infeasible:
            times.append(np.inf)
    assert times == sorted(times, reverse=True)
    assert times[-1] < times[0]


def test_a_search_repeats_itself(found: Found) -> None:
    clock = ("seconds", "seconds_cpu", "seconds_simulation", "plans_per_second_per_core")
    first, second = ({k: v for k, v in f.to_json().items() if k not in clock}
                     for f in (found, search(ASK)))  # fmt: skip
    assert json.dumps(first) == json.dumps(second)


def test_counters_add_up_to_what_there_is(found: Found) -> None:
    counters = found.counters
    space = space_of(ASK, counts=sub_counts(ASK.cluster), schedules=("1f1b",))  # of its stack
    assert counters.evaluated == len(choices(space))  # with room enough nothing is offloaded
    assert counters.fit <= counters.evaluated
    tight = search(ASK, limits=Limits(memory_margin=0.972))
    by_memory = sum(r.count for r in tight.refused)
    assert tight.counters.fit + by_memory == tight.counters.evaluated > counters.evaluated


def test_the_nearest_refused_is_named_with_the_bytes_it_needs() -> None:
    limits = Limits(memory_margin=0.972)
    kept = search(ASK, limits=limits, fixed={"offload": "none"})
    refused = next(r for r in kept.refused if r.reason == "memory")
    space = space_of(ASK, counts=sub_counts(ASK.cluster))
    timed = weigh(space, ASK.job, ASK.setting(Layout()), Room(np.inf))
    over = timed.bytes_held[timed.bytes_held > refused.limit]
    assert refused.value == pytest.approx(over.min(), rel=1e-12)
    assert refused.over > 0


def test_the_front_holds_what_nothing_dominates(found: Found) -> None:
    front = [(choice.seconds, choice.dollars) for choice in found.front]
    assert front == sorted(front)
    assert [money for _, money in front] == sorted((money for _, money in front), reverse=True)
    for choice in found.ranked:
        assert any(s <= choice.seconds and m <= choice.dollars * (1 + 1e-12) for s, m in front)


def test_objectives_lead_to_different_plans_and_keep_their_limits() -> None:
    fastest = search(ASK)
    limit = 1.5 * fastest.choice.days
    fewest = search(ASK, minimize="accelerators", limits=Limits(days=limit))
    assert fewest.choice.days <= limit
    assert (
        fewest.choice.n_accelerators < fastest.choice.n_accelerators
        or limit < 2 * fastest.choice.days
    )
    cheapest = search(ASK, minimize="money")
    assert cheapest.choice.dollars <= min(choice.dollars for choice in fastest.front) * (1 + 1e-12)
    small = search(ASK, limits=Limits(megawatts=fastest.choice.megawatts / 1.9))
    assert small.choice.n_accelerators <= 8
    assert any(r.reason == "megawatts" for r in small.refused)


def test_a_limit_that_nothing_keeps_is_said_with_how_much() -> None:
    with pytest.raises(Infeasible, match="by days, the nearest by"):
        search(ASK, limits=Limits(days=1e-9))
    with pytest.raises(InputError, match="most days"):
        search(ASK, limits=Limits(days=-1))
    with pytest.raises(InputError, match="tp=3"):
        search(ASK, fixed={"tp": 3})


# --- simulation, sensitivity ------------------------------------------------------------------


def test_without_a_pipeline_the_simulation_is_the_formula() -> None:
    setting = ASK.setting(Layout(tp=2, dp=8, micro_batch=2))
    assert seconds_simulated([setting])[0] == pytest.approx(
        float(step_time(setting).value), rel=1e-9
    )


@pytest.mark.parametrize(
    "layout",
    [Layout(pp=3, virtual=2), *(Layout(pp=4, schedule=name) for name in SCHEDULES)],
    ids=str,
)
def test_a_long_pipeline_is_extended_from_where_it_repeats(layout: Layout) -> None:
    """What is run shorter and continued takes as long as what is run whole."""
    from isoflop.plan.search import pipeline

    arch = replace(GROUPED, layers=GROUPED.layers[:12])
    setting = replace(ASK.setting(layout), arch=arch, global_batch=60)
    short = seconds_simulated([setting])[0]
    whole, pipeline.FULL_AFTER = pipeline.FULL_AFTER, 100
    try:
        assert seconds_simulated([setting])[0] == pytest.approx(short, rel=1e-9)
    finally:
        pipeline.FULL_AFTER = whole


def test_closed_form_and_simulation_agree_within_a_tenth(found: Found) -> None:
    assert found.gap_most < 0.1


def test_sensitivity_is_the_step_time_with_one_constant_moved(found: Found) -> None:
    choice = found.choice
    assert choice.seconds_simulated is not None
    gap = choice.seconds_simulated / choice.seconds
    tree = step_time(choice.setting).total
    uncertain = {name for name, symbol in tree.symbols().items() if symbol.spread is not None}
    assert {sway.name for sway in found.sensitivity} == uncertain
    for sway in found.sensitivity[:3]:
        for value, seconds in ((sway.low, sway.seconds_low), (sway.high, sway.seconds_high)):
            assert seconds == pytest.approx(
                float(tree.evaluate({sway.name: value})) * gap, rel=1e-9
            )
    whole = [sway for sway in found.sensitivity if sway.name.startswith(("residual", "error"))]
    assert [sway.elasticity for sway in whole] == [pytest.approx(1)] * len(whole)


def test_the_runner_up_says_why_it_lost(found: Found) -> None:
    assert found.runner_up is not None
    assert "more time, mostly" in found.why


def test_a_cluster_that_is_not_whole_nodes_is_searched_too() -> None:
    odd = replace(ASK, cluster=Cluster(ASK.cluster.chip, 6), global_batch=12)
    assert search(odd).choice.n_accelerators == 6
