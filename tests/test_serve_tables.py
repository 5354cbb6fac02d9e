"""Limits, places, stored formats and the tables beside a serving plan."""

from __future__ import annotations

import csv
import json
import os
import runpy
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from isoflop.arch import Arch, llama
from isoflop.arch.zoo import entry
from isoflop.errors import Infeasible
from isoflop.hardware import parse_cluster
from isoflop.plan import ServePlan, plan_serve
from isoflop.plan.serving.tables import (
    attentions,
    batches,
    kind_of,
    knee,
    quantizations,
    tables_json,
)

LLAMA3_8B, LLAMA3_70B = entry("llama-3-8b").arch, entry("llama-3-70b").arch
GPT3, DEEPSEEK = entry("gpt3-175b").arch, entry("deepseek-v3").arch
H100, EIGHT_H100 = parse_cluster("h100-sxm"), parse_cluster("8xh100-sxm")


def plan(arch: Arch = LLAMA3_8B, on: str = "h100-sxm", **more: Any) -> ServePlan:
    asked: dict[str, Any] = {"input_tokens": 1024, "output_tokens": 256} | more
    return plan_serve(arch, parse_cluster(on), **asked)


# --- stored formats ----------------------------------------------------------------------------

#: Of Llama-3-8B, by hand: q and out, k and v, three of the feed-forward.
MATRICES = 32 * (2 * 4096 * 4096 + 2 * 4096 * 1024 + 3 * 4096 * 14336)
HEAD = 128_256 * 4096


@pytest.mark.parametrize(
    ("precision", "bits"),
    [("bf16", 16), ("int8", 8), ("int4", 4.125), ("int4-zero", 4.25), ("nf4", 4.5)],
)
def test_a_step_reads_the_weights_with_their_scales_and_the_head_in_16_bits(
    precision: str, bits: float
) -> None:
    step = plan(
        input_tokens=1, output_tokens=1, batch=1, precision=precision, efficiency_bandwidth=1,
        seconds_layer=1e-12,
    ).seconds_per_token  # fmt: skip
    assert float(step.value) == pytest.approx((MATRICES * bits / 8 + 2 * HEAD) / 3.35e12, rel=0.005)


def test_what_a_step_reads_of_a_layer_is_what_memory_holds_of_it() -> None:
    whole = plan(input_tokens=1, output_tokens=1, batch=1, precision="int4", efficiency_bandwidth=1)
    read = whole.seconds_per_token.find("layer/feed_forward/up")
    held = whole.memory.find("bytes_weights/layer/feed_forward/up")
    activations = 2 * (4096 + 14336)
    assert float(read.value) * 3.35e12 == pytest.approx(float(held.value) + activations)


def test_pages_round_each_cache_up() -> None:
    cache = [
        plan(input_tokens=15, output_tokens=2, batch=3, page=page).memory.find("bytes_kv_cache")
        for page in (None, 16)
    ]
    assert cache[1].value * 17 == cache[0].value * 32


# --- the lecture's figures ---------------------------------------------------------------------


def test_batch_23_of_gpt3_fills_90_percent_of_eight_times_80_gb() -> None:
    one = plan(GPT3, "16xa100-sxm-80gb", input_tokens=2047, output_tokens=1, batch=1, tp=8,
               precision="fp16").memory  # fmt: skip
    weights, cache = (float(one.find(f"bytes_{of}").value) for of in ("weights", "kv_cache"))
    assert (0.9 * 8 * 80e9 - weights) // cache == 23


@pytest.mark.parametrize(("batch", "tokens", "share"), [(4, 7650, 0.80), (7, 7500, 0.70)])
def test_llama3_8b_weighs_80_to_70_percent_at_30600_to_52500_cached_tokens(
    batch: int, tokens: int, share: float
) -> None:
    tree = plan(input_tokens=tokens - 1, output_tokens=1, batch=batch).memory
    weights, cache = (float(tree.find(f"bytes_{of}").value) for of in ("weights", "kv_cache"))
    assert weights / (weights + cache) == pytest.approx(share, abs=0.002)


@pytest.mark.parametrize(
    ("batch", "context", "gain"), [(1, 2048, 1.03), (8, 4096, 1.50), (64, 4096, 3.65)]
)
def test_gqa_gains_by_bytes_what_batch_and_context_let_it(
    batch: int, context: int, gain: float
) -> None:
    asked = plan(LLAMA3_70B, "8xh100-sxm", input_tokens=context - 1, output_tokens=1, batch=batch)
    rows = {row.name: row for row in attentions(asked)}
    assert rows["GQA-8"].gain == pytest.approx(gain, rel=0.01)
    assert rows["MHA"].gain == 1
    assert rows["MHA"].bytes_kv_per_token == 8 * rows["GQA-8"].bytes_kv_per_token


