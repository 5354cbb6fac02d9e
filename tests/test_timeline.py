"""Memory through a step: the timeline and the tree agree, and what schedules and stacks add."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from isoflop.arch import gpt, llama
from isoflop.arch.zoo import entry
from isoflop.count import STACKS, Shards, overhead, stack_of
from isoflop.count.memory_stack import groups
from isoflop.errors import InputError, UnknownName
from isoflop.hardware import parse_cluster
from isoflop.plan.layout import Layout
from isoflop.plan.memory.place import bytes_per_accelerator
from isoflop.plan.memory.shard import memory_training_stage
from isoflop.plan.memory.timeline import Timeline, job_of, memory_timeline
from isoflop.plan.schedule import SCHEDULES, ScheduleName
from isoflop.plan.step.setting import Setting
from isoflop.quantity import Node, branch, leaf

CLUSTER = parse_cluster("8xa100-sxm-80gb")
GPT = gpt("g", d_model=64, n_layers=16, n_heads=4, vocab_size=96, max_seq_len=64, dropout=0.1)
LLAMA = llama(
    "l", d_model=32, n_layers=16, n_heads=4, n_kv_heads=2, d_ff=48, vocab_size=64, max_seq_len=64
)

#: Two kinds of layers: one dense, the others of experts.
MIXED = replace(entry("deepseek-v2-lite").arch, layers=entry("deepseek-v2-lite").arch.layers[:17])


def asked(layout: Layout, n_micro: int, **more: object) -> Setting:
    base = Setting(GPT, CLUSTER, layout, 32, n_micro * layout.dp * layout.micro_batch)
    return replace(base, **more)  # type: ignore[arg-type]


layouts = st.builds(
    Layout,
    tp=st.sampled_from([1, 2]),
    pp=st.sampled_from([1, 2, 4]),
    dp=st.sampled_from([1, 2]),
    zero=st.sampled_from([0, 1, 2, 3]),
    micro_batch=st.integers(1, 3),
    virtual=st.sampled_from([1, 2]),
    sequence_parallel=st.booleans(),
)
recomputes = st.sampled_from(["none", "selective", "full"])


@given(
    layouts, recomputes, st.sampled_from(sorted(STACKS)), st.sampled_from([GPT, LLAMA]), st.data()
)
@settings(max_examples=60, deadline=None)
def test_the_most_that_a_timeline_holds_is_the_memory_tree(
    layout: Layout, recompute: str, stack: str, arch: object, data: st.DataObject
) -> None:
    assume(layout.pp > 1 or layout.virtual == 1)
    n_micro = data.draw(st.integers(1, 3)) * layout.pp
    setting = asked(layout, n_micro, recompute=recompute, stack=stack, arch=arch)
    for rank in range(layout.pp):
        line = memory_timeline(setting, rank)
        tree = memory_training_stage(job_of(setting), layout, n_micro, rank, stack)
        assert float(line.peak.bytes) == pytest.approx(float(tree.value), rel=1e-12)
        by_part = {child.name: float(child.value) for child in tree.children}
        assert {n: float(v) for n, v in line.peak.parts} == pytest.approx(by_part, rel=1e-12)
        assert float(line.tree().value) == pytest.approx(float(tree.value), rel=1e-12)


def activations(line: Timeline) -> list[float]:
    return [float(dict(moment.parts)["bytes_activations"]) for moment in line.moments]


schedules = st.sampled_from([name for name in SCHEDULES if name != "1f1b"])


@given(
    schedules, recomputes, st.sampled_from(sorted(STACKS)), st.sampled_from(["g", "l", "mixed"]),
    st.sampled_from([2, 4, 6]), st.integers(0, 3), st.sampled_from([0, 1, 3]),
)  # fmt: skip
@settings(max_examples=40, deadline=None)
def test_it_is_the_memory_tree_under_every_schedule(
    schedule: ScheduleName, recompute: str, stack: str, name: str, pp: int, more: int, zero: int
) -> None:
    arch = {"g": GPT, "l": LLAMA, "mixed": MIXED}[name]
    n_micro = 2 * pp + 2 * more
    layout = Layout(pp=pp, tp=2, dp=2, schedule=schedule, zero=zero)
    setting = asked(layout, n_micro, recompute=recompute, stack=stack, arch=arch)
    for rank in {0, pp // 2 - 1, pp - 1}:
        line = memory_timeline(setting, rank)
        tree = memory_training_stage(job_of(setting), layout, n_micro, rank, stack)
        most, whole = float(line.peak.bytes), float(tree.value)
        if name == "mixed" and "dualpipe" in schedule and recompute == "full":
            # Of two stages unlike each other, what waits is taken to be of the larger.
            assert most * (1 - 1e-12) <= whole <= most * 1.001
        else:
            assert whole == pytest.approx(most, rel=1e-12)


@given(schedules, recomputes, st.sampled_from([2, 4, 8]), st.booleans())
@settings(max_examples=30, deadline=None)
def test_no_rank_holds_more_than_those_that_are_asked(
    schedule: ScheduleName, recompute: str, pp: int, mixed: bool
) -> None:
    arch = MIXED if mixed else GPT
    layout = Layout(pp=pp, schedule=schedule)
    setting = asked(layout, 2 * pp, recompute=recompute, arch=arch)
    job = job_of(setting)
    every = [memory_training_stage(job, layout, 2 * pp, rank).value for rank in range(pp)]
    assert float(max(every)) == float(bytes_per_accelerator(job, layout, 2 * pp).value)


def of_layers(schedule: ScheduleName, pp: int, n_micro: int, rank: int) -> float:
    """The most activations of layers, in micro-batches of what 1F1B's rank keeps of one."""
    middle = asked(Layout(pp=pp, schedule=schedule), n_micro)
    alone = max(activations(memory_timeline(asked(Layout(pp=pp), 1), rank)))
    return max(activations(memory_timeline(middle, rank))) / alone


