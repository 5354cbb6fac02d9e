"""Plans as files: for trainers, held side by side, and asked again with other answers."""

from __future__ import annotations

import json
import math
import re
import shlex
import tomllib
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from isoflop.arch import Arch, gpt
from isoflop.arch.spec import Full, Window
from isoflop.arch.zoo import entry
from isoflop.cli.app import run
from isoflop.cli.outputs import validate
from isoflop.count.stages import layers_of_stage
from isoflop.errors import InputError, UnknownName
from isoflop.hardware import parse_cluster
from isoflop.plan import Layout, TrainPlan, plan_train
from isoflop.plan.diff import diff, leaves
from isoflop.plan.emit import KINDS, emitted
from isoflop.plan.emit.megatron_model import padding
from isoflop.plan.schedule import ScheduleName, n_stages
from isoflop.plan.training.learning_rate import of_compute, of_size_and_tokens, suggested
from isoflop.plan.training.plan import what_if
from isoflop.plan.training.work import Work
from isoflop.train.recipe import parse_recipe

SMALL = gpt("small", d_model=512, n_layers=12, n_heads=8, vocab_size=5000, max_seq_len=2048)


def planned(
    layout: Layout, *, arch: Arch = SMALL, on: str = "64xh100-sxm", **more: Any
) -> TrainPlan:
    more = {"global_batch": 64, "seq_len": 1024, **more}
    return plan_train(arch, 10**9, parse_cluster(on), layout=layout, **more)


def flags(text: str) -> dict[str, str | None]:
    """The arguments of a command line by name."""
    words = shlex.split(text.replace("\\\n", ""), comments=True)
    found: dict[str, str | None] = {}
    for i, word in enumerate(words):
        if word.startswith("--"):
            value = words[i + 1] if i + 1 < len(words) else "--"
            found[word] = None if value.startswith("--") else value
    return found


# --- Megatron-LM ------------------------------------------------------------------------------


def test_megatron_arguments_say_the_layout() -> None:
    layout = Layout(tp=4, pp=2, dp=4, cp=2, zero=1, micro_batch=2, virtual=3)
    said = flags(emitted("megatron", planned(layout, recompute="full")))
    assert said["--tensor-model-parallel-size"] == "4"
    assert said["--pipeline-model-parallel-size"] == "2"
    assert said["--context-parallel-size"] == "2"
    assert said["--num-virtual-stages-per-pipeline-rank"] == "3"
    assert said["--micro-batch-size"] == "2"
    assert said["--global-batch-size"] == "64"
    assert said["--seq-length"] == "1024"
    assert said["--train-iters"] == str(math.ceil(10**9 / (64 * 1024)))
    assert said["--recompute-granularity"] == "full"
    assert {"--sequence-parallel", "--use-distributed-optimizer", "--bf16"} <= said.keys()
    assert "--expert-model-parallel-size" not in said


def test_megatron_leaves_out_what_the_layout_does_not_do() -> None:
    said = flags(emitted("megatron", planned(Layout(dp=8), precision="fp32")))
    for name in ("--sequence-parallel", "--use-distributed-optimizer", "--bf16",
                 "--recompute-granularity", "--num-virtual-stages-per-pipeline-rank"):  # fmt: skip
        assert name not in said


def test_megatron_arguments_say_the_model() -> None:
    arch = entry("qwen3-30b-a3b").arch
    said = flags(emitted("megatron", planned(Layout(dp=8, zero=1), arch=arch, on="8xb300-sxm")))
    wanted = {
        "--num-layers": "48", "--hidden-size": "2048", "--num-attention-heads": "32",
        "--num-query-groups": "4", "--kv-channels": "128", "--qk-layernorm": None,
        "--rotary-base": "1000000", "--normalization": "RMSNorm", "--norm-epsilon": "1e-06",
        "--swiglu": None, "--disable-bias-linear": None, "--num-experts": "128",
        "--moe-ffn-hidden-size": "768", "--moe-router-topk": "8", "--vocab-size": "151936",
        "--untie-embeddings-and-output-weights": None, "--attention-dropout": "0.0",
    }  # fmt: skip
    assert {name: said[name] for name in wanted} == wanted
    assert "--moe-router-pre-softmax" not in said


