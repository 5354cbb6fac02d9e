"""Sharding within a part of the copies (HSDP): identities, bounds, messages, and what trainers read."""

from __future__ import annotations

import random
from dataclasses import replace
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from isoflop.arch import Arch, gpt, llama
from isoflop.arch.zoo import entry
from isoflop.count.memory_rank import Trained, memory_rank
from isoflop.count.memory_split import Shards
from isoflop.count.memory_state import TRAINING_STATES
from isoflop.count.params import params
from isoflop.count.workload import Workload
from isoflop.errors import InputError
from isoflop.hardware import Cluster, find, parse_cluster
from isoflop.hardware.fabric import fabric_of
from isoflop.plan.emit import emitted
from isoflop.plan.layout import Layout, broken_rules
from isoflop.plan.memory.place import bytes_per_accelerator
from isoflop.plan.network.group import group_of
from isoflop.plan.search import search
from isoflop.plan.search.space import Space
from isoflop.plan.search.weigh import Room, weigh
from isoflop.plan.step.communication import communication
from isoflop.plan.step.seconds import step_time
from isoflop.plan.step.setting import Setting
from isoflop.plan.training.plan import TrainAsk, plan_train
from isoflop.plan.training.work import Work

DENSE = llama("dense", d_model=1024, n_layers=4, n_heads=16, n_kv_heads=4, d_ff=2816,
              vocab_size=32000, max_seq_len=4096)  # fmt: skip
MIXED = replace(entry("qwen3-30b-a3b").arch, layers=entry("qwen3-30b-a3b").arch.layers[:4])
SMALL = gpt("small", d_model=512, n_layers=12, n_heads=8, vocab_size=5000, max_seq_len=2048)
STATE = TRAINING_STATES["bf16"]
PIECES = ("bytes_weights", "bytes_grads", "bytes_optimizer")


@st.composite
def layouts(draw: st.DrawFn, least_zero: int = 1) -> Layout:
    """Layouts with a legal shard, of experts too."""
    dp, cp = draw(st.sampled_from([2, 4, 16])), draw(st.sampled_from([1, 2]))
    shard = draw(st.sampled_from([d for d in (1, 2, 4, 8, 16, 32) if dp * cp % d == 0]))
    return Layout(
        tp=draw(st.sampled_from([1, 4])), pp=draw(st.sampled_from([1, 2])), dp=dp, cp=cp,
        zero=draw(st.sampled_from([1, 2, 3][least_zero - 1 :])), shard=shard,
    )  # fmt: skip


def setting(layout: Layout, arch: Arch = DENSE, chip: str = "h100-sxm") -> Setting:
    cluster = Cluster(find(chip), layout.n_accelerators)
    return Setting(arch, cluster, layout, 2048, 64, stack="nemo-24")


def held(layout: Layout, arch: Arch = DENSE) -> dict[str, Fraction]:
    job = Trained(arch, Workload.train(1, 2048), STATE)
    tree = memory_rank(
        job,
        Shards(tp=layout.tp, pp=layout.pp, dp=layout.dp, cp=layout.cp, ep=layout.ep,
               zero=layout.zero, shard=layout.shard),
    )  # fmt: skip
    return {child.name: Fraction(child.value) for child in tree.children}


# --- identities -------------------------------------------------------------------------------


@given(layouts(), st.sampled_from([(DENSE, 1), (MIXED, 1), (MIXED, 2)]))
@settings(max_examples=15, deadline=None)
def test_sharding_over_all_copies_is_zero_as_it_is_to_the_last_bit(
    layout: Layout, model: tuple[Arch, int]
) -> None:
    arch, ep = model
    plain = replace(layout, ep=ep, shard=None)
    named = replace(plain, shard=plain.dp * plain.cp)
    assert held(named, arch) == held(plain, arch)
    one, other = (setting(x, arch) for x in (named, plain))
    assert step_time(one).value == step_time(other).value
    assert communication(one).value == communication(other).value
    job = Trained(arch, Workload.train(1, 2048), STATE)
    assert (bytes_per_accelerator(job, named, 64).value
            == bytes_per_accelerator(job, plain, 64).value)  # fmt: skip


@given(layouts(), st.sampled_from([DENSE, MIXED]))
@settings(max_examples=15, deadline=None)
def test_shards_of_one_rank_hold_what_is_held_without_zero(layout: Layout, arch: Arch) -> None:
    alone, none = replace(layout, shard=1), replace(layout, zero=0, shard=None)
    assert held(alone, arch) == held(none, arch)


@pytest.mark.parametrize("zero", [1, 2, 3])
def test_shards_of_one_rank_send_what_is_sent_without_zero(zero: int) -> None:
    """Replicas alone are left: one all-reduce of all gradients a step."""
    alone = communication(setting(Layout(dp=16, zero=zero, shard=1)))  # type: ignore[arg-type]
    assert alone.value == communication(setting(Layout(dp=16))).value


def test_ranks_hold_the_state_as_often_as_there_are_replicas() -> None:
    for shard, ep in ((16, 1), (8, 4), (4, 4), (2, 2)):
        layout = Layout(dp=16, ep=ep, zero=3, shard=shard)
        own = held(layout, MIXED)
        replicas = 16 // shard
        assert 16 * sum(own[name] for name in PIECES) == replicas * 16 * params(MIXED).value


# --- bounds -----------------------------------------------------------------------------------


