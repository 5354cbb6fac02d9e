"""State and activations in the host's memory: what leaves an accelerator, and what it costs."""

from __future__ import annotations

import random
from dataclasses import replace
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from isoflop.arch import Arch, llama
from isoflop.arch.zoo import entry
from isoflop.count.memory_rank import Trained, host_rank, memory_rank
from isoflop.count.memory_saved import Recompute
from isoflop.count.memory_split import OFFLOADS, Offload
from isoflop.count.memory_state import TRAINING_STATES
from isoflop.count.params import params
from isoflop.count.workload import Workload
from isoflop.errors import Infeasible, InputError
from isoflop.hardware import Cluster, find, find_node, node_names, parse_cluster
from isoflop.plan.emit import emitted
from isoflop.plan.layout import Layout, broken_rules
from isoflop.plan.memory.place import bytes_per_accelerator, bytes_per_host
from isoflop.plan.memory.shard import shards_of
from isoflop.plan.schedule import ScheduleName
from isoflop.plan.search import search
from isoflop.plan.search.space import Space
from isoflop.plan.search.weigh import Room, weigh
from isoflop.plan.step.seconds import step_time
from isoflop.plan.step.setting import Setting
from isoflop.plan.training.plan import TrainAsk, plan_train
from isoflop.plan.training.work import Work

DENSE = llama("dense", d_model=1024, n_layers=8, n_heads=16, n_kv_heads=4, d_ff=2816,
              vocab_size=32000, max_seq_len=4096)  # fmt: skip
MIXED = replace(entry("deepseek-v2-lite").arch, layers=entry("deepseek-v2-lite").arch.layers[:5])
STATE = TRAINING_STATES["bf16"]

layouts = st.builds(
    Layout,
    tp=st.sampled_from([1, 2]),
    pp=st.sampled_from([1, 2, 4]),
    dp=st.sampled_from([1, 4]),
    cp=st.sampled_from([1, 2]),
    zero=st.sampled_from([0, 1, 2, 3]),
    micro_batch=st.sampled_from([1, 2]),
)
recomputes = st.sampled_from(["none", "selective", "full"])
offloads = st.sampled_from(OFFLOADS[1:])
archs = st.sampled_from([DENSE, MIXED])


def setting(layout: Layout, arch: Arch = DENSE, **more: object) -> Setting:
    plain: dict[str, object] = {"seq_len": 2048, "global_batch": 64, "stack": "nemo-24", **more}
    return Setting(arch, Cluster(find("h100-sxm"), layout.n_accelerators), layout, **plain)  # type: ignore[arg-type]


def seconds(setting: Setting) -> float:
    return float(step_time(setting).value)


def job(arch: Arch, recompute: Recompute) -> Trained:
    return Trained(arch, Workload.train(1, 2048), STATE, recompute)


# --- memory -----------------------------------------------------------------------------------


@given(layouts, offloads, recomputes, archs)
@settings(max_examples=40, deadline=None)
def test_what_leaves_an_accelerator_is_on_its_host(
    layout: Layout, offload: Offload, recompute: Recompute, arch: Arch
) -> None:
    """Byte for byte, and beside it the copy of gradients that the host's Adam reads."""
    work, away = job(arch, recompute), replace(layout, offload=offload)
    whole, left = (memory_rank(work, shards_of(x), n_micro=4) for x in (layout, away))
    host = host_rank(work, shards_of(away), n_micro=4)
    copied = 0
    if "optimizer" in offload:
        sharded = replace(layout, zero=max(layout.zero, 2))
        state = layout if layout.zero == 0 else sharded
        copied = memory_rank(work, shards_of(state)).find("bytes_grads").value
    assert Fraction(left.value) + Fraction(host.value) == Fraction(whole.value) + Fraction(copied)


@given(layouts, offloads, recomputes, archs)
@settings(max_examples=40, deadline=None)
def test_offloading_never_adds_to_an_accelerator(
    layout: Layout, offload: Offload, recompute: Recompute, arch: Arch
) -> None:
    work = job(arch, recompute)
    before = bytes_per_accelerator(work, layout, 64)
    after = bytes_per_accelerator(work, replace(layout, offload=offload), 64)
    assert Fraction(after.value) <= Fraction(before.value)


def test_nothing_is_on_the_host_unless_asked_for() -> None:
    work = job(DENSE, "none")
    assert host_rank(work, shards_of(Layout(dp=4, zero=1))).value == 0
    assert bytes_per_host(work, Layout(), parse_cluster("h100-sxm"), 8) is None


