"""Serving plans: the lecture's GPT-3 figures set right, memory by hand, and properties."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from isoflop.arch import Arch, Attention, Dense, Experts, LatentAttention, gpt, llama
from isoflop.arch.spec import Window
from isoflop.errors import Infeasible, InputError
from isoflop.hardware import Chip, Cluster, find, parse_cluster
from isoflop.plan import ServePlan, plan_serve
from isoflop.quantity import Symbol
from isoflop.quantity.expr import FUNCTIONS

GPT3 = gpt("gpt-3", d_model=12288, n_layers=96, n_heads=96, vocab_size=50257, max_seq_len=2048)
LLAMA3_8B = llama(
    "llama-3-8b", d_model=4096, n_layers=32, n_heads=32, n_kv_heads=8, d_ff=14336,
    vocab_size=128256, max_seq_len=8192,
)  # fmt: skip
LLAMA3_70B = llama(
    "llama-3-70b", d_model=8192, n_layers=80, n_heads=64, n_kv_heads=8, d_ff=28672,
    vocab_size=128256, max_seq_len=8192,
)  # fmt: skip
EIGHT_A100 = parse_cluster("8xa100-sxm-80gb")
H100 = parse_cluster("h100-sxm")
#: Launches and messages that take no time to speak of: the roofline alone.
AT_ONCE = {"seconds_layer": 1e-12, "seconds_all_reduce": 1e-12}


def gpt3(**more: Any) -> ServePlan:
    asked: dict[str, Any] = {
        "input_tokens": 2047,
        "output_tokens": 1,
        "batch": 1,
        "precision": "fp16",
    }
    asked |= more
    return plan_serve(GPT3, EIGHT_A100, **asked)


def with_feed_forward(arch: Arch, feed_forward: Dense | Experts) -> Arch:
    layer = replace(arch.layers[0], feed_forward=feed_forward)
    return replace(arch, layers=(layer,) * arch.n_layers)


# --- GPT-3 -----------------------------------------------------------------------------------


def test_gpt3_weighs_350_gb_in_fp16() -> None:
    weights = gpt3().memory.find("bytes_weights").value
    assert float(weights) == pytest.approx(349.2e9, rel=1e-3)
    assert float(weights) == pytest.approx(350e9, rel=0.01)


def test_gpt3_caches_4_72_mb_per_token() -> None:
    # 2 x 96 layers x 12288 x 2 bytes.
    assert gpt3().memory.find("bytes_kv_cache").value == 2 * 96 * 12288 * 2 * 2048


@pytest.mark.parametrize(
    ("precision", "by_memory", "by_tensor"), [("fp16", 5, 6), ("int8", 3, 3), ("int4", 2, 2)]
)
def test_gpt3_needs_five_a100_by_capacity_and_six_to_split_96_heads(
    precision: str, by_memory: int, by_tensor: int
) -> None:
    plan = gpt3(precision=precision, kv_precision="fp16")
    assert plan.accelerators_min.value == by_memory
    assert plan.accelerators_min_tensor == by_tensor


def test_gpt3_decodes_at_most_46_7_tokens_a_second_on_eight_a100() -> None:
    empty = gpt3(input_tokens=1, efficiency_bandwidth=1, **AT_ONCE)
    assert 1 / float(empty.seconds_per_token.value) == pytest.approx(46.7, rel=0.002)
    full = gpt3(efficiency_bandwidth=1, **AT_ONCE)
    assert 1 / float(full.seconds_per_token.value) == pytest.approx(45.5, rel=0.003)
    usual = gpt3(input_tokens=1, efficiency_bandwidth=0.65, **AT_ONCE)
    assert 1 / float(usual.seconds_per_token.value) == pytest.approx(30, rel=0.02)


def test_gpt3_at_batch_23_stays_under_657_tokens_a_second() -> None:
    plan = gpt3(batch=23, efficiency_bandwidth=1, **AT_ONCE)
    assert 640 < float(plan.tokens_per_second_decode.value) <= 657


def test_gpt3_reads_2048_tokens_in_0_57_seconds_at_half_of_peak() -> None:
    # Weights alone; scores add 2.8 %.
    plan = gpt3(efficiency_compute=0.5, efficiency_bandwidth=1)
    seconds = sum(
        float(node.value) for path, node in plan.seconds_prefill.find("layer").leaves().items()
        if path.split("/")[-1] in {"q", "k", "v", "out", "up", "down"}
    ) * 96  # fmt: skip
    assert seconds == pytest.approx(0.57, rel=0.01)
    assert float(plan.seconds_prefill.value) == pytest.approx(0.57 * 1.028, rel=0.02)


@pytest.mark.parametrize(("batch", "share"), [(1, 0.972), (8, 0.818), (32, 0.53)])
def test_the_share_of_weights_is_a_statement_about_the_batch(batch: int, share: float) -> None:
    plan = plan_serve(GPT3, parse_cluster("16xa100-sxm-80gb"), input_tokens=2047, output_tokens=1,
                      batch=batch, precision="fp16", tp=8)  # fmt: skip
    weights, cache = (
        float(plan.memory.find(f"bytes_{of}").value) for of in ("weights", "kv_cache")
    )
    assert weights / (weights + cache) == pytest.approx(share, abs=0.005)
    assert sum(plan.shares.values()) == pytest.approx(1)


def test_a_million_tokens_cost_72_dollars_at_batch_1_and_5_at_batch_23() -> None:
    # Decoding at the roofline: 8 x 1.5 $/h over the rate, caches empty and full.
    alone = gpt3(input_tokens=1, output_tokens=100, price=1.5, efficiency_bandwidth=1, **AT_ONCE)
    assert float(alone.dollars_per_million_tokens.value) == pytest.approx(72, rel=0.02)
    rate = float(gpt3(batch=23, efficiency_bandwidth=1, **AT_ONCE).tokens_per_second_decode.value)
    assert 8 * 1.5 / 3600 / rate * 1e6 == pytest.approx(5, rel=0.03)


# --- memory ----------------------------------------------------------------------------------


def test_more_precision_kept_in_the_cache_is_the_only_thing_kv_precision_changes() -> None:
    wide, narrow = gpt3(kv_precision="fp16"), gpt3(kv_precision="fp8")
    cache = "bytes_kv_cache"
    assert wide.memory.find(cache).value == 2 * narrow.memory.find(cache).value
    assert wide.memory.find("bytes_weights").value == narrow.memory.find("bytes_weights").value


def test_grouped_queries_shrink_the_cache_by_their_ratio() -> None:
    def cache(n_kv_heads: int) -> int:
        arch = llama("x", d_model=256, n_layers=2, n_heads=8, n_kv_heads=n_kv_heads, d_ff=512,
                     vocab_size=128, max_seq_len=256)  # fmt: skip
        plan = plan_serve(arch, H100, input_tokens=200, output_tokens=56, batch=3)
        return int(plan.memory.find("bytes_kv_cache").value)

    assert cache(8) == 8 * cache(1) == 2 * cache(4)


def test_one_key_value_head_is_copied_not_split() -> None:
    arch = llama("mqa", d_model=256, n_layers=2, n_heads=8, n_kv_heads=1, d_ff=512, vocab_size=128,
                 max_seq_len=256)  # fmt: skip
    plan = plan_serve(
        arch, parse_cluster("8xh100-sxm"), input_tokens=200, output_tokens=56, batch=3
    )
    assert plan.tp == 8
    held = plan.bytes_per_accelerator.find("bytes_kv_cache").value
    assert held == plan.memory.find("bytes_kv_cache").value


def test_latent_attention_caches_70272_bytes_per_token_for_61_layers() -> None:
    # DeepSeek-V3: (512 + 64) numbers x 61 layers x 2 bytes.
    base = llama(
        "x", d_model=256, n_layers=61, n_heads=8, d_ff=512, vocab_size=128, max_seq_len=256
    )
    latent = LatentAttention(8, d_kv_latent=512, d_head_nope=128, d_head_rope=64, d_head_value=128)
    arch = replace(base, layers=(replace(base.layers[0], attention=latent),) * 61)
    plan = plan_serve(arch, H100, input_tokens=255, output_tokens=1, batch=1)
    assert plan.memory.find("bytes_kv_cache").value == 70_272 * 256


def test_a_window_bounds_what_is_cached_and_read() -> None:
    def step(span: Any) -> float:
        attention = base.layers[0].attention
        assert isinstance(attention, Attention)
        layer = replace(base.layers[0], attention=replace(attention, span=span))
        arch = replace(base, layers=(layer,) * base.n_layers)
        plan = plan_serve(arch, H100, input_tokens=8000, output_tokens=100, batch=32)
        return float(plan.seconds_per_token.find("layer/attention/core").value)

    base = LLAMA3_8B
    full = step(base.layers[0].attention.span)  # type: ignore[union-attr]
    assert step(Window(1024)) < full / 7


def test_the_largest_batch_fits_and_one_more_does_not() -> None:
    plan = plan_serve(LLAMA3_8B, H100, input_tokens=1024, output_tokens=256)
    assert plan.batch == plan.batch_max > 1
    per_request = 2 * 32 * 8 * 128 * 2 * (1024 + 256) + 4 * 128256  # cache and logits
    room = plan.cluster.chip.bytes_memory.value - plan.bytes_per_accelerator.value
    assert 0 <= room < per_request
    with pytest.raises(Infeasible):
        plan_serve(LLAMA3_8B, H100, input_tokens=1024, output_tokens=256, batch=plan.batch + 1)


# --- time ------------------------------------------------------------------------------------


def test_decoding_at_batch_1_reads_every_active_weight_once() -> None:
    n_params = 8_030_261_248 - 128_256 * 4096  # one row of the embedding is read, not the table
    plan = plan_serve(
        LLAMA3_8B, H100, input_tokens=1, output_tokens=1, batch=1, efficiency_bandwidth=1
    )
    assert float(plan.seconds_per_token.value) == pytest.approx(2 * n_params / 3.35e12, rel=0.002)


def test_a_prompt_needs_the_logits_of_its_last_token_only() -> None:
    def head(tokens: int) -> float:
        plan = plan_serve(LLAMA3_8B, H100, input_tokens=tokens, output_tokens=1, batch=1)
        return float(plan.seconds_prefill.find("head").value)

    assert head(4096) == head(16)


def test_few_tokens_read_few_experts() -> None:
    """Mixtral's shape: at batch 1 two of eight experts are read, at batch 64 all eight."""

    def step(arch: Arch, batch: int) -> float:
        plan = plan_serve(arch, EIGHT_A100, input_tokens=1, output_tokens=1, batch=batch,
                          efficiency_bandwidth=1)  # fmt: skip
        experts = plan.seconds_per_token.find("layer/feed_forward/experts")
        return float(experts.value) * 2.039e12 * 8 / (3 * 4096 * 14336 * 2)

    experts = Experts(n_experts=8, n_active=2, expert=Dense(14336, "silu", gated=True))
    arch = with_feed_forward(LLAMA3_8B, experts)
    assert step(arch, 1) == pytest.approx(2, rel=0.01)
    assert step(arch, 2) == pytest.approx(8 * (1 - 0.75**2), rel=0.01)
    assert step(arch, 64) == pytest.approx(8, rel=0.01)