@given(layouts(), st.sampled_from([(DENSE, 1), (MIXED, 1), (MIXED, 2)]))
@settings(max_examples=25, deadline=None)
def test_sharding_over_more_ranks_never_adds_memory(
    layout: Layout, model: tuple[Arch, int]
) -> None:
    arch, ep = model
    assert layout.shard is not None
    wider = replace(layout, ep=ep, shard=2 * layout.shard)
    assume(layout.dp * layout.cp % (2 * layout.shard) == 0 and layout.shard % ep == 0)
    before, after = (held(x, arch) for x in (replace(layout, ep=ep), wider))
    # Two gathered units come with ZeRO 3, and experts once several ranks share them.
    first = layout.zero == 3 and layout.shard == ep
    assert all(after[n] <= before[n] for n in before if not (first and n == "bytes_gathered"))


@given(layouts(), st.sampled_from(["link", "network", "memory"]))
@settings(max_examples=15, deadline=None)
def test_more_bandwidth_never_slows_a_sharded_step(layout: Layout, of: str) -> None:
    before = setting(layout)
    chip, field = before.cluster.chip, f"bytes_per_second_{of}"
    old = getattr(chip, field)
    faster = replace(chip, **{field: replace(old, given=2 * old.given)})
    after = replace(before, cluster=replace(before.cluster, chip=faster))
    assert float(step_time(after).value) <= float(step_time(before).value) * (1 + 1e-12)


def test_a_copy_in_each_node_gathers_over_the_link_alone() -> None:
    layout = Layout(dp=64, zero=3, shard=8)
    fabric = fabric_of(parse_cluster("8xdgx-h100"))
    assert group_of(layout, fabric, "shard").domains.value == 1
    assert group_of(layout, fabric, "replica").per_domain.value == 1
    spread = replace(layout, shard=None)
    within, across = (float(step_time(setting(x)).find("data").value) for x in (layout, spread))
    assert within < across


# --- rules ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("layout", "rule"),
    [
        (Layout(dp=8, zero=3, shard=3), "divide dp \\* cp = 8"),
        (Layout(dp=8, zero=3, shard=0), "be at least 1"),
        (Layout(dp=8, zero=0, shard=4), "ZeRO 1, 2 or 3"),
        (Layout(dp=8, ep=8, zero=1, shard=4), "be divided by ep=8"),
    ],
)
def test_an_illegal_shard_is_refused_by_its_rule(layout: Layout, rule: str) -> None:
    broken = broken_rules(layout, MIXED, parse_cluster("8xh100-sxm"), 64, 2048)
    with pytest.raises(InputError, match=rule):
        raise InputError("layout", broken)


# --- the search -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arch", "on", "seq_len"),
    [(DENSE, "32xh100-sxm", 2048), (MIXED, "32xh100-sxm", 4096), (MIXED, "8xh100-sxm", 2048)],
    ids=["dense", "experts", "experts in one node"],
)
def test_arrays_equal_the_printed_formulas_of_sharded_layouts(
    arch: Arch, on: str, seq_len: int
) -> None:
    ask = TrainAsk(Work(arch, 10**9, seq_len), parse_cluster(on), 64, stack="nemo-24")
    space = Space(arch, ask.cluster, seq_len, 64)
    timed = weigh(space, ask.job, ask.setting(Layout()), Room(np.inf))
    drawn = random.Random(2).sample(range(timed.row.size), 400)
    found = [
        (i, space.layout(int(timed.row[i]), space.variations[timed.variation[i]])) for i in drawn
    ]
    telling = [(i, x) for i, x in found if x.zero == 3 or x.shard or x.ep == x.dp * x.cp > 1]
    assert len(telling) > 25
    for i, layout in telling[:25]:
        again = space.variations[timed.variation[i]].recompute
        own = replace(ask, layout=layout, work=replace(ask.work, recompute=again))
        expected = float(bytes_per_accelerator(own.job, layout, 64).value)
        assert timed.bytes_held[i] == pytest.approx(expected, rel=1e-9), layout
        seconds = float(step_time(own.setting(layout)).value)
        assert timed.seconds[i] == pytest.approx(seconds, rel=1e-9), layout


def test_a_search_keeps_a_shard_that_the_user_fixed() -> None:
    ask = TrainAsk(Work(DENSE, 10**9, 2048), parse_cluster("16xh100-sxm"), 64, stack="nemo-24")
    found = search(ask, fixed={"shard": 4, "tp": 1, "pp": 1, "cp": 1}, n_simulated=3)
    assert {(c.layout.shard, c.layout.zero > 0) for c in found.ranked} == {(4, True)}
    with pytest.raises(InputError, match="shard=3"):
        search(ask, fixed={"shard": 3, "dp": 16})


# --- what trainers read -----------------------------------------------------------------------


LLAMA = entry("llama-3.1-8b").arch


def text(kind: str, layout: Layout, arch: Arch = SMALL) -> str:
    plan = plan_train(arch, 10**9, parse_cluster("64xb300-sxm"), seq_len=1024, global_batch=64,
                      layout=layout)  # fmt: skip
    return emitted(kind, plan)


def test_torchtitan_replicates_what_is_not_sharded() -> None:
    said = text("torchtitan", Layout(dp=16, cp=2, zero=3, shard=8, cp_by="gather"), LLAMA)
    assert "--parallelism.data_parallel_replicate_degree 4" in said
    assert "--parallelism.data_parallel_shard_degree 4" in said
    with pytest.raises(InputError, match="divided by cp=4"):
        text("torchtitan", Layout(dp=8, cp=4, zero=3, shard=2, cp_by="gather"), LLAMA)


def test_megatron_counts_the_instances_of_its_optimizer() -> None:
    lines = text("megatron", Layout(tp=2, dp=16, zero=1, shard=4)).splitlines()
    assert "--num-distributed-optimizer-instances 4" in lines
    assert "--outer-dp-sharding-strategy no_shard" not in lines
    assert "--outer-dp-sharding-strategy no_shard" in text(
        "megatron", Layout(dp=16, zero=3, shard=8)
    )
    assert "instances" not in text("megatron", Layout(dp=16, zero=1))