def test_zero_offload_keeps_twelve_bytes_a_weight_and_the_gradients_on_the_host() -> None:
    """Ren 2021, section 3: fp32 weights and both moments, beside 16-bit weights on the chip."""
    n = params(DENSE).value
    work, layout = job(DENSE, "none"), Layout(dp=8, zero=1, offload="optimizer")
    host = bytes_per_host(work, layout, parse_cluster("8xh100-sxm"), 64)
    assert host is not None
    assert host.value == (12 + 2) * n
    everywhere = bytes_per_host(work, replace(layout, zero=0), parse_cluster("8xh100-sxm"), 64)
    assert everywhere is not None
    assert everywhere.value == 8 * host.value


def test_two_layers_stay_however_deep_the_model_is() -> None:
    shallow, deep = DENSE, replace(DENSE, layers=DENSE.layers * 4)
    shards = shards_of(Layout(offload="activations"))
    one, other = (
        memory_rank(job(arch, "none"), shards).find("bytes_activations").find("layers_resident")
        for arch in (shallow, deep)
    )
    assert one.value == other.value
    layer = memory_rank(job(DENSE, "none"), shards_of(Layout())).find("bytes_activations/layer")
    assert one.value == 2 * layer.size.value


# --- time -------------------------------------------------------------------------------------


@given(layouts, offloads, recomputes)
@settings(max_examples=15, deadline=None)
def test_offloading_never_makes_a_step_faster_and_its_parts_add_up(
    layout: Layout, offload: Offload, recompute: Recompute
) -> None:
    plain = setting(layout, recompute=recompute)
    away = setting(replace(layout, offload=offload), recompute=recompute)
    tree = step_time(away)
    assert float(tree.value) >= seconds(plain) * (1 - 1e-12)
    parts = sum(float(child.value) for child in tree.children)
    assert float(tree.value) == pytest.approx(parts * float(tree.times.value), rel=1e-12)
    assert ("offload" in {c.name for c in tree.children}) == ("activations" in offload)


@given(layouts, offloads, st.sampled_from(["bytes_per_second_link", "bytes_per_second_memory"]))
@settings(max_examples=15, deadline=None)
def test_a_faster_host_never_slows_a_step(layout: Layout, offload: Offload, field: str) -> None:
    before = setting(replace(layout, offload=offload))
    chip = before.cluster.chip
    assert chip.host is not None
    old = getattr(chip.host, field)
    host = replace(chip.host, **{field: replace(old, given=2 * old.given)})
    after = replace(before, cluster=replace(before.cluster, chip=replace(chip, host=host)))
    assert seconds(after) <= seconds(before) * (1 + 1e-12)


def test_adam_on_the_host_takes_its_bytes_over_the_hosts_bandwidth_at_least() -> None:
    layout = Layout(dp=8, zero=1, offload="optimizer")
    step = step_time(setting(layout)).find("optimizer")
    least = 30 * params(DENSE).value / (614e9 * 0.8)  # at the most that STREAM reaches
    assert float(step.value) > least
    plain = step_time(setting(replace(layout, offload="none"))).find("optimizer")
    assert float(step.value) > 20 * float(plain.value)


def test_zero_offloads_adam_takes_what_was_published() -> None:
    """Ren 2021, table 4, as remembered: one billion weights in 0.22 s on a DGX-2's processors."""
    use = find_node("dgx-2").chip_inside.host
    assert use is not None
    share = next(s for s in step_time(setting(Layout(offload="optimizer"))).assumptions
                 if s.name == "share_host_memory")  # fmt: skip
    assert share.spread is not None
    rate = float(use.bytes_per_second_memory.value)
    slow, fast = (30e9 / (rate * s) for s in (share.spread.low, share.spread.high))
    assert fast < 0.22 < slow


# --- rules and refusals -----------------------------------------------------------------------


def test_offloading_needs_a_host_that_is_stated_and_a_known_name() -> None:
    cluster = parse_cluster("mi300a")
    bad = broken_rules(Layout(offload="optimizer"), DENSE, cluster, 8)
    assert [p.field for p in bad] == ["offload"]
    wrong = broken_rules(Layout(offload="nvme"), DENSE, parse_cluster("h100-sxm"), 8)  # type: ignore[arg-type]
    assert "optimizer+activations" in wrong[0].rule


def test_a_host_that_is_too_small_refuses_by_how_much() -> None:
    big = entry("llama-3-70b").arch
    cluster = parse_cluster("8xh200-sxm")
    layout = Layout(tp=8, offload="optimizer")
    with pytest.raises(Infeasible, match="of a host, largest part bytes_optimizer"):
        # State of 207 billion weights: 14 bytes each on one machine of 2 TB.
        plan_train(replace(big, layers=big.layers * 3), 10**9, cluster, seq_len=8, global_batch=8,
                   recompute="full", layout=layout)  # fmt: skip


def test_every_machine_has_a_host_or_says_that_it_is_not_stated() -> None:
    for name in node_names():
        chip = find_node(name).chip_inside
        assert (chip.host is None) == ("host" in chip.not_stated())
        if chip.host is not None:
            assert chip.host.bytes_per_second_link.value < chip.bytes_per_second_memory.value
            assert "host" not in chip.to_json()["not_stated"]


