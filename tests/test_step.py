"""Seconds of a training step: what must hold of any, and published ones."""

from __future__ import annotations

import math
import tomllib
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from isoflop.arch import Arch, gpt, llama
from isoflop.arch.zoo import entry
from isoflop.check.calibrate_stack import calibrate_stack, may_move
from isoflop.check.step_fit import NORMAL, Problem, Row, fit
from isoflop.check.step_formula import formula_of
from isoflop.errors import InputError, UnknownName
from isoflop.hardware import Cluster, find
from isoflop.hardware.fitted import PRIORS, Beliefs, OwnSteps, shipped
from isoflop.hardware.stack import find_stack, stack_names
from isoflop.plan.layout import Layout
from isoflop.plan.schedule import SCHEDULES, ScheduleName
from isoflop.plan.search.pipeline import seconds_simulated
from isoflop.plan.step.offload import shown
from isoflop.plan.step.seconds import Steps, step_pieces, step_time
from isoflop.plan.step.setting import Setting
from isoflop.quantity import Symbol, number
from isoflop.quantity.compile import compile_expressions

SMALL = gpt("small", d_model=1024, n_layers=8, n_heads=16, vocab_size=51200, max_seq_len=4096)
MIXED = entry("qwen3-30b-a3b").arch
ARRAYS = {
    "max": lambda *a: np.maximum.reduce(np.broadcast_arrays(*a)),
    "min": lambda *a: np.minimum.reduce(np.broadcast_arrays(*a)),
    "where": lambda t, a, b: np.where(np.asarray(t) > 0, a, b),
    "ceil_div": lambda a, b: -(-a // b),
}


def a_layout(**sizes: Any) -> Layout:
    """A schedule is for several stages."""
    return Layout(**sizes) if sizes["pp"] > 1 else Layout(**{**sizes, "schedule": "1f1b"})


layouts = st.builds(
    a_layout,
    tp=st.sampled_from([1, 2, 4]),
    pp=st.sampled_from([1, 2, 4]),
    dp=st.sampled_from([1, 2, 4]),
    cp=st.sampled_from([1, 2]),
    zero=st.sampled_from([0, 1, 2, 3]),
    micro_batch=st.sampled_from([1, 2]),
    virtual=st.just(1),
    sequence_parallel=st.booleans(),
    schedule=st.sampled_from(tuple(SCHEDULES)),
)


def a_setting(
    layout: Layout, arch: Arch = SMALL, chip: str = "h100-sxm", **more: object
) -> Setting:
    plain = {"seq_len": 2048, "global_batch": 64, "stack": "nemo-24", **more}
    return Setting(arch, Cluster(find(chip), layout.n_accelerators), layout, **plain)  # type: ignore[arg-type]


def seconds(setting: Setting, beliefs: Beliefs | None = None) -> float:
    return float(step_time(setting, beliefs).value)


@given(layouts, st.sampled_from(["none", "selective", "full"]))
@settings(max_examples=15, deadline=None)
def test_the_parts_of_a_step_add_up_to_it(layout: Layout, recompute: str) -> None:
    tree = step_time(a_setting(layout, recompute=recompute))
    parts = math.fsum(float(child.value) for child in tree.children)
    assert float(tree.value) == pytest.approx(parts * float(tree.times.value), rel=1e-12)
    assert all(float(node.value) >= 0 for _, node in tree.walk())


@given(
    layouts,
    st.sampled_from(
        ["bytes_per_second_memory", "bytes_per_second_link", "bytes_per_second_network"]
    ),
)
@settings(max_examples=15, deadline=None)
def test_a_faster_memory_link_or_network_never_slows_a_step(layout: Layout, field: str) -> None:
    before = a_setting(layout)
    chip = before.cluster.chip
    old = getattr(chip, field)
    faster = replace(chip, **{field: replace(old, given=2 * old.given)})
    after = replace(before, cluster=replace(before.cluster, chip=faster))
    assert seconds(after) <= seconds(before) * (1 + 1e-12)


def test_a_higher_peak_never_slows_a_step() -> None:
    setting = a_setting(Layout(tp=2, dp=4))
    chip = setting.cluster.chip
    peaks = {name: replace(peak, given=2 * peak.value) for name, peak in chip.peaks.items()}
    faster = replace(setting, cluster=replace(setting.cluster, chip=replace(chip, peaks=peaks)))
    assert seconds(faster) < seconds(setting)


@pytest.mark.parametrize("arch", [SMALL, MIXED], ids=["dense", "experts"])
def test_one_rank_talks_to_nobody(arch: Arch) -> None:
    names = [child.name for child in step_time(a_setting(Layout(), arch)).children]
    assert names == ["layers", "ends", "optimizer"]


@pytest.mark.parametrize(
    ("layout", "part"),
    [
        (Layout(tp=2), "tensor"),
        (Layout(cp=2), "context"),
        (Layout(dp=2), "data"),
        (Layout(pp=2), "bubble"),
    ],
)
def test_each_parallelism_costs_what_it_is_named_for(layout: Layout, part: str) -> None:
    assert float(step_time(a_setting(layout)).find(part).value) > 0


def test_experts_spread_over_ranks_are_exchanged() -> None:
    tree = step_time(a_setting(Layout(dp=8, ep=8), MIXED, compute="bf16"))
    assert float(tree.find("experts").value) > 0
    assert float(tree.find("layers/layer/forward/feed_forward/sorting").value) > 0


@given(st.sampled_from([512, 1024, 2048]), layouts)
@settings(max_examples=10, deadline=None)
def test_longer_sequences_take_longer(seq_len: int, layout: Layout) -> None:
    short, long = (a_setting(layout, seq_len=s) for s in (seq_len, 2 * seq_len))
    assert seconds(long) > seconds(short)


def test_attention_grows_faster_than_the_sequence() -> None:
    short, long = (step_time(a_setting(Layout(), seq_len=s)) for s in (1024, 4096))
    path = "layers/layer/forward/attention/core"
    assert float(long.find(path).value) > 8 * float(short.find(path).value)


def test_recomputing_costs_a_forward_pass() -> None:
    none, full = (step_time(a_setting(Layout(), recompute=r)) for r in ("none", "full"))
    again = full.find("layers/layer/recompute").value
    assert again == none.find("layers/layer/forward").value


@pytest.mark.parametrize("recompute", ["none", "selective", "full"])
@pytest.mark.parametrize("arch", [SMALL, MIXED], ids=["dense", "experts"])
@pytest.mark.parametrize("compute", ["bf16", "fp8"])
def test_weights_gradients_are_the_part_of_backward_that_products_with_weights_can_put_off(
    arch: Arch, recompute: str, compute: str
) -> None:
    setting = a_setting(Layout(tp=2, dp=2), arch, recompute=recompute, compute=compute)
    pieces, tree = step_pieces(setting), step_time(setting)
    for kind, passes in pieces.layers.items():
        backward = tree.find(f"layers/{kind}/backward")
        assert 0 < passes.weights.value < backward.value
    for passes in (pieces.first, pieces.last):
        assert 0 < passes.weights.value <= passes.backward.value
    assert pieces.first.weights.value > pieces.first.backward.value / 3, "a table's is put off"


def test_only_products_with_weights_put_gradients_off() -> None:
    setting = a_setting(Layout(tp=2, dp=2), MIXED)
    work, layers = Steps.of(setting).work, Steps.of(setting).layers("none")
    for name, part in layers.kinds.items():
        backward, put_off = (
            {path: float(node.value) for path, node in tree.leaves().items()}
            for tree in (work.backward(part, name), work.weight_gradients(part, name))
        )
        names = {path.rsplit("/", 1)[-1] for path, size in put_off.items() if size}
        assert names == {"q", "k", "v", "out", "router", "gate", "up", "down"}
        assert all(size <= backward[path] for path, size in put_off.items())


def test_a_large_product_takes_a_third_of_its_time_in_each_direction() -> None:
    """Equally many FLOPs (Qi 2023, 2401.10241, table 1); gradients are added up in fp32."""
    wide = gpt("wide", d_model=16384, n_layers=2, n_heads=128, vocab_size=64, max_seq_len=4096)
    steps = Steps.of(a_setting(Layout(micro_batch=2), wide))
    work, part = steps.work, steps.layers("none").kinds["layer"]
    for path in ("feed_forward/up", "feed_forward/down"):
        forward, backward, put_off = (
            float(tree.find(path).value)
            for tree in (work.forward(part, ""), work.backward(part, ""),
                         work.weight_gradients(part, ""))
        )  # fmt: skip
        assert put_off == pytest.approx(forward, rel=0.15)
        assert backward - put_off == pytest.approx(forward, rel=0.15)


def test_what_is_hidden_is_the_shorter_of_two() -> None:
    assert shown(number(10), number(4), number(0)).value == 0
    assert shown(number(3), number(4), number(0)).value == 1
    assert shown(number(3), number(4), number(1)).value == 4


def test_interleaving_shortens_the_bubble_by_its_chunks() -> None:
    plain, cut = (step_time(a_setting(Layout(pp=4, virtual=v))) for v in (1, 2))
    ratio = float(plain.find("bubble").value) / float(cut.find("bubble").value)
    assert ratio == pytest.approx(2, rel=1e-12)


def test_a_bubble_is_idle_time_over_ideal_time() -> None:
    """(p - 1) / m of the ideal time where all stages are alike (Narayanan 2021, section 2.2)."""
    tall = gpt("tall", d_model=1024, n_layers=64, n_heads=16, vocab_size=64, max_seq_len=2048)
    tree = step_time(a_setting(Layout(pp=4), tall, global_batch=32))
    work = float(tree.find("layers").value)
    assert float(tree.find("bubble").value) / work == pytest.approx(3 / 32, rel=0.01)


#: Ends that take next to no time, and layers that are not fewer on any rank.
TALL = gpt("tall", d_model=1024, n_layers=64, n_heads=16, vocab_size=64, max_seq_len=2048)


@pytest.mark.parametrize("schedule", list(SCHEDULES))
@pytest.mark.parametrize("pp", [2, 4, 8])
@pytest.mark.parametrize("rounds", [2, 5])
def test_the_formula_is_the_simulation_where_stages_are_equal(
    schedule: ScheduleName, pp: int, rounds: int
) -> None:
    layout = Layout(pp=pp, schedule=schedule, zero=1)
    setting = a_setting(layout, TALL, global_batch=rounds * pp, recompute="full")
    ends = float(step_time(setting).find("ends").value)
    simulated = seconds_simulated([setting])[0]
    assert ends < 0.01 * simulated
    # Ends make two ranks longer, and 1F1B's formula counts every send as waited for.
    assert abs(seconds(setting) - simulated) <= ends + 0.002 * simulated


@pytest.mark.parametrize("schedule", list(SCHEDULES))
def test_a_schedule_shortens_the_bubble_and_leaves_the_work(schedule: ScheduleName) -> None:
    plain, other = (
        step_time(a_setting(Layout(pp=4, schedule=name), TALL)) for name in ("1f1b", schedule)
    )
    assert other.find("layers").value == plain.find("layers").value
    if schedule.startswith(("zb", "dual")):
        assert 0 < other.find("bubble").value < plain.find("bubble").value
    else:
        assert other.find("bubble").value == pytest.approx(plain.find("bubble").value, rel=1e-12)


def test_zero_bubble_saves_what_its_weights_gradients_take() -> None:
    """ZB-H1 idles (p - 1)(F + B - 2 W), B being the whole backward (Qi 2023, section 2.3)."""
    setting = a_setting(Layout(pp=4), TALL)
    zero_bubble = replace(setting, layout=Layout(pp=4, schedule="zb-h1"))
    per_stage, layer = 64 // 4, step_pieces(setting).layers["layer"]
    saved = 2 * 3 * per_stage * float(layer.weights.value)
    plain, other = (step_time(s).find("bubble") for s in (setting, zero_bubble))
    assert float(plain.value) - float(other.value) == pytest.approx(saved, rel=0.01)


def test_dualpipe_hides_most_of_the_experts_exchange_and_holds_two_copies_to_reduce() -> None:
    layout = Layout(pp=4, dp=8, ep=8)
    plain, other = (
        step_time(a_setting(replace(layout, schedule=name), MIXED, global_batch=256))
        for name in ("1f1b", "dualpipe")
    )
    assert other.find("experts").value < 0.5 * plain.find("experts").value
    assert other.find("data").value > 1.5 * plain.find("data").value
    assert other.find("optimizer").value == pytest.approx(
        2 * plain.find("optimizer").value, rel=0.2
    )
    shares = [s for s in other.total.symbols() if s == "share_hidden_together"]
    assert shares, "what is hidden is uncertain, and its range is in the step's"


@pytest.mark.parametrize("zero", [1, 3])
def test_compiled_over_layouts_it_equals_the_exact_value(zero: int) -> None:
    """One formula of a structure, run over arrays of sizes, gives each layout's own value."""
    sizes = ("tp", "pp", "dp", "batch", "n_micro_batches")
    found = [
        Layout(tp=tp, pp=pp, dp=dp, zero=zero, micro_batch=mb)  # type: ignore[arg-type]
        for tp in (2, 4)
        for pp in (2, 4)
        for dp in (2, 4)
        for mb in (1, 2)
    ]
    jobs = [replace(a_setting(x), cluster=Cluster(find("h100-sxm"), 64)) for x in found]
    formula = step_time(replace(jobs[-1], layout=found[-1])).total
    run = compile_expressions([formula], sizes, ARRAYS)
    columns = [
        np.array([getattr(x, n) for x in found], dtype=float)
        for n in ("tp", "pp", "dp", "micro_batch")
    ]
    micro = np.array([job.n_micro_batches for job in jobs], dtype=float)
    (got,) = run(*columns, micro)
    expected = [
        float(formula.evaluate(
            {"tp": x.tp, "pp": x.pp, "dp": x.dp, "batch": x.micro_batch, "n_micro_batches": job.n_micro_batches}
        ))
        for x, job in zip(found, jobs, strict=True)
    ]  # fmt: skip
    np.testing.assert_allclose(got, expected, rtol=1e-12)
    own = [seconds(job) for job in jobs]
    same = [i for i, x in enumerate(found) if x.n_accelerators == found[-1].n_accelerators]
    np.testing.assert_allclose([expected[i] for i in same], [own[i] for i in same], rtol=1e-12)


def test_stacks_name_schedules_that_layouts_have() -> None:
    known = {name: find_stack(name).schedules for name in stack_names()}
    assert all(schedules and set(schedules) <= set(SCHEDULES) for schedules in known.values())
    assert set(known["unknown"]) == set(SCHEDULES)
    assert known["deepspeed-bloom"] == known["nemo-26.08"] == ("1f1b",)


def test_unknown_software_is_an_error_with_near_names() -> None:
    with pytest.raises(UnknownName, match="megatron-2021"):
        step_time(a_setting(Layout(), stack="megatron-2020"))


def test_a_chip_without_a_format_is_an_error() -> None:
    with pytest.raises(InputError, match="fp4"):
        step_time(a_setting(Layout(), compute="nvfp4"))


@pytest.mark.parametrize("name", stack_names())
def test_every_stack_predicts(name: str) -> None:
    tree = step_time(a_setting(Layout(tp=2, dp=2, zero=1), stack=name))
    assert tree.interval is not None
    assert tree.interval.low < float(tree.value) < tree.interval.high


def test_a_second_name_of_a_release_is_the_same_stack() -> None:
    assert find_stack("NeMo-26.04.01") == find_stack("nemo-26")


def test_an_unknown_stack_has_a_wider_range_than_a_known_one() -> None:
    def width(stack: str) -> float:
        busy = Layout(tp=2, dp=4, zero=1, micro_batch=8)  # the host keeps up with its chip
        tree = step_time(a_setting(busy, stack=stack))
        assert tree.interval is not None
        return (tree.interval.high - tree.interval.low) / float(tree.value)

    assert width("unknown") > 1.3 * width("nemo-24")


def test_no_fitted_number_lies_at_the_end_of_what_is_possible() -> None:
    for name, (value, low, high) in shipped().posterior.items():
        assert low <= value <= high, name
        assert value > 0, name
        if name.startswith(("share_matmul", "share_shown", "share_bandwidth", "share_sustained")):
            assert value < 0.99, name


def korthikanti(recompute: str, layout: Layout, arch: Arch, batch: int) -> Setting:
    return Setting(
        arch, Cluster(find("a100-sxm-80gb"), layout.n_accelerators), layout, 2048, batch,
        "fp16", recompute, "megatron-2022",  # type: ignore[arg-type]
    )  # fmt: skip


GPT_22B = gpt("22b", d_model=6144, n_layers=48, n_heads=64, vocab_size=51200, max_seq_len=2048)
GPT_530B = gpt("530b", d_model=20480, n_layers=105, n_heads=128, vocab_size=51200, max_seq_len=2048)
LLAMA_405B = llama("405b", d_model=16384, n_layers=126, n_heads=128, n_kv_heads=8, d_ff=53248,
                   vocab_size=128256, max_seq_len=8192)  # fmt: skip
H100_405B = Layout(tp=8, pp=8, dp=8, cp=2, zero=1, virtual=8)

#: Seconds as published: Korthikanti 2022 (2205.05198), table 5; NVIDIA Megatron-Bridge,
#: performance summary of release 26.04.01 (405B, FP8 on 1024 H100, 328 tokens per second each).
PUBLISHED = [
    (korthikanti("full", Layout(tp=8, micro_batch=4, sequence_parallel=False), GPT_22B, 4), 1.42),
    (korthikanti("selective", Layout(tp=8, micro_batch=4), GPT_22B, 4), 1.10),
    (korthikanti("full", Layout(tp=8, pp=35, virtual=3, sequence_parallel=False), GPT_530B, 280),
     49.05),
    (korthikanti("selective", Layout(tp=8, pp=35, virtual=3), GPT_530B, 280), 37.83),
    (Setting(LLAMA_405B, Cluster(find("h100-sxm"), 1024), H100_405B, 8192, 1536, "fp8", "none",
             "nemo-26.04.01"), 37.46),
]  # fmt: skip


@pytest.mark.parametrize(("setting", "measured"), PUBLISHED)
def test_published_steps_lie_in_their_ranges(setting: Setting, measured: float) -> None:
    interval = step_time(setting).interval
    assert interval is not None
    assert interval.low < measured < interval.high
    assert seconds(setting) == pytest.approx(measured, rel=0.12)


# --- fits -----------------------------------------------------------------------------------


def made_rows(beliefs: Beliefs, stack: str = "megatron-2021") -> list[Row]:
    """Steps exactly as `beliefs` predict them."""
    shapes = [Layout(dp=4, zero=1), Layout(tp=2, dp=2), Layout(tp=4, dp=2), Layout(pp=2, dp=2)]
    jobs = [
        a_setting(x, chip=chip, compute="fp16", stack=stack, global_batch=b)
        for x in shapes
        for chip, b in (("a100-sxm-80gb", 64), ("v100-sxm-32gb", 32))
    ]
    return [Row(job, seconds(job, beliefs), "made") for job in jobs]


@pytest.mark.parametrize(
    ("stack", "again"),
    [("megatron-2022", "attention/core"), ("nemo-24.07", "feed_forward/activation")],
)
def test_selective_recomputation_runs_again_what_memory_does_not_keep(
    stack: str, again: str
) -> None:
    setting = replace(a_setting(Layout(dp=8), stack=stack), recompute="selective")
    layer = step_time(setting).find("layers/layer")
    assert list(layer.find("recompute").leaves()) == [again]
    once = layer.find(f"forward/{again}")
    assert float(layer.find(f"recompute/{again}").value) == float(once.value)


def test_a_fits_derivatives_are_those_of_its_distances() -> None:
    problem = Problem(made_rows(PRIORS))
    which = range(len(problem.rows))
    names = problem.names(which)
    z = np.linspace(-0.4, 0.5, len(names))  # not 0: ranges have two sides

    def logs(z: np.ndarray) -> np.ndarray:
        return np.log(problem.seconds(problem.values(dict(zip(names, z, strict=True))), which))

    sides = [(logs(z + 1e-5 * e), logs(z - 1e-5 * e)) for e in np.eye(len(names))]
    expected = np.stack([(more - less) / 2e-5 for more, less in sides], axis=1)
    assert problem.slopes(names, z, which) == pytest.approx(expected, abs=1e-6)


def test_what_is_judged_is_what_is_printed() -> None:
    setting = a_setting(Layout(tp=2, pp=2, dp=2, zero=1), global_batch=64)
    node, judged = step_time(setting), formula_of(setting).predict(shipped())
    assert judged.value == pytest.approx(float(node.value), rel=1e-12)
    assert judged.interval is not None
    assert node.interval is not None
    assert judged.interval.low == pytest.approx(node.interval.low, rel=1e-9)
    assert judged.interval.high == pytest.approx(node.interval.high, rel=1e-9)


def test_a_fit_to_its_own_priors_moves_nothing() -> None:
    found = fit(Problem(made_rows(PRIORS)))
    assert max(abs(z) for z in found.moved.values()) < 1e-3
    assert max(map(abs, found.errors)) < 1e-4


def test_a_fit_moves_towards_what_made_the_rows() -> None:
    truth = Beliefs({"share_sustained": (0.78, 0.7, 0.86)})
    found = fit(Problem(made_rows(truth)))
    assert max(map(abs, found.errors)) < 0.02
    assert found.moved["share_sustained"] < -0.2


def test_calibration_learns_what_is_special_about_a_stack() -> None:
    truth = Beliefs({**shipped().posterior, "residual_unknown": (1.4, 1.4, 1.4)})
    rows = made_rows(truth, stack="unknown")
    found = calibrate_stack(rows[:3])
    assert "residual_unknown" in found.identified
    assert found.beliefs.posterior["residual_unknown"][0] > found.prior["residual_unknown"]
    before = max(abs(seconds(r.setting) / r.seconds - 1) for r in rows[3:])
    after = max(abs(seconds(r.setting, found.beliefs) / r.seconds - 1) for r in rows[3:])
    assert after < 0.08 < before


def test_steps_of_one_chip_are_trusted_more_than_those_of_several() -> None:
    truth = Beliefs({**shipped().posterior, "residual_unknown": (1.4, 1.4, 1.4)})
    made = made_rows(truth, stack="unknown")
    for rows, more in ((made[:4:2], True), (made[:2], False)):
        plain = fit(Problem(rows, shipped(), may_move), tail=NORMAL)
        closer = max(map(abs, calibrate_stack(rows).errors)) < max(map(abs, plain.errors)) - 1e-9
        assert closer is more


def test_a_ranges_width_is_told_by_the_number_that_makes_it() -> None:
    """Against whole steps at both ends of each number's range, one number at a time."""
    setting = a_setting(Layout(tp=2, dp=4))
    formula = formula_of(setting)
    told = dict(formula.predict(PRIORS).widths)
    believed = [n for n in formula.names if n.startswith(("share_", "residual_", "error_"))]
    for name in believed:
        symbol = formula.symbols(PRIORS)[name]
        assert symbol.spread is not None
        low, high = (
            seconds(setting, Beliefs({name: (end, end, end)}))
            for end in (symbol.spread.low, symbol.spread.high)
        )
        assert told[name] == pytest.approx((math.log(high / low) / 2) ** 2, abs=1e-9), name
    assert len(believed) > 5


def test_a_stack_is_known_where_steps_of_it_were_read() -> None:
    formula = formula_of(a_setting(Layout(dp=8), stack="torchtitan"))
    assert formula.predict(PRIORS).known is False
    assert formula.predict(Beliefs({"residual_unknown": (1.0, 0.9, 1.1)})).known is False
    assert formula.predict(Beliefs({"residual_torchtitan": (1.0, 0.9, 1.1)})).known is True


def test_one_odd_row_moves_a_fit_little() -> None:
    rows = made_rows(PRIORS)
    odd = [replace(rows[0], seconds=2 * rows[0].seconds), *rows[1:]]
    found = fit(Problem(odd))
    assert max(map(abs, found.errors[1:])) < 0.03


def test_a_recomputation_that_stops_early_leaves_out_the_last_product() -> None:
    def again(stack: str) -> float:
        step = step_time(a_setting(Layout(dp=8, zero=3), stack=stack, recompute="full"), PRIORS)
        layer = step.find("layers/layer")
        whole = float(layer.find("forward").value)
        down = float(layer.find("forward/feed_forward/down").value)
        made = float(layer.find("recompute").value)
        assert made <= whole
        return (whole - made) / down

    assert again("llm-foundry") > 1
    assert again("llm-foundry-2023-05") == pytest.approx(0)


def test_a_machine_known_to_be_slow_slows_its_stack_alone() -> None:
    slow, sound = (
        seconds(a_setting(Layout(dp=8), stack=name))
        for name in ("deepspeed-bloom-2022-02", "deepspeed-bloom")
    )
    assert slow == pytest.approx(1.05 * sound)


def test_padded_experts_do_not_wait_for_the_host() -> None:
    def host(stack: str) -> float:
        setting = a_setting(Layout(dp=8, ep=8), MIXED, "b200-sxm", stack=stack, compute="fp8")
        step = step_time(setting)
        return float(step.find("layers/layer/host").value)

    assert host("nemo-25.09-tokendrop") == 0 < host("nemo-25.09")


def test_own_steps_survive_their_file() -> None:
    own = OwnSteps("torchtitan", 3, {"residual_torchtitan": (1.2, 1.1, 1.3)})
    read = OwnSteps.from_table(tomllib.loads(own.to_toml()), "stack.toml")
    setting = a_setting(Layout(dp=8), stack="torchtitan")
    assert read == own
    assert seconds(setting, read.beliefs) == pytest.approx(1.2 * seconds(setting))


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("n_steps = 3\n[fitted]\n", "be the name of a stack"),
        ('stack = "a"\nn_steps = 0\n[fitted]\n', "above 0"),
        ('stack = "a"\nn_steps = 3\n[fitted]\nx = [1, 2, 3]\n', "in this order"),
        ('stack = "a"\nn_steps = 3\n[fitted]\nx = 2\n', "in this order"),
    ],
)
def test_a_broken_file_of_own_steps_is_refused(text: str, said: str) -> None:
    with pytest.raises(InputError, match=said):
        OwnSteps.from_table(tomllib.loads(text), "stack.toml")


def test_calibration_refuses_rows_of_two_stacks() -> None:
    rows = made_rows(PRIORS)[:1] + made_rows(PRIORS, "llm-foundry")[:1]
    with pytest.raises(InputError, match="be one stack"):
        calibrate_stack(rows)


def test_a_belief_replaces_a_prior_by_name() -> None:
    known = Beliefs({"a_number": (3.0, 2.0, 4.0)}, "three steps")
    symbol = known.symbol("a-number", (1.0, 0.5, 2.0), Symbol("x").basis, "a guess")
    assert (symbol.value, symbol.basis.value) == (3.0, "fitted")
    assert "three steps; before: 1, a guess" in symbol.source