def test_schedules_hold_what_their_papers_say() -> None:
    # An inner rank has no ends. GPipe (1811.06965): all; 1F1B (2104.04473): pp - rank;
    # DualPipe (2412.19437, table 2): pp + 1 of its stages; DualPipeV half of a stage more than pp.
    pp, n_micro, rank = 4, 8, 1
    assert of_layers("gpipe", pp, n_micro, rank) == n_micro
    assert of_layers("1f1b", pp, n_micro, rank) == pp - rank
    assert of_layers("dualpipe", pp, n_micro, rank) == pp + 1
    assert of_layers("dualpipev", pp, n_micro, rank) == pp + 0.5


def test_zb_h1_holds_what_1f1b_does_and_zb_h2_nearly_twice_that_on_the_first_rank() -> None:
    # Qi 2023 (2401.10241), table 2: p and 2 p - 1 micro-batches.
    def held(schedule: ScheduleName, pp: int) -> float:
        setting = asked(Layout(pp=pp, schedule=schedule), 4 * pp)
        tree = memory_training_stage(job_of(setting), setting.layout, 4 * pp, 0)
        return float(tree.find("bytes_activations").value)

    for pp in (2, 4, 8):
        assert held("zb-h1", pp) == held("1f1b", pp)
        assert held("zb-h2", pp) == pytest.approx(held("1f1b", pp) * (2 - 1 / pp), rel=1e-12)


def test_weights_gradients_put_off_keep_32_of_34_s_b_h() -> None:
    # Qi 2023 (2401.10241), section 2.3: of a GPT layer's 34 s b h and scores, W needs 32.
    line = memory_timeline(asked(Layout(pp=4, schedule="zb-h1"), 8), 1)
    at = [moment.when for moment in line.moments].index("B0")
    assert [moment.when for moment in line.moments[at : at + 2]] == ["B0", "F3"]
    # B0 leaves what W0 needs, F3 adds as much as B0 found.
    during = activations(line)
    assert during[at + 1] - during[at] == 4 * 32 * 32 * 64  # layers, bytes, tokens, width


def test_dualpipe_holds_every_weight_twice_and_dualpipev_once() -> None:
    def weights(schedule: ScheduleName) -> float:
        setting = asked(Layout(pp=4, schedule=schedule), 8)
        trees = [memory_training_stage(job_of(setting), setting.layout, 8, r) for r in range(4)]
        return sum(float(tree.find("bytes_weights").value) for tree in trees)

    # The two ends share a tied table where one rank has both (2412.19437, section 3.2.3).
    once, table = weights("1f1b"), 2 * 96 * 64
    assert weights("dualpipe") == 2 * (once - table)
    assert weights("dualpipev") == once - table


@given(layouts, recomputes, st.integers(1, 3))
@settings(max_examples=40, deadline=None)
def test_more_of_a_micro_batch_and_longer_sequences_never_hold_less(
    layout: Layout, recompute: str, times: int
) -> None:
    assume(layout.pp > 1 or layout.virtual == 1)
    n_micro = times * layout.pp
    at = asked(layout, n_micro, recompute=recompute)
    wider = replace(layout, micro_batch=layout.micro_batch + 1)
    most = memory_timeline(at).peak.bytes
    assert memory_timeline(asked(wider, n_micro, recompute=recompute)).peak.bytes >= most
    assert memory_timeline(replace(at, seq_len=48)).peak.bytes >= most