def test_a_token_waits_for_launches_where_the_layers_have_little_to_do() -> None:
    def plan(cluster: str, batch: int, **more: float) -> ServePlan:
        return plan_serve(LLAMA3_8B, parse_cluster(cluster), input_tokens=512, output_tokens=64,
                          batch=batch, precision="int4", **more)  # fmt: skip

    slow = plan("h100-sxm", 1, seconds_layer=1e-3)
    assert float(slow.seconds_per_token.value) == pytest.approx(32e-3)
    assert any("waits for launches" in note for note in slow.notes)
    # A host that is done before the accelerator costs nothing: the longer of the two, no sum.
    quick, quicker = (plan("h100-sxm", 256, seconds_layer=s) for s in (1e-5, 1e-6))
    assert quick.seconds_per_token.value == quicker.seconds_per_token.value
    assert quick.seconds_per_token.find("launches").value == 0
    assert not any("waits for launches" in note for note in quick.notes)


def test_two_messages_a_layer_come_on_top_where_it_is_split() -> None:
    def seconds(all_reduce: float) -> float:
        plan = plan_serve(LLAMA3_8B, parse_cluster("8xh100-sxm"), input_tokens=512, output_tokens=64,
                          batch=1, tp=8, seconds_all_reduce=all_reduce)  # fmt: skip
        return float(plan.seconds_per_token.value)

    assert seconds(2e-5) - seconds(1e-5) == pytest.approx(2 * 32 * 1e-5)
    alone = plan_serve(LLAMA3_8B, H100, input_tokens=512, output_tokens=64, batch=1)
    assert "messages" not in {child.name for child in alone.seconds_per_token.children}


