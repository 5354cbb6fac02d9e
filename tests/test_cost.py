"""A step's cost from a synthetic profile, checked by hand, and profiles as files."""

from __future__ import annotations

import itertools
import json
import math
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from isoflop.arch import gpt, llama
from isoflop.count import Workload, params
from isoflop.errors import InputError, UnknownName
from isoflop.hardware.profile import Curve, Machine, Profile
from isoflop.plan.cost import step_cost
from isoflop.plan.memory.peak import bytes_alive, moments, peak_memory
from isoflop.quantity import Basis, Interval

GPT = gpt("tiny", d_model=8, n_layers=2, n_heads=2, vocab_size=16, max_seq_len=4)
LLAMA = llama(
    "tiny", d_model=8, n_layers=3, n_heads=2, n_kv_heads=1, d_ff=12, vocab_size=16, max_seq_len=4
)
WORK = Workload.train(2, 4)

#: Axes of each kernel; seconds are the product of the sizes, so sums are done by hand.
AXES = {
    "linear": 3,
    "bias": 2,
    "attention": 4,
    "attention_scores": 4,
    "attention_own": 4,
    "dropout": 1,
    "layer_norm": 2,
    "rms_norm": 2,
    "rotary": 2,
    "add": 1,
    "multiply": 1,
    "silu": 1,
    "relu": 1,
    "gelu": 1,
    "gelu_tanh": 1,
    "gelu_quick": 1,
    "silu_clamped": 1,
    "gather": 3,
}
#: Those that are timed in one go.
WHOLE = {"loss": 2, "optimizer": 2, "batch": 2, "fresh": 1}  # fmt: skip


def power(name: str, n_axes: int, scale: float = 1.0, wide: float = 1.0) -> Curve:
    """A curve whose seconds are `scale` times the product of the sizes."""
    grid = ((1.0, 4.0),) * n_axes
    seconds = tuple(scale * math.prod(sizes) for sizes in itertools.product(*grid))
    low, high = (tuple(s * f for s in seconds) for f in (1 / wide, wide))
    return Curve(name, tuple(f"axis{i}" for i in range(n_axes)), grid, seconds, low, high)


def synthetic(
    wide: float = 1.0,
    pace: Interval | None = None,
    bytes_reused: int = 10**12,
    bytes_memory: int = 2**34,
) -> Profile:
    curves = [
        power(f"{name}_{p}", n, 1e-9, wide)
        for name, n in AXES.items()
        for p in ("forward", "backward")
    ]
    curves += [power(name, n, 1e-9) for name, n in WHOLE.items()]
    machine = Machine("imagined", 4, 1, bytes_memory, "2.13", "Linux x86_64", "2026-11-23")
    return Profile(
        machine=machine,
        curves={curve.name: curve for curve in curves},
        pace=pace or Interval(1.0, 1.0),
        bytes_framework=1000,
        bytes_room=100,
        bytes_reused=bytes_reused,
        ratio_resident=1.5,
        seconds_between=0.0,
        seconds_spent=1.0,
        n_rounds=3,
    )


def seconds_of(tree, path: str) -> float:
    return float(tree.find(path).value) * 1e9


def test_a_curve_is_exact_at_its_grid_points() -> None:
    values = (1.0, 7.0, 3.0, 20.0, 5.0, 90.0)
    curve = Curve("c", ("a", "b"), ((2, 9), (1, 10, 300)), values, values, values)
    points = itertools.product((2, 9), (1, 10, 300))
    assert [curve.at(*p) for p in points] == pytest.approx(values)


@given(
    st.lists(st.floats(1e-6, 1e3), min_size=4, max_size=4).map(sorted),
    st.floats(0.1, 1e4),
    st.floats(1.0, 50.0),
)
def test_a_rising_curve_stays_rising_between_and_beyond_its_points(values, size, factor) -> None:
    v = tuple(values)
    curve = Curve("c", ("n",), ((1, 8, 64, 512),), v, v, v)
    assert curve.at(size * factor) >= curve.at(size) * (1 - 1e-9)


@given(st.tuples(*[st.floats(0.01, 1e5)] * 3))
def test_a_power_law_is_read_exactly_everywhere(sizes) -> None:
    assert power("p", 3).at(*sizes) == pytest.approx(math.prod(sizes), rel=1e-9)


def test_spread_widens_from_quartiles_to_ninety_percent() -> None:
    interval = power("p", 1, wide=1.1).interval(2)
    assert interval.low == pytest.approx(2 * 1.1**-2.4387, rel=1e-3)
    assert interval.high == pytest.approx(2 * 1.1**2.4387, rel=1e-3)