@given(layouts, recomputes, st.sampled_from(tuple(SCHEDULES)))
@settings(max_examples=60, deadline=None)
def test_sharding_never_adds_to_what_the_model_holds(
    layout: Layout, recompute: str, schedule: ScheduleName
) -> None:
    assume(layout.pp > 1 or layout.virtual == 1)
    assume(layout.zero < 3)  # what ZeRO-3 gathers comes on top
    if layout.pp > 1 and layout.virtual == 1:
        layout = replace(layout, schedule=schedule)

    def model(layout: Layout) -> float:
        tree = memory_training_stage(job_of(asked(layout, 8, recompute=recompute)), layout, 8, 0)
        return float(tree.value) - float(tree.find("bytes_overhead").value)

    held = model(layout)
    assert model(replace(layout, tp=2 * layout.tp)) <= held
    assert model(replace(layout, dp=2 * layout.dp)) <= held
    if layout.zero < 2:
        assert model(replace(layout, zero=layout.zero + 1)) <= held


def test_a_timeline_ends_with_the_optimizers_step_and_draws_its_peak() -> None:
    line = memory_timeline(asked(Layout(pp=2), 3))
    assert [m.when for m in line.moments] == ["F0", "F1", "BW0", "F2", "BW1", "BW2", "step"]
    assert activations(line)[-1] == 0
    text = line.text(20).splitlines()
    assert text[0].startswith("rank 0, most at F1")
    assert sum(row.endswith("<") for row in text) == 1
    assert text[2].count("#") + text[2].count("+") == 20
    two = memory_timeline(asked(Layout(pp=2, virtual=2), 4), 1)
    assert two.moments[0].when == "F0@1"


@pytest.mark.parametrize("rank", [-1, 2])
def test_a_rank_that_is_not_there_is_named(rank: int) -> None:
    with pytest.raises(InputError, match="lie between 0 and pp - 1 = 1"):
        memory_timeline(asked(Layout(pp=2), 2), rank)


def test_a_schedules_own_rules_are_asked() -> None:
    with pytest.raises(InputError, match="be at least 2"):
        memory_timeline(asked(Layout(pp=2, schedule="dualpipe"), 2), 0)


# --- the software ---------------------------------------------------------------------------


def rank_of(**sizes: int) -> Node:
    names = ("weights", "grads", "optimizer", "activations")
    return branch("r", "bytes", [leaf(f"bytes_{n}", "bytes", sizes.get(n, 0)) for n in names])


def test_groups_are_those_of_more_than_one_rank_and_all_ranks_once() -> None:
    for shards, count in ((Shards(), 0), (Shards(dp=4), 1), (Shards(tp=2, pp=2, dp=4, ep=4), 5),
                          (Shards(tp=8), 1), (Shards(cp=2, tp=2), 3)):  # fmt: skip
        assert groups(shards).value == count


def test_copies_of_the_step_take_room_that_activations_have_left() -> None:
    stack = replace(STACKS["pytorch"], step_copies=1)
    for activations, copies in ((0, 100), (60, 40), (100, 0), (300, 0)):
        tree = overhead(stack, rank_of(optimizer=100, activations=activations), Shards())
        assert tree.find("step_copies").value == copies


def test_zero_1_flattens_its_own_share_of_the_gradients() -> None:
    held = rank_of(weights=80, grads=80)
    stack = STACKS["deepspeed"]
    for zero, flat in ((0, 80), (1, 20), (2, 80)):  # ZeRO-2's gradients are a share already
        tree = overhead(stack, held, Shards(dp=4, zero=zero))
        assert tree.find("gradients_flat").value == flat
    assert overhead(stack, held, Shards(dp=4)).find("gather_bucket").value == 80
    with pytest.raises(UnknownName):
        overhead(STACKS["unknown"], held, Shards(dp=4)).find("gather_bucket")


def test_what_the_software_holds_has_a_range_around_it() -> None:
    held = rank_of(weights=10**9, grads=10**9, optimizer=6 * 10**9, activations=10**10)
    for stack in STACKS.values():
        tree = overhead(stack, held, Shards(tp=2, dp=4, zero=1))
        assert tree.interval is not None
        assert float(tree.value) in tree.interval
    with pytest.raises(UnknownName):
        stack_of("")