def test_throughput_counts_the_prompts_time() -> None:
    plan = plan_serve(LLAMA3_8B, H100, input_tokens=4096, output_tokens=64, batch=16)
    prefill, step = float(plan.seconds_prefill.value), float(plan.seconds_per_token.value)
    expected = 16 * 64 / (16 * prefill + 64 * step)
    assert float(plan.tokens_per_second.value) == pytest.approx(expected)
    assert plan.tokens_per_second.value < plan.tokens_per_second_decode.value


def test_copies_multiply_throughput_and_leave_latency() -> None:
    one = plan_serve(LLAMA3_8B, H100, input_tokens=512, output_tokens=64, batch=4, tp=1)
    four = plan_serve(LLAMA3_8B, parse_cluster("4xh100-sxm"), input_tokens=512, output_tokens=64,
                      batch=4, tp=1)  # fmt: skip
    assert four.n_copies == 4
    assert four.seconds_per_token.value == one.seconds_per_token.value
    assert float(four.tokens_per_second.value) == pytest.approx(
        4 * float(one.tokens_per_second.value)
    )
    assert float(four.dollars_per_million_tokens.value) == pytest.approx(
        float(one.dollars_per_million_tokens.value)
    )


def test_a_model_too_large_for_a_node_is_piped_through_two() -> None:
    plan = plan_serve(GPT3, parse_cluster("16xa100-sxm-40gb"), input_tokens=1000, output_tokens=24,
                      batch=1, precision="fp16")  # fmt: skip
    assert (plan.tp, plan.pp, plan.n_copies) == (8, 2, 1)