def test_one_head_gains_over_eight_groups_only_where_it_is_not_copied() -> None:
    """Eight accelerators of 8 groups hold a head each; of one head they hold that one each."""

    def gains(on: str) -> dict[str, float]:
        asked = plan(LLAMA3_70B, on, input_tokens=4095, output_tokens=1, batch=16)
        return {row.name: row.gain for row in attentions(asked)}

    apart, whole = gains("8xh100-sxm"), gains("2xmi300x")
    assert apart["MQA"] == pytest.approx(apart["GQA-8"])
    assert whole["MQA"] > 1.05 * whole["GQA-8"]


# --- places ------------------------------------------------------------------------------------


def test_a_latent_cache_is_whole_on_every_tensor_parallel_accelerator() -> None:
    served = plan(DEEPSEEK, "16xh100-sxm", batch=8, precision="fp8", tp=16)
    held = served.bytes_per_accelerator.find("bytes_kv_cache").value
    assert held == served.memory.find("bytes_kv_cache").value == 8 * 70_272 * 1280


@pytest.mark.parametrize("ways", [1, 2, 8])
def test_one_key_value_head_is_read_whole_by_every_accelerator(ways: int) -> None:
    mqa = llama("mqa", d_model=256, n_layers=2, n_heads=8, n_kv_heads=1, d_ff=512, vocab_size=128,
                max_seq_len=8192)  # fmt: skip
    core = plan(mqa, "8xh100-sxm", input_tokens=8000, output_tokens=1, batch=4, tp=ways,
                efficiency_bandwidth=1).seconds_per_token.find("layer/attention/core")  # fmt: skip
    cache = 4 * 8001 * 2 * 32 * 2
    assert float(core.value) == pytest.approx(cache / 3.35e12, rel=0.01)


def test_a_model_of_61_layers_spans_nodes_by_uneven_stages_and_says_so() -> None:
    served = plan(DEEPSEEK, "16xh100-sxm", precision="fp8")
    assert (served.tp, served.pp) == (8, 2)
    assert any("pp=2" in note for note in served.notes)


def test_tensor_parallelism_across_nodes_says_so() -> None:
    served = plan(DEEPSEEK, "16xh100-sxm", precision="fp8", tp=16)
    assert (served.tp, served.pp) == (16, 1)
    assert any("spans nodes" in note for note in served.notes)
    assert not any("spans nodes" in note for note in plan().notes)


@pytest.mark.parametrize(
    ("model", "on", "more", "said"),
    [
        ("llama-3.1-405b", "8xh100-sxm", {}, "fp8 here, or 16xh100-sxm with tp=8 pp=2"),
        ("deepseek-v3", "8xh100-sxm", {}, "int4 here, or 32xh100-sxm with tp=8 pp=3"),
        ("llama-3-70b", "8xv100-sxm-16gb", {"precision": "fp16"},
         "int8 here, or 16xv100-sxm-16gb with tp=8 pp=2"),
        ("llama-3-8b", "h100-sxm", {"batch": 10_000}, "batch 400 here"),
    ],
)  # fmt: skip
def test_a_refusal_says_what_would_fit_and_that_fits(
    model: str, on: str, more: dict[str, Any], said: str
) -> None:
    with pytest.raises(Infeasible, match=said.replace(".", r"\.")):
        plan(entry(model).arch, on, **more)


def test_what_a_refusal_proposes_can_be_planned() -> None:
    assert plan(entry("llama-3.1-405b").arch, precision="fp8", on="8xh100-sxm", batch=1).tp == 8
    larger = plan(entry("llama-3.1-405b").arch, "16xh100-sxm", batch=1)
    assert (larger.tp, larger.pp) == (8, 2)
    assert plan(batch=400).batch == 400


def test_no_step_is_shorter_than_engines_take() -> None:
    small = plan(entry("qwen2.5-0.5b").arch, batch=1, input_tokens=1, output_tokens=1)
    assert any("waits for launches" in note for note in small.notes)
    # SGLang 0.5.9 takes 10.3 ms with 4 requests (ai-dynamo/aiconfigurator, silicon_sample.csv).
    large = plan(entry("deepseek-v3").arch, "8xh200-sxm", batch=4, precision="fp8")
    assert large.seconds_per_token.interval is not None
    assert 10.3e-3 in large.seconds_per_token.interval


# --- limits ------------------------------------------------------------------------------------


@settings(deadline=None, max_examples=15)
@given(st.floats(0.008, 0.06))
def test_a_limit_chooses_the_largest_batch_that_keeps_to_it(tpot: float) -> None:
    chosen = plan(tpot=tpot)
    assert not chosen.missed
    assert float(chosen.seconds_per_token.value) <= tpot
    if chosen.batch < chosen.batch_max:
        more = plan(batch=chosen.batch + 1)
        assert float(more.seconds_per_token.value) > tpot


def test_a_limit_that_no_batch_keeps_to_is_missed_by_a_stated_amount() -> None:
    missed = plan(tpot=0.004, ttft=0.01)
    assert missed.batch == 1
    first, each = missed.missed
    seconds = float(missed.seconds_per_token.value)
    assert first.startswith("time to the first token at batch 1")
    assert f"({seconds / 0.004:.3g} times it)" in each


# --- tables ------------------------------------------------------------------------------------


