"""Context parallelism around a ring, by gathering, and with heads dealt out: sizes, rules, time."""

from __future__ import annotations

import random
from dataclasses import replace
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from isoflop.arch import Arch, gpt, llama
from isoflop.arch.zoo import entry
from isoflop.count.memory_rank import Trained, memory_rank
from isoflop.count.memory_split import CONTEXTS_BY, ContextBy
from isoflop.count.memory_state import TRAINING_STATES
from isoflop.count.workload import Workload
from isoflop.errors import InputError
from isoflop.hardware import Cluster, find, parse_cluster
from isoflop.plan.emit import emitted
from isoflop.plan.layout import Layout, broken_rules
from isoflop.plan.memory.place import bytes_per_accelerator
from isoflop.plan.memory.shard import shards_of
from isoflop.plan.memory.timeline import memory_timeline
from isoflop.plan.search import search
from isoflop.plan.search.space import Space
from isoflop.plan.search.weigh import Room, weigh
from isoflop.plan.step.communication import communication
from isoflop.plan.step.seconds import step_time
from isoflop.plan.step.setting import Setting
from isoflop.plan.training.plan import TrainAsk, plan_train
from isoflop.plan.training.work import Work

GROUPED = llama("grouped", d_model=1024, n_layers=4, n_heads=16, n_kv_heads=2, d_ff=2816,
                vocab_size=32000, max_seq_len=8192)  # fmt: skip
PLAIN = gpt("plain", d_model=1024, n_layers=4, n_heads=16, vocab_size=32000, max_seq_len=8192)
LATENT = replace(entry("deepseek-v2-lite").arch, layers=entry("deepseek-v2-lite").arch.layers[:4])
SEQ = 8192

ways = st.sampled_from(CONTEXTS_BY)
archs = st.sampled_from([GROUPED, PLAIN, LATENT])


def setting(layout: Layout, arch: Arch = GROUPED, seq_len: int = SEQ) -> Setting:
    cluster = Cluster(find("h100-sxm"), layout.n_accelerators)
    return Setting(arch, cluster, layout, seq_len, 16, stack="nemo-24")


def held(layout: Layout, arch: Arch) -> dict[str, Fraction]:
    job = Trained(arch, Workload.train(1, SEQ), TRAINING_STATES["bf16"])
    return {c.name: Fraction(c.value) for c in memory_rank(job, shards_of(layout)).children}


# --- identities -------------------------------------------------------------------------------


@given(ways, archs)
@settings(max_examples=12, deadline=None)
def test_one_rank_has_nobody_to_meet_in_any_way(by: ContextBy, arch: Arch) -> None:
    plain, other = (setting(Layout(tp=2, dp=2, cp_by=way), arch) for way in ("ring", by))
    assert step_time(other).value == step_time(plain).value
    assert communication(other).value == communication(plain).value
    assert held(other.layout, arch) == held(plain.layout, arch)


@given(st.sampled_from([2, 4]), archs)
@settings(max_examples=8, deadline=None)
def test_gathered_keys_are_as_many_bytes_as_those_around_the_ring(cp: int, arch: Arch) -> None:
    ring, gather = (setting(Layout(cp=cp, cp_by=way), arch) for way in ("ring", "gather"))
    assert communication(ring).value == communication(gather).value
    assert step_time(gather).find("context").value >= step_time(ring).find("context").value


def test_heads_dealt_out_send_less_the_more_ranks_there_are() -> None:
    """Jacobs 2023, section 3.2: 4 N h / P per rank and layer, where a ring's bytes stay."""

    def sent(cp: int, by: ContextBy) -> float:
        layout = Layout(cp=cp, cp_by=by)
        return float(communication(setting(layout, PLAIN)).find("cp").value)

    for cp in (2, 4, 8):
        width, layers, micro_batches = 1024, 4, 16
        shared = SEQ * width * 2 * (cp - 1) / cp
        assert sent(cp, "all_to_all") == 2 * 4 * shared / cp * layers * micro_batches
        assert sent(cp, "ring") == 3 * 2 * shared * layers * micro_batches


def test_gathering_holds_one_layers_keys_and_values_with_their_gradient() -> None:
    """Llama 3, section 3.3.2: all tokens' keys and values of one layer."""
    ring, gather = (held(Layout(tp=2, cp=4, cp_by=way), GROUPED) for way in ("ring", "gather"))
    heads, d_head = 1, 64  # of two key-value heads, one on each of two tensor ranks
    assert gather.pop("bytes_keys_values") == 2 * SEQ * heads * 2 * d_head * 2
    assert gather == ring