# --- errors ----------------------------------------------------------------------------------


def test_a_model_that_does_not_fit_says_how_many_accelerators_it_takes() -> None:
    with pytest.raises(Infeasible, match=r"largest part bytes_weights .* it takes 2 accelerators"):
        plan_serve(LLAMA3_70B, H100, input_tokens=1024, output_tokens=256)


@pytest.mark.parametrize(
    ("wrong", "field"),
    [
        ({"input_tokens": 0}, "input_tokens"),
        ({"input_tokens": 8000, "output_tokens": 1000}, "output_tokens"),
        ({"batch": 0}, "batch"),
        ({"precision": "int3"}, "precision"),
        ({"kv_precision": "bf61"}, "kv_precision"),
        ({"efficiency_bandwidth": 1.5}, "efficiency_bandwidth"),
        ({"seconds_layer": 0}, "seconds_layer"),
        ({"tp": 3}, "tp"),
        ({"tp": 16}, "tp"),
    ],
)
def test_wrong_input_names_its_field(wrong: dict[str, Any], field: str) -> None:
    asked: dict[str, Any] = {"input_tokens": 16, "output_tokens": 16} | wrong
    with pytest.raises(InputError) as error:
        plan_serve(LLAMA3_8B, parse_cluster("8xh100-sxm"), **asked)
    assert error.value.problems[0].field == field


def test_bf16_on_a_chip_without_it_is_refused_and_int8_runs_in_fp16_there() -> None:
    v100 = parse_cluster("v100-sxm-32gb")
    with pytest.raises(InputError, match="choose one of fp32, fp16"):
        plan_serve(LLAMA3_8B, v100, input_tokens=16, output_tokens=16)
    plan = plan_serve(LLAMA3_8B, v100, input_tokens=16, output_tokens=16, precision="int8")
    assert plan.precision_compute == "fp16"
    assert plan_serve(LLAMA3_8B, H100, input_tokens=16, output_tokens=16,
                      precision="fp8").precision_compute == "fp8"  # fmt: skip


# --- properties ------------------------------------------------------------------------------


def faster(chip: Chip, field: str, factor: float) -> Chip:
    symbol: Symbol = getattr(chip, field)
    assert symbol.given is not None
    changed: dict[str, Any] = {field: replace(symbol, given=round(symbol.given * factor))}
    return replace(chip, **changed)