def test_megatron_says_which_layers_have_experts_windows_or_turns() -> None:
    lite = planned(Layout(dp=8, zero=3), arch=entry("deepseek-v2-lite").arch)
    assert flags(emitted("megatron", lite))["--moe-layer-freq"] == "[0]*1+[1]*26"
    smol = planned(Layout(dp=8, zero=3), arch=entry("smollm3-3b").arch)
    assert flags(emitted("megatron", smol))["--no-rope-freq"] == "([0]*3+[1]*1)*9"
    layers = tuple(
        replace(layer, name=f"kind{i % 2}", attention=replace(layer.attention, span=span))
        for i, layer in enumerate(entry("mistral-7b-v0.3").arch.layers)
        if isinstance(span := Window(4096) if i % 2 else Full(), Full | Window)
    )
    mixed = replace(entry("mistral-7b-v0.3").arch, layers=layers)
    said = flags(emitted("megatron", planned(Layout(dp=8, zero=3), arch=mixed)))
    assert (said["--window-size"], said["--window-attn-skip-freq"]) == (
        "4095,0",
        "([0]*1+[1]*1)*16",
    )


@pytest.mark.parametrize(
    ("name", "fields"),
    [
        ("gemma-2-9b", ("embedding.scale", "head.softcap", "local.wiring", "activation")),
        ("bloom-7b1", ("embedding.norm", "layer.attention.position=alibi")),
        ("starcoder2-3b", ("position.theta=999999.4",)),
        ("deepseek-v2", ("moe.feed_forward.n_active=6",)),
        ("gpt2", ("embedding.n_rows=50257: .* n_rows=50432",)),
    ],
)
def test_megatron_refuses_by_field_what_it_has_no_word_for(
    name: str, fields: tuple[str, ...]
) -> None:
    layout = Layout(tp=2, dp=16, zero=3)
    with pytest.raises(InputError) as refused:
        emitted("megatron", planned(layout, arch=entry(name).arch, on="32xb300-sxm"))
    for field in fields:
        assert re.search(field, str(refused.value))