def test_a_profile_survives_json() -> None:
    profile = synthetic(wide=1.2, pace=Interval(0.9, 1.3))
    assert Profile.loads(profile.dumps()) == profile


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"schema": "isoflop/9"}, "schema"),
        ({"kind": "plan"}, "schema"),
        ({"pace": {"low": 2, "high": 1, "level": 0.9}}, "pace"),
        ({"bytes_framework": "many"}, "bytes_framework"),
        ({"machine": {}}, "machine"),
        ({"curves": [{"name": "x"}]}, "curves"),
    ],
)
def test_a_malformed_profile_is_refused_by_field(change, field) -> None:
    with pytest.raises(InputError) as error:
        Profile.from_json(json.loads(synthetic().dumps()) | change)
    assert field in {problem.field for problem in error.value.problems}


@pytest.mark.parametrize("text", ["", "[", "[]", "3", "null"])
def test_what_is_no_profile_is_refused(text) -> None:
    with pytest.raises(InputError):
        Profile.loads(text)


@pytest.mark.parametrize(
    "broken",
    [
        {"seconds": (1.0,)},
        {"seconds": (1.0, -1.0)},
        {"seconds": (1.0, math.nan)},
        {"grid": ((4, 1),)},
        {"grid": ((0, 1),)},
        {"low": (2.0, 2.0)},
    ],
)
def test_an_impossible_curve_is_refused(broken) -> None:
    fields = {"grid": ((1, 4),), "seconds": (1.0, 4.0), "low": (1.0, 4.0), "high": (1.0, 4.0)}
    with pytest.raises(InputError):
        Curve(name="c", axes=("n",), **(fields | broken))


def test_the_cost_of_a_gpt_is_what_a_hand_adds_up() -> None:
    tree = step_cost(GPT, WORK, synthetic())
    tokens = 2 * 4
    assert seconds_of(tree, "batch") == pytest.approx(8)
    assert seconds_of(tree, "forward/layer/attention/q") == pytest.approx(
        tokens * 8 * 8 + tokens * 8
    )
    # 4 heads of 2 sequences, 4 tokens, head size 4, no sharing.
    assert seconds_of(tree, "forward/layer/attention/core") == pytest.approx(4 * 4 * 4 * 1)
    assert seconds_of(tree, "forward/layer/feed_forward/activation") == pytest.approx(tokens * 32)
    assert seconds_of(tree, "forward/layer/norm_attention") == pytest.approx(tokens * 8)
    assert seconds_of(tree, "forward/layer/residual") == pytest.approx(2 * tokens * 8)
    # Backward: k shares its input with q, so one gradient of it is added up.
    product = tokens * 8 * 8 + tokens * 8
    assert seconds_of(tree, "backward/layer/attention/q") == pytest.approx(product)
    assert seconds_of(tree, "backward/layer/attention/k") == pytest.approx(product + tokens * 8)
    # The head sums its gradient over rows (once here), and a tied one adds it to the embedding's.
    assert seconds_of(tree, "backward/head") == pytest.approx(tokens * 8 * 16 + 2 * 16 * 8)
    assert seconds_of(tree, "forward/loss") == pytest.approx(tokens * 16)
    assert seconds_of(tree, "backward/loss") == 0


def test_the_cost_of_a_llama_knows_groups_gates_and_turns() -> None:
    tree = step_cost(LLAMA, WORK, synthetic())
    tokens = 8
    assert seconds_of(tree, "forward/layer/attention/core") == pytest.approx(4 * 4 * 4 * 2)
    assert seconds_of(tree, "forward/layer/feed_forward/activation") == pytest.approx(
        2 * tokens * 12
    )
    # 2 query heads and 1 key head per token turn.
    assert seconds_of(tree, "forward/layer/attention/rotary") == pytest.approx(tokens * 3 * 4)
    assert seconds_of(tree, "backward/layer/feed_forward/up") == pytest.approx(
        tokens * 8 * 12 + tokens * 8
    )
    assert seconds_of(tree, "backward/layer/attention/out") == pytest.approx(tokens * 8 * 8)


@pytest.mark.parametrize("arch", [GPT, LLAMA])
def test_the_optimizer_of_a_linear_curve_costs_one_unit_per_parameter(arch) -> None:
    tree = step_cost(arch, WORK, synthetic())
    assert seconds_of(tree, "optimizer") == pytest.approx(params(arch).value)