@settings(deadline=None, max_examples=10)
@given(st.floats(1, 20), st.integers(1, 64))
def test_more_bandwidth_never_slows(factor: float, batch: int) -> None:
    def seconds(chip: Chip) -> tuple[float, float]:
        plan = plan_serve(
            LLAMA3_8B, Cluster(chip, 1), input_tokens=64, output_tokens=8, batch=batch
        )
        return float(plan.seconds_prefill.value), float(plan.seconds_per_token.value)

    before = seconds(H100.chip)
    after = seconds(faster(H100.chip, "bytes_per_second_memory", factor))
    assert all(a <= b for a, b in zip(after, before, strict=True))


@settings(deadline=None, max_examples=10)
@given(st.floats(1, 4))
def test_more_memory_never_holds_fewer_requests(factor: float) -> None:
    def most(chip: Chip) -> int:
        plan = plan_serve(LLAMA3_8B, Cluster(chip, 1), input_tokens=512, output_tokens=128, batch=1)
        return plan.batch_max

    assert most(faster(H100.chip, "bytes_memory", factor)) >= most(H100.chip)


@settings(deadline=None, max_examples=10)
@given(st.sampled_from([1, 2, 4]), st.integers(1, 8))
def test_splitting_further_never_adds_bytes_per_accelerator_nor_time(tp: int, batch: int) -> None:
    def plan(ways: int) -> ServePlan:
        return plan_serve(LLAMA3_8B, parse_cluster("8xh100-sxm"), input_tokens=512, output_tokens=8,
                          batch=batch, tp=ways)  # fmt: skip

    few, many = plan(tp), plan(2 * tp)
    assert many.bytes_per_accelerator.value <= few.bytes_per_accelerator.value
    assert many.seconds_per_token.value <= few.seconds_per_token.value


def test_every_printed_formula_gives_its_value_again_and_parts_add_up() -> None:
    experts = Experts(n_experts=8, n_active=2, expert=Dense(2048, "silu", gated=True))
    for arch in (LLAMA3_8B, with_feed_forward(LLAMA3_8B, experts)):
        plan = plan_serve(arch, parse_cluster("2xh100-sxm"), input_tokens=512, output_tokens=64, batch=4,
                          precision="int4")  # fmt: skip
        for name, root in {"memory": plan.memory, **plan.nodes()}.items():
            for path, node in root.walk():
                names = {n: symbol.value for n, symbol in node.total.symbols().items()}
                again = eval(node.total.text, dict(FUNCTIONS), names)
                assert float(again) == pytest.approx(float(node.value), rel=1e-12), (name, path)
                if node.children:
                    parts = sum(child.value for child in node.children) * node.times.value
                    assert float(parts) == pytest.approx(float(node.value), rel=1e-12), (name, path)


def test_ranges_hold_their_numbers_and_come_from_named_assumptions() -> None:
    plan = plan_serve(LLAMA3_8B, H100, input_tokens=512, output_tokens=64, batch=4)
    assert {s.name for s in plan.assumptions} == {
        "bytes_runtime", "efficiency_bandwidth", "efficiency_compute", "seconds_layer_launched",
    }  # fmt: skip
    for name in (
        "seconds_prefill",
        "seconds_per_token",
        "tokens_per_second",
        "dollars_per_million_tokens",
    ):
        interval = plan.nodes()[name].interval
        assert interval is not None, name
        assert float(plan.nodes()[name].value) in interval, name


def test_the_json_has_the_promised_keys() -> None:
    plan = plan_serve(LLAMA3_8B, H100, input_tokens=512, output_tokens=64)
    out = json.loads(json.dumps(plan.to_json()))
    for key in ("accelerators_min", "seconds_prefill", "seconds_per_token", "tokens_per_second",
                "dollars_per_million_tokens"):  # fmt: skip
        assert isinstance(out[key], int | float), key
    assert [child["name"] for child in out["memory"]["children"]] == [
        "bytes_weights", "bytes_kv_cache", "bytes_activations", "bytes_logits", "bytes_overhead",
    ]  # fmt: skip
    assert find("h100-sxm").bytes_memory.value >= out["bytes_per_accelerator"]