# --- the search -------------------------------------------------------------------------------


@pytest.mark.parametrize("offload", OFFLOADS[1:])
def test_arrays_equal_the_printed_formulas_of_offloaded_layouts(offload: Offload) -> None:
    ask = TrainAsk(Work(MIXED, 10**9, 2048), parse_cluster("16xh100-sxm"), 32, stack="nemo-24")
    fixed = {"offload": offload, "micro_batch": 2}
    space = Space(MIXED, ask.cluster, 2048, 32, fixed)
    timed = weigh(space, ask.job, ask.setting(Layout()), Room(np.inf))
    for i in random.Random(3).sample(range(timed.row.size), 12):
        varied = space.variations[timed.variation[i]]
        layout = space.layout(int(timed.row[i]), varied)
        assert layout.offload == offload
        own = replace(ask, layout=layout, work=replace(ask.work, recompute=varied.recompute))
        held = bytes_per_accelerator(own.job, layout, 32)
        host = bytes_per_host(own.job, layout, ask.cluster, 32)
        assert host is not None
        assert timed.bytes_held[i] == pytest.approx(float(held.value), rel=1e-9), layout
        each = float(host.value) / float(host.times.value)
        assert timed.bytes_host[i] == pytest.approx(each, rel=1e-9), layout
        assert timed.seconds[i] == pytest.approx(seconds(own.setting(layout)), rel=1e-9), layout


def test_a_search_offloads_what_fits_in_no_other_way() -> None:
    """13 billion weights on two chips: 16 bytes a weight are 208 GB, 4 are 52."""
    arch = entry("gpt3-13b").arch
    ask = TrainAsk(Work(arch, 10**9, 2048), parse_cluster("2xa100-sxm-80gb"), 8, stack="nemo-24")
    with pytest.raises(Infeasible):
        search(ask, fixed={"offload": "none"}, n_simulated=3)
    found = search(ask, n_simulated=3)
    assert "optimizer" in found.choice.layout.offload
    assert found.best.bytes_per_host is not None
    assert "bytes_per_host" in found.best.to_json()


def test_pruning_loses_no_better_plan() -> None:
    """Every offload weighed on every split finds the same best."""
    ask = TrainAsk(Work(DENSE, 10**9, 2048), parse_cluster("8xh100-sxm"), 16, stack="nemo-24")
    fixed = {"virtual": 1, "sequence_parallel": 1}
    chip = replace(find("h100-sxm"), bytes_memory=replace(find("h100-sxm").bytes_memory, given=6e9))
    small = replace(ask, cluster=Cluster(chip, 8))
    best = search(small, fixed=fixed, n_simulated=1).choice.seconds
    each = []
    for offload in OFFLOADS:
        try:
            each.append(search(small, fixed={**fixed, "offload": offload}, n_simulated=1))
        except Infeasible:
            continue
    assert best == pytest.approx(min(found.choice.seconds for found in each), rel=1e-12)


# --- what trainers read -----------------------------------------------------------------------


def text(kind: str, layout: Layout, **more: object) -> str:
    plan = plan_train(DENSE, 10**9, parse_cluster("16xh100-sxm"), seq_len=1024, global_batch=16,
                      layout=layout, **more)  # type: ignore[arg-type]  # fmt: skip
    return emitted(kind, plan)


def test_megatron_offloads_its_optimizer_and_its_layers() -> None:
    lines = text("megatron", Layout(dp=8, zero=1, offload="optimizer+activations")).splitlines()
    assert "--optimizer-cpu-offload" in lines
    assert "--cpu-offloading-num-layers 7" in lines
    with pytest.raises(InputError, match="offload"):
        text("megatron", Layout(pp=2, offload="activations"))
    with pytest.raises(InputError, match="offload"):
        text("megatron", Layout(offload="activations"), recompute="full")


def test_torchtitan_and_recipes_refuse_to_offload() -> None:
    for kind in ("torchtitan", "recipe"):
        with pytest.raises(InputError, match="offload=optimizer"):
            text(kind, Layout(offload="optimizer"))


@pytest.mark.parametrize("schedule", ["gpipe", "zb-h1", "zb-h2", "dualpipe", "dualpipev"])
def test_activations_stay_where_weights_gradients_are_put_off(schedule: ScheduleName) -> None:
    def broken(offload: Offload) -> list[str]:
        layout = Layout(pp=2, schedule=schedule, offload=offload)
        return [p.field for p in broken_rules(layout, MIXED, parse_cluster("2xh100-sxm"), 8)]

    assert broken("optimizer") == []
    assert broken("activations") == ([] if schedule == "gpipe" else ["offload"])