@pytest.mark.parametrize("arch", [GPT, LLAMA])
def test_a_total_is_the_sum_of_its_parts(arch) -> None:
    tree = step_cost(arch, WORK, synthetic(wide=1.3))
    parts = sum(float(node.value * tree.copies(path)) for path, node in tree.leaves().items())
    assert parts == pytest.approx(float(tree.value), rel=1e-12)


def test_every_second_is_measured_and_a_slow_machine_moves_all_of_it() -> None:
    tree = step_cost(GPT, WORK, synthetic(pace=Interval(0.8, 1.5)))
    assert tree.bases == {Basis.MEASURED, Basis.MODELLED}
    interval = tree.interval
    assert interval is not None
    assert interval.low == pytest.approx(0.8 * float(tree.value), rel=0.05)
    assert interval.high == pytest.approx(1.5 * float(tree.value), rel=0.05)


def test_only_blocks_that_are_not_reused_pay_for_fresh_memory() -> None:
    reused, fresh = (step_cost(GPT, WORK, synthetic(bytes_reused=b)) for b in (10**12, 1000))
    change = seconds_of(fresh, "forward") - seconds_of(reused, "forward")
    # Above 1000 bytes: up and activation, 2 layers, 8 tokens of 32 numbers in fp32.
    assert change == pytest.approx(2 * 2 * 8 * 32 * 4)


def test_a_missing_curve_is_named() -> None:
    profile = synthetic()
    del profile.curves["gather_backward"]
    with pytest.raises(UnknownName, match="gather_backward"):
        step_cost(GPT, WORK, profile)


def test_peak_memory_is_framework_and_the_worst_moment() -> None:
    tree = peak_memory(GPT, WORK, synthetic())
    alive = bytes_alive(GPT, WORK, 10**12)
    assert tree.find("framework").value == 1000
    assert float(tree.value) == pytest.approx(1000 + 1.5 * alive.bytes_small - 100)
    assert alive.bytes_large == 0


def test_every_moment_holds_weights_and_both_of_adams() -> None:
    least = 3 * 4 * params(LLAMA).value
    for blocks in moments(LLAMA, WORK).values():
        assert sum(block.total.value for block in blocks) >= least


def test_a_wide_vocabulary_peaks_in_the_loss_and_a_deep_model_in_its_layers() -> None:
    def worst(arch) -> str:
        alive = moments(arch, WORK)
        return max(alive, key=lambda name: sum(b.total.value for b in alive[name]))

    sizes = {"d_model": 8, "n_heads": 2, "max_seq_len": 4}
    assert worst(gpt("wide", n_layers=1, vocab_size=4000, **sizes)) != "backward of the last layer"
    assert worst(gpt("deep", n_layers=20, vocab_size=8, **sizes)) != "backward of the loss"


def test_large_and_small_blocks_peak_apart() -> None:
    whole, split = bytes_alive(GPT, WORK, 10**12), bytes_alive(GPT, WORK, 500)
    assert split.bytes_large > 0
    assert split.bytes_small < whole.bytes_small <= split.bytes_small + split.bytes_large


@pytest.mark.parametrize(("attention", "residual"), [(0.0, 0.1), (0.1, 0.0), (0.1, 0.1)])
def test_dropout_keeps_what_pytorch_keeps(attention: float, residual: float) -> None:
    """Oracle: the storages that autograd saves in a forward pass of the built model."""
    import torch

    from isoflop.model import build

    def dropping(attention: float, residual: float):
        base = gpt("d", d_model=32, n_layers=2, n_heads=4, vocab_size=50, max_seq_len=64)
        spec = replace(base.layers[0].attention, dropout=attention)
        return replace(
            base, layers=(replace(base.layers[0], attention=spec, dropout=residual),) * 2
        )

    def saved(arch) -> int:
        model, storages = build(arch).train(), {}

        def pack(tensor):
            storages[tensor.untyped_storage().data_ptr()] = tensor
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            _ = model(torch.zeros(2, 64, dtype=torch.int64))
        return sum(t.untyped_storage().nbytes() for t in storages.values())

    def derived(arch) -> int:
        blocks = moments(arch, Workload.train(2, 64))["the loss"]
        return sum(int(b.total.value) for b in blocks)

    plain, dropped = dropping(0.0, 0.0), dropping(attention, residual)
    assert derived(dropped) - derived(plain) == saved(dropped) - saved(plain)