@given(st.integers(1, 10**6), st.integers(0, 2000), st.sampled_from([1, 2, 4, 8]))
def test_megatron_pads_the_vocabulary_to_the_specs_rows(vocab: int, more: int, tp: int) -> None:
    rows = -(-(vocab + more) // tp) * tp
    multiple = padding(vocab, rows, tp) * tp
    assert -(-vocab // multiple) * multiple == rows


def test_megatron_deals_experts_within_tensor_ranks() -> None:
    mixture = entry("deepseek-v2-lite").arch
    said = flags(emitted("megatron", planned(Layout(tp=2, dp=8, ep=8, zero=1), arch=mixture)))
    assert said["--expert-model-parallel-size"] == "8"
    assert said["--expert-tensor-parallel-size"] == "2"


@pytest.mark.parametrize(("pp", "virtual"), [(5, 1), (2, 4), (7, 1)])
def test_megatron_cuts_uneven_pipelines_where_the_plan_does(pp: int, virtual: int) -> None:
    plan = planned(Layout(pp=pp, dp=4, virtual=virtual), global_batch=64 * pp)
    said = flags(emitted("megatron", plan))
    text = said["--pipeline-model-parallel-layout"]
    assert text is not None
    stages = unfolded(text).split("|")
    own = [len(layers_of_stage(12, pp * virtual, chunk)) for chunk in range(pp * virtual)]
    assert [stage.count("t") for stage in stages] == own
    assert stages[0].startswith("E")
    assert stages[-1].endswith("L")
    assert "--num-virtual-stages-per-pipeline-rank" not in said


def unfolded(text: str) -> str:
    """(tt|)*3 written out, as Megatron reads it."""
    while "(" in text:
        before, rest = text.split("(", 1)
        body, rest = rest.split(")*", 1)
        digits = "".join(c for i, c in enumerate(rest) if rest[: i + 1].isdigit())
        text = before + body * int(digits) + rest[len(digits) :]
    return text


def test_selective_recomputation_is_megatrons_only_where_scores_are_kept() -> None:
    layout = Layout(tp=2, dp=8)
    with pytest.raises(InputError, match="recompute=selective"):
        emitted("megatron", planned(layout, recompute="selective"))
    unfused = planned(layout, recompute="selective", stack="megatron-2022")
    assert flags(emitted("megatron", unfused))["--recompute-modules"] == "core_attn"


# --- torchrun, torchtitan, recipe ---------------------------------------------------------------


def test_torchrun_starts_a_process_for_each_accelerator() -> None:
    text = emitted("torchrun", planned(Layout(tp=8, dp=8)))
    said = flags(text)
    assert int(said["--nnodes"] or 0) * int(said["--nproc-per-node"] or 0) == 64
    assert said["--tensor-model-parallel-size"] == "8"
    with pytest.raises(InputError, match="accelerators=12"):
        emitted("torchrun", planned(Layout(pp=3, dp=4)))
    assert text.splitlines()[1].startswith("CUDA_DEVICE_MAX_CONNECTIONS=1 torchrun")
    assert said["--num-layers"] == "12"
    assert flags(emitted("torchrun", planned(Layout(dp=4))))["--nproc-per-node"] == "4"


LLAMA = entry("llama-3.1-8b").arch


@pytest.mark.parametrize(
    "layout",
    [
        Layout(dp=16, micro_batch=2),
        Layout(tp=2, dp=8, cp=2, zero=3, cp_by="gather"),
        Layout(tp=2, pp=4, dp=4, zero=2, micro_batch=2, virtual=2),
        Layout(pp=3, dp=8, zero=3),
        Layout(tp=2, dp=8, zero=2, sequence_parallel=False),
        Layout(pp=2, dp=8, zero=3, schedule="dualpipev"),
        Layout(pp=2, dp=8, schedule="gpipe"),
    ],
)
def test_torchtitan_splits_as_the_layout_does(layout: Layout) -> None:
    plan = planned(layout, arch=LLAMA, on="64xb300-sxm")
    text = emitted("torchtitan", plan)
    job = flags(text)
    assert job["--module"] == "llama3"
    assert job["--config"] == "llama3_8b"
    assert text.endswith("activation-checkpoint:none\n")
    ways = {
        name.removeprefix("--parallelism."): v for name, v in job.items() if "parallelism" in name
    }
    sizes = {name: int(v) for name, v in ways.items() if v is not None and v.isdigit()}
    copies = sizes["data_parallel_replicate_degree"] * sizes["data_parallel_shard_degree"]
    assert copies == layout.dp
    ranks = copies * sizes["tensor_parallel_degree"] * sizes["context_parallel_degree"]
    assert ranks * sizes["pipeline_parallel_degree"] == layout.n_accelerators
    assert (job["--training.seq_len"], job["--training.global_batch_size"]) == ("1024", "64")
    per_rank = int(job["--training.local_batch_size"] or 0) * layout.dp
    assert 64 % per_rank == 0
    if layout.pp > 1:
        assert per_rank == 64
        assert sizes["pipeline_parallel_microbatch_size"] == layout.micro_batch
        chunks = n_stages(layout.pipeline, layout.pp)
        least = [sizes[f"pipeline_parallel_{end}_stage_less_layers"] for end in ("first", "last")]
        assert sizes["pipeline_parallel_layers_per_stage"] * chunks - sum(least) == 32
    assert (sizes["data_parallel_shard_degree"] > 1) == (layout.zero > 0)
    assert (ways["fsdp_reshard_after_forward"] == "always") == (layout.zero == 3)
    assert ("no_enable_sequence_parallel" in ways) != layout.sequence_parallel
    assert ("--training.disable_cuda_graphs" in job) == (layout.pp > 1)


@pytest.mark.parametrize(
    ("layout", "more", "field"),
    [
        (Layout(dp=8, zero=1), {}, "zero=1"),
        (Layout(dp=8), {"recompute": "selective"}, "recompute=selective"),
        (Layout(dp=4, cp=2), {}, "zero=0"),
        (Layout(pp=6, dp=8), {"global_batch": 96}, "pp=6"),
        (Layout(dp=8), {"precision": "fp16"}, "precision=fp16"),
        (Layout(dp=8), {"precision": "fp8"}, "precision=fp8: .* llama3_8b computes in: fp32 or bf16"),
        (Layout(dp=8), {"arch": SMALL}, "model=small: .* llama-3.1-8b"),
        (Layout(dp=8, cp=2, zero=3, cp_by="gather"), {"arch": entry("gpt-oss-20b").arch}, "cp=2: .* varlen"),
        (Layout(dp=8, cp=2, zero=3), {}, "cp_by=ring"),
        (Layout(dp=256, zero=3), {"arch": entry("deepseek-v3").arch, "seq_len": 32768, "recompute": "full",
                                  "on": "256xb300-sxm", "global_batch": 256},
         "seq_len=32768: .* at most 16384"),
        (Layout(dp=64, zero=3), {"arch": entry("llama-3.1-405b").arch},
         "precision=bf16: .* llama3_405b computes in: fp8"),
    ],
)  # fmt: skip
def test_torchtitan_refuses_by_name_what_it_cannot_say(
    layout: Layout, more: dict[str, Any], field: str
) -> None:
    plan = planned(layout, **{"arch": LLAMA, "on": "64xb300-sxm", **more})
    with pytest.raises(InputError, match=field):
        emitted("torchtitan", plan)


def test_what_a_configuration_does_otherwise_is_said() -> None:
    layout = Layout(dp=8, zero=3)
    differs = "# llama3_8b is not quite the spec: rotary positions"
    older = planned(layout, arch=entry("llama-3-8b").arch, on="8xb300-sxm")
    assert differs in emitted("torchtitan", older)
    assert differs not in emitted("torchtitan", planned(layout, arch=LLAMA, on="8xb300-sxm"))


# --- learning rates -----------------------------------------------------------------------------


@pytest.mark.parametrize("kind", list(KINDS))
def test_a_learning_rate_is_written_when_it_is_given_and_suggested_when_not(kind: str) -> None:
    arch = entry("qwen3-0.6b").arch
    plan = planned(Layout(), arch=arch, on="b300-sxm", global_batch=1)
    silent = emitted(kind, plan)
    assert silent.count("# learning rate") == 1
    assert "2401.02954" in silent
    assert "2503.04715" in silent
    said = emitted(kind, plan, learning_rate=1.25e-4)
    assert "#" not in said
    assert "0.000125" in said
    with pytest.raises(InputError, match="learning_rate=0"):
        emitted(kind, plan, learning_rate=0.0)


def test_no_law_speaks_of_experts() -> None:
    plan = planned(Layout(dp=8, zero=3), arch=entry("qwen3-30b-a3b").arch, on="8xb300-sxm")
    assert "published laws are of dense decoders" in emitted("megatron", plan)


@pytest.mark.parametrize(("shape", "published"), [((30, 4096), 4.2e-4), ((95, 8192), 3.2e-4)])
def test_the_law_of_compute_gives_the_learning_rates_of_its_source(
    shape: tuple[int, int], published: float
) -> None:
    """DeepSeek LLM 7B and 67B on 2 T tokens of 4,096 (2401.02954, table 2)."""
    layers, width = shape
    flops = (72 * layers * width**2 + 12 * layers * width * 4096) * 2e12
    assert of_compute(flops) == pytest.approx(published, rel=0.03)


def test_the_law_of_size_and_tokens_gives_what_its_source_does() -> None:
    """Step Law (2503.04715): 1 B parameters and 100 B tokens, by the authors' own program."""
    assert of_size_and_tokens(1e9, 1e11) == pytest.approx(1.632e-3, rel=0.001)


def test_the_compute_of_a_law_leaves_the_vocabulary_out() -> None:
    narrow, wide = (replace(SMALL, vocab_size=v, embedding=replace(SMALL.embedding, n_rows=v))
                    for v in (5000, 50000))  # fmt: skip
    rates = [[s.learning_rate for s in suggested(Work(a, 10**9, 1024))] for a in (narrow, wide)]
    assert rates[0] == rates[1]
    n, d, tokens = 12, 512, 10**9
    per_token = 72 * n * d**2 + 12 * n * d * 1024
    assert rates[0][0] == pytest.approx(of_compute(per_token * tokens), rel=1e-9)


# --- recipe -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("layout", "name"),
    [
        (Layout(pp=2, dp=8), "1F1B"),
        (Layout(pp=2, dp=8, virtual=4), "Interleaved1F1B"),
        (Layout(pp=2, dp=8, schedule="gpipe"), "GPipe"),
        (Layout(pp=2, dp=8, schedule="dualpipev"), "DualPipeV"),
    ],
)
def test_torchtitan_names_the_schedule_as_pytorch_does(layout: Layout, name: str) -> None:
    from torch.distributed.pipelining.schedules import get_schedule_class

    said = flags(emitted("torchtitan", planned(layout, arch=LLAMA, on="64xb300-sxm")))
    assert said["--parallelism.pipeline_parallel_schedule"] == name
    assert get_schedule_class(name).__name__ == f"Schedule{name}"


@pytest.mark.parametrize("schedule", ["gpipe", "zb-h1", "zb-h2", "dualpipe", "dualpipev"])
def test_trainers_refuse_schedules_that_they_do_not_have(schedule: ScheduleName) -> None:
    plan = planned(Layout(pp=4, dp=8, schedule=schedule))
    with pytest.raises(InputError, match=f"schedule={schedule}: must be 1f1b"):
        emitted("megatron", plan)
    if schedule not in ("gpipe", "dualpipev"):
        with pytest.raises(InputError, match=f"schedule={schedule}: must be"):
            emitted("torchtitan", plan)


def test_a_recipe_is_whole_but_for_the_learning_rate() -> None:
    arch = entry("gpt2").arch
    plan = planned(Layout(micro_batch=4), arch=arch, on="h100-sxm", global_batch=4)
    table = tomllib.loads(emitted("recipe", plan))
    recipe = parse_recipe({**table, "learning_rate": 1e-3})
    assert recipe.model == "gpt2"
    assert recipe.tokens_per_step == 4 * 1024
    assert recipe.steps == math.ceil(10**9 / (4 * 1024))
    with pytest.raises(InputError, match=r"model=small[^$]*accelerators=8"):
        emitted("recipe", planned(Layout(dp=8)))


def test_an_unknown_trainer_is_an_error_with_the_known_ones() -> None:
    with pytest.raises(UnknownName, match="megatron"):
        emitted("megatrn", planned(Layout(dp=8)))
    assert set(KINDS) == {"recipe", "torchrun", "megatron", "torchtitan"}


# --- two plans, and what if ---------------------------------------------------------------------


def as_json(plan: TrainPlan) -> Any:
    return json.loads(
        json.dumps({"schema": "isoflop/1", "command": "plan train", **plan.to_json()})
    )


def test_a_plan_against_itself_has_no_difference() -> None:
    plan = as_json(planned(Layout(tp=2, dp=8)))
    found = diff(plan, plan)
    assert (found.inputs, found.assumptions, found.numbers) == ((), (), ())


def test_a_diff_names_inputs_and_the_parts_that_moved() -> None:
    a = as_json(planned(Layout(tp=2, dp=8), stack="nemo-24"))
    b = as_json(planned(Layout(tp=2, dp=8, zero=3), stack="nemo-24", price=9.0))
    found = diff(a, b)
    assert ("layout.zero", 0, 3) in [(m.name, m.a, m.b) for m in found.inputs]
    numbers = {n.name: n for n in found.numbers}
    assert numbers["bytes_per_accelerator"].b < numbers["bytes_per_accelerator"].a
    assert numbers["bytes_per_accelerator"].parts[0].name.startswith("bytes_")
    assert numbers["seconds_step"].parts[0].name == "data"
    assert numbers["dollars"].change is not None
    assert "flops" not in numbers


def test_the_leaves_of_a_diff_carry_all_their_copies() -> None:
    plan = planned(Layout(tp=2, dp=8), stack="nemo-24")
    nothing = as_json(plan)
    nothing["breakdown"]["seconds_step"] = {"name": "seconds_step", "unit": "seconds", "value": 0,
                                            "children": []}  # fmt: skip
    moved = next(n for n in diff(nothing, as_json(plan)).numbers if n.name == "seconds_step")
    parts = dict(leaves(as_json(plan)["breakdown"]["seconds_step"]))
    assert sum(parts.values()) == pytest.approx(moved.b, rel=1e-9)


@pytest.mark.parametrize("broken", [[], {}, {"schema": "isoflop/1", "command": "count"}, 3])
def test_what_is_no_plan_is_refused(broken: Any) -> None:
    with pytest.raises(InputError, match="JSON of isoflop plan"):
        diff(broken, as_json(planned(Layout(dp=8))))


def test_what_if_plans_the_same_run_again() -> None:
    plan = planned(Layout(tp=2, dp=8), stack="nemo-24")
    same = what_if(plan)
    assert same.days.value == plan.days.value
    full = what_if(plan, recompute="full")
    assert full.layout == plan.layout
    assert full.days.value > plan.days.value
    twice = what_if(plan, tokens=2 * 10**9, price=1.0)
    assert twice.days.value == pytest.approx(float(2 * plan.days.value))
    with pytest.raises(InputError, match="tokns=1"):
        what_if(plan, tokns=1)


# --- the command line ---------------------------------------------------------------------------

ASK = ["plan", "train", "gpt2", "--tokens", "1e9", "--on", "2xh100-sxm", "--seq-len", "1024",
       "--global-batch", "8"]  # fmt: skip


def said(capsys: pytest.CaptureFixture[str], *arguments: str, code: int = 0) -> str:
    with pytest.raises(SystemExit) as ended:
        run(list(arguments))
    out = capsys.readouterr()
    assert ended.value.code == code, out.err
    return out.out if code == 0 else out.err


def test_a_search_prints_one_screen_and_json_of_its_schema(
    capsys: pytest.CaptureFixture[str],
) -> None:
    text = said(capsys, *ASK, "--search", "--stack", "nemo-24", "--micro-batch", "2")
    for word in ("least time: ", "runner-up ", "binding: ", "searched ", "MFU", "assumption"):
        assert word in text
    data = said(capsys, *ASK, "--search", "--recompute", "none", "--dp", "2", "--json")
    validate("plan train", data)
    search = json.loads(data)["search"]
    assert search["fit"] > 0
    assert search["fit"] + search["refused"] == search["evaluated"]
    assert search["best"]["layout"]["dp"] == 2


def test_a_schedule_is_said_shown_searched_and_told_apart(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    chosen = ("--pp", "2", "--dp", "1", "--schedule")
    for name in ("1f1b", "zb-h1"):
        data = said(capsys, *ASK, *chosen, name, "--stack", "unknown", "--json")
        validate("plan train", data)
        (tmp_path / name).write_text(data)
    both = (str(tmp_path / "1f1b"), str(tmp_path / "zb-h1"))
    text = said(capsys, "plan", "diff", *both)
    assert "layout.schedule  1f1b  " in text
    assert "->  zb-h1" in text
    assert "bubble" in text
    assert "schedule=zb-h1" in said(capsys, *ASK, *chosen, "zb-h1")
    assert "Did you mean" in said(capsys, *ASK, *chosen, "zb-h3", code=2)
    text = said(capsys, *ASK, "--search", "--pp", "2", "--schedule", "zb-h2", "--recompute", "none")
    assert "schedule=zb-h2 recompute=none" in text
    # A stack that is named runs what its software has; Megatron-Core has 1F1B alone.
    text = said(capsys, *ASK, "--search", "--pp", "2", "--stack", "nemo-24", "--recompute", "none")
    assert "schedule=" not in text


def test_limits_without_a_search_and_missed_limits_have_their_codes(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert "--max-days" in said(capsys, *ASK, "--max-days", "3", code=2)
    assert "by days" in said(capsys, *ASK, "--search", "--max-days", "1e-9", code=3)
    assert "mfu" in said(capsys, *ASK, "--search", "--mfu", "0.4", code=2)


def test_plan_diff_reads_what_plan_train_wrote(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    for name, dp in (("a", "1"), ("b", "2")):
        (tmp_path / name).write_text(said(capsys, *ASK, "--dp", dp, "--json"))
    a, b = str(tmp_path / "a"), str(tmp_path / "b")
    assert "layout.dp  1  ->  2" in said(capsys, "plan", "diff", a, b)
    validate("plan diff", said(capsys, "plan", "diff", a, b, "--json"))
    assert "same" in said(capsys, "plan", "diff", a, a)
    (tmp_path / "c").write_text("[")
    assert "not JSON" in said(capsys, "plan", "diff", a, str(tmp_path / "c"), code=2)


def test_emit_writes_a_new_file_only(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    path = tmp_path / "arguments"
    said(capsys, *ASK, "--dp", "2", "--emit", "megatron", "-o", str(path))
    assert flags(path.read_text())["--seq-length"] == "1024"
    assert "new file" in said(
        capsys, *ASK, "--dp", "2", "--emit", "megatron", "-o", str(path), code=2
    )
    assert "--emit" in said(capsys, *ASK, "-o", str(path), code=2)
    assert "--learning-rate" in said(capsys, *ASK, "--learning-rate", "1e-3", code=2)


def test_an_emitted_recipe_with_a_learning_rate_trains(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    arguments = ["plan", "train", "pythia-14m", "--tokens", "64", "--on", "h100-sxm", "--seq-len",
                 "16", "--global-batch", "2", "--micro-batch", "2", "--precision", "fp32"]  # fmt: skip
    path = tmp_path / "recipe.toml"
    said(capsys, *arguments, "--emit", "recipe", "--learning-rate", "1e-3", "-o", str(path))
    path.write_text(path.read_text() + "eval_bytes = 32\n")  # soon done
    said(capsys, "train", str(path), "-o", str(tmp_path / "run"))
    metrics = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    assert json.loads(metrics[-1])["step"] == 2