@given(ways, st.sampled_from([1, 2]), archs)
@settings(max_examples=10, deadline=None)
def test_the_peak_of_a_step_is_the_memory_of_its_layout(by: ContextBy, pp: int, arch: Arch) -> None:
    layout = Layout(pp=pp, cp=2, cp_by=by)
    job = Trained(arch, Workload.train(1, SEQ), TRAINING_STATES["bf16"])
    whole = bytes_per_accelerator(job, layout, 16)
    peaks = [memory_timeline(setting(layout, arch), rank).peak.bytes for rank in range(pp)]
    assert float(whole.value) == pytest.approx(max(map(float, peaks)), rel=1e-12)


# --- rules ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("layout", "rule"),
    [
        (Layout(cp=3, cp_by="all_to_all"), "divide n_heads=16"),
        (Layout(tp=8, cp=4, cp_by="all_to_all"), "divide n_heads=16"),
        (Layout(cp=2, cp_by="stars"), "be one of ring, gather, all_to_all"),  # type: ignore[arg-type]
    ],
)
def test_an_illegal_way_is_refused_by_its_rule(layout: Layout, rule: str) -> None:
    broken = broken_rules(layout, GROUPED, parse_cluster("32xh100-sxm"), 16, 8064)
    with pytest.raises(InputError, match=rule):
        raise InputError("layout", broken)


def test_heads_dealt_out_need_no_mirrored_chunks() -> None:
    """Every rank sees all tokens, so a causal mask gives all equal work."""
    cluster, odd = parse_cluster("2xh100-sxm"), 8190
    assert not broken_rules(Layout(cp=2, cp_by="all_to_all"), GROUPED, cluster, 16, odd)
    assert broken_rules(Layout(cp=2), GROUPED, cluster, 16, odd)


# --- the search -------------------------------------------------------------------------------


def test_arrays_equal_the_printed_formulas_of_heads_dealt_out() -> None:
    ask = TrainAsk(Work(GROUPED, 10**9, SEQ), parse_cluster("16xh100-sxm"), 16, stack="nemo-24")
    space = Space(GROUPED, ask.cluster, SEQ, 16)
    timed = weigh(space, ask.job, ask.setting(Layout()), Room(np.inf))
    drawn = random.Random(4).sample(range(timed.row.size), 300)
    rows = [
        (i, space.layout(int(timed.row[i]), space.variations[timed.variation[i]])) for i in drawn
    ]
    dealt = [(i, layout) for i, layout in rows if layout.cp_by == "all_to_all"]
    assert len(dealt) > 15
    for i, layout in dealt[:15]:
        again = space.variations[timed.variation[i]].recompute
        own = replace(ask, layout=layout, work=replace(ask.work, recompute=again))
        expected = float(bytes_per_accelerator(own.job, layout, 16).value)
        assert timed.bytes_held[i] == pytest.approx(expected, rel=1e-9), layout
        seconds = float(step_time(own.setting(layout)).value)
        assert timed.seconds[i] == pytest.approx(seconds, rel=1e-9), layout


def test_a_search_meets_as_the_user_says() -> None:
    ask = TrainAsk(Work(GROUPED, 10**9, SEQ), parse_cluster("8xh100-sxm"), 16, stack="nemo-24")
    for by in CONTEXTS_BY:
        found = search(ask, fixed={"cp": 2, "cp_by": by, "pp": 1, "virtual": 1}, n_simulated=2)
        assert {choice.layout.cp_by for choice in found.ranked} == {by}


# --- what trainers read -----------------------------------------------------------------------


LLAMA = entry("llama-3.1-8b").arch


def text(kind: str, layout: Layout, arch: Arch = PLAIN) -> str:
    plan = plan_train(arch, 10**9, parse_cluster("16xb300-sxm"), seq_len=SEQ, global_batch=16,
                      layout=layout)  # fmt: skip
    return emitted(kind, plan)


@pytest.mark.parametrize(
    ("by", "said"), [("ring", "p2p"), ("gather", "all_gather"), ("all_to_all", "a2a")]
)
def test_megatron_says_how_ranks_meet(by: ContextBy, said: str) -> None:
    lines = text("megatron", Layout(dp=2, cp=4, zero=1, cp_by=by)).splitlines()
    assert f"--cp-comm-type {said}" in lines
    assert "--cp-comm-type" not in text("megatron", Layout(dp=2, cp_by=by))


def test_torchtitan_gathers_and_goes_around_or_deals_heads_out_nowhere() -> None:
    layout = Layout(dp=2, cp=4, zero=3, cp_by="gather")
    assert "--parallelism.context_parallel_degree 4" in text("torchtitan", layout, LLAMA)
    for by in ("ring", "all_to_all"):
        with pytest.raises(InputError, match=f"cp_by={by}"):
            text("torchtitan", replace(layout, cp_by=by), LLAMA)