def test_batches_double_up_to_what_fits_and_cost_less_and_less() -> None:
    rows = batches(plan(batch=5))
    assert [r.batch for r in rows] == [1, 2, 4, 5, 8, 16, 32, 64, 128, 256, 400]
    cost = [float(r.dollars_per_million_tokens.value) for r in rows]
    assert cost == sorted(cost, reverse=True)
    wait = [float(r.decode.value) for r in rows]
    assert wait == sorted(wait)
    share = [float(r.memory.find("bytes_weights").value / r.memory.value) for r in rows]
    assert share == sorted(share, reverse=True)
    best = knee(rows)
    top = max(float(r.tokens_per_second.value) for r in rows)
    assert float(best.tokens_per_second.value) >= 0.95 * top


def test_formats_stand_side_by_side_with_the_plans_own_among_them() -> None:
    served = plan(LLAMA3_70B, "4xa100-sxm-80gb", precision="nf4", batch=4)
    rows = {row.name: row for row in quantizations(served)}
    assert list(rows) == ["bf16", "int8", "nf4", "int4"]  # an A100 does not multiply fp8
    assert [row.accelerators_min for row in rows.values()] == [2, 1, 1, 1]
    assert rows["nf4"].own
    assert rows["nf4"].server is served.server
    times = [float(row.server.decode.value) for row in rows.values() if row.server]
    assert times == sorted(times, reverse=True)


def test_a_format_that_does_not_fit_has_a_row_without_a_server() -> None:
    rows = {row.name: row for row in quantizations(plan(LLAMA3_70B, precision="int4"))}
    assert rows["bf16"].server is None
    assert rows["bf16"].accelerators_min == 2
    assert rows["int8"].server is not None


def test_attention_kinds_keep_the_rest_of_the_model() -> None:
    rows = {row.name: row for row in attentions(plan(LLAMA3_70B, "8xh100-sxm", batch=16))}
    assert list(rows) == ["MHA", "GQA-8", "MQA", "MLA"]
    assert rows["GQA-8"].own
    assert rows["GQA-8"].asked.arch is LLAMA3_70B
    assert rows["MLA"].bytes_kv_per_token == 80 * (512 + 64) * 2
    assert rows["MQA"].bytes_kv_per_token == 80 * 2 * 128 * 2
    for row in rows.values():
        own = LLAMA3_70B.layers[0]
        layer = row.asked.arch.layers[0]
        assert replace(layer, attention=own.attention) == own


def test_a_model_of_another_kind_comes_first_under_its_own_name() -> None:
    qwen = entry("qwen2.5-7b").arch
    assert kind_of(qwen) == "GQA-4"
    assert [row.name for row in attentions(plan(qwen, batch=1))] == ["GQA-4", "MHA", "MQA", "MLA"]
    latent = list(attentions(plan(DEEPSEEK, "16xh100-sxm", precision="fp8", batch=1)))
    assert [row.name for row in latent if row.own] == ["MLA"]


def test_the_tables_are_plain_data() -> None:
    tables = tables_json(plan(batch=2))
    assert set(tables) == {"batch", "quantization", "attention"}
    assert tables["batch"][1]["batch"] == 2
    assert tables["attention"][0]["gain_by_bytes"] == 1


# --- the command -------------------------------------------------------------------------------


def served(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "isoflop", "plan", "serve", "llama-3-8b", "--on", "h100-sxm"]
    return subprocess.run([*command, *arguments], capture_output=True, text=True, check=False)


def test_a_missed_limit_exits_3_with_the_plan_and_by_how_much() -> None:
    done = served("--tpot", "4ms", "--json")
    assert done.returncode == 3
    assert json.loads(done.stdout)["missed"]
    assert "exceeds the limit of 4 ms by" in done.stderr


def test_a_limit_that_is_met_says_how_safely() -> None:
    done = served("--tpot", "9ms", "--table", "none")
    assert done.returncode == 0
    assert "the slow ends of their ranges do not keep to them" in done.stderr
    assert "and at the slow ends" in served("--tpot", "1s", "--table", "none").stderr


@pytest.mark.parametrize("name", ["batch", "quantization", "attention"])
def test_each_table_fits_a_line_of_120_characters_on_one_screen(name: str) -> None:
    lines = served("--table", name).stdout.splitlines()
    table = lines[8 : lines.index(next(x for x in lines if x.startswith("fewest")))]
    assert max(map(len, table)) <= 120
    assert len(lines) <= 48


# --- the validation page -----------------------------------------------------------------------

ROOT = Path(__file__).parent.parent
SHARED = Path(os.environ.get("ISOFLOP_SHARED", ROOT.parent / "shared" / "data"))


def test_the_serving_page_is_what_the_script_writes() -> None:
    path = SHARED / "published" / "serving.csv"
    if not path.exists():
        pytest.skip("the shared table of published serving is not here")
    script = runpy.run_path(str(ROOT / "benchmarks" / "serving_published.py"))
    with path.open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    written = (ROOT / "docs" / "serving-validation.md").read_text(encoding="utf-8")
    assert script["page"](rows) == written
