"""The command line as a user meets it: real processes, exit codes, streams, published JSON."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from isoflop.cli.app import COMMANDS, PLANS, build
from isoflop.cli.outputs import OUTPUTS, schemas, validate

ROOT = Path(__file__).parent.parent


def isoflop(*arguments: str, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    """Run the command line in a process of its own."""
    return subprocess.run(
        [sys.executable, "-m", "isoflop", *arguments],
        capture_output=True, text=True, cwd=cwd, check=False, timeout=120,
        env={**os.environ, "COLUMNS": "100"},
    )  # fmt: skip


def answer(*arguments: str) -> dict[str, Any]:
    done = isoflop(*arguments, "--json")
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def refused(*arguments: str, code: int = 2) -> str:
    """The error text of a command that must fail without data and without a traceback."""
    done = isoflop(*arguments)
    assert done.returncode == code, (done.returncode, done.stderr)
    assert "Traceback" not in done.stderr
    return done.stderr


@pytest.fixture(scope="module")
def runs_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Runs of a planted law."""
    path = tmp_path_factory.mktemp("runs") / "runs.csv"
    rows = [
        f"{n},{6 * n * d},{1.8 + 400 / n**0.34 + 1500 / d**0.36}"
        for n in (10**7, 10**8, 10**9)
        for d in (10**9, 10**10, 10**11)
    ]
    path.write_text("N,C,L\n" + "\n".join(rows) + "\n")
    return path


def test_known_totals_come_out_of_the_command_line() -> None:
    assert answer("count", "gpt3-175b")["params"]["total"] == 174_604_259_328
    data = answer("count", "llama-3-8b", "--seq-len", "8192", "--batch", "4")
    assert data["params"]["total"] == 8_030_261_248
    assert data["memory"]["bytes_kv_cache"] == 4 * 8192 * 2 * 32 * 8 * 128 * 2
    assert data["memory"]["bytes_total"] == data["memory"]["tree"]["value"]


def test_a_config_json_counts_like_the_zoo(tmp_path: Path) -> None:
    config = {
        "model_type": "llama", "hidden_size": 4096, "num_hidden_layers": 32, "num_attention_heads": 32,
        "num_key_value_heads": 8, "intermediate_size": 14336, "vocab_size": 128256,
        "max_position_embeddings": 8192, "rope_theta": 500000.0, "tie_word_embeddings": False,
    }  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert answer("count", str(tmp_path))["params"]["total"] == 8_030_261_248
    gpt3 = {
        "model_type": "gpt2",
        "n_embd": 12288,
        "n_layer": 96,
        "n_head": 96,
        "n_positions": 2048,
        "vocab_size": 50257,
    }
    (tmp_path / "config.json").write_text(json.dumps(gpt3))
    assert answer("count", str(tmp_path / "config.json"))["params"]["total"] == 174_604_259_328


def commands(runs: Path) -> dict[str, list[str]]:
    return {
        "models": ["models"],
        "show": ["show", "llama-3.1-8b"],
        "count": ["count", "palm-540b"],
        "explain": ["explain", "gpt2", "layer/attention"],
        "compare": ["compare", "llama-3-8b", "mixtral-8x7b", "deepseek-v3"],
        "hardware": ["hardware"],
        "plan train": ["plan", "train", "llama-3-8b", "--tokens", "15T", "--on", "512xh100-sxm"],
        "plan serve": ["plan", "serve", "llama-3-70b", "--on", "8xh100-sxm", "--precision", "int8"],
        "plan budget": ["plan", "budget", "--flops", "1e21", "--on", "64xh100-sxm"],
        "laws": ["laws"],
        "fit": ["fit", str(runs), "--params", "N", "--flops", "C", "--loss", "L", "--at", "70B:1T"],
        "predict": ["predict", "besiroglu-2024", "--flops", "1e21"],
        "validate": ["validate"],
        "check": ["check", "gpt2"],
    }


@pytest.mark.parametrize("name", commands(Path()))
def test_json_is_what_the_schema_says(name: str, runs_file: Path) -> None:
    done = isoflop(*commands(runs_file)[name], "--json")
    assert done.returncode == 0, done.stderr
    validate(name, done.stdout)


def test_the_schema_guard_can_fail() -> None:
    with pytest.raises(ValidationError):
        validate(
            "models", '{"schema": "isoflop/1", "command": "models", "models": [{"name": "x"}]}'
        )


def test_the_published_schema_is_up_to_date() -> None:
    published = json.loads((ROOT / "docs" / "schema.json").read_text())
    assert published["commands"] == json.loads(json.dumps(schemas())), "run `make schema`"


def test_every_command_with_json_has_a_schema() -> None:
    said = {*COMMANDS, *(f"plan {name}" for name in PLANS)}
    assert set(OUTPUTS) | {"schema"} == said


@pytest.mark.parametrize(("place", "line"), [*COMMANDS.values(), *PLANS.values()])
def test_the_help_line_is_the_handlers_own(place: str, line: str) -> None:
    module, _, name = place.partition(":")
    doc = getattr(importlib.import_module(f"isoflop.cli.{module}"), name).__doc__
    assert doc is not None
    assert doc.startswith(line.rstrip(".")), (place, line)


def test_all_problems_are_listed_one_to_a_line() -> None:
    text = refused("plan", "train", "gpt2", "--tokens", "1B", "--on", "8xh100-sxm",
                   "--seq-len", "1024", "--mfu", "3", "--recompute", "some")  # fmt: skip
    lines = text.strip().splitlines()
    assert len(lines) == 2
    assert all(line.startswith("error: ") for line in lines)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["count", "llama-3-9b"], "did you mean llama-3-8b"),
        (["cuont", "gpt2"], "Did you mean"),
        (["count", "gpt2", "--seq-len", "x"], "--seq-len"),
        (["count", "gpt2", "--seq-len", "9" * 5000], "--seq-len"),
        (["count", "gpt2", "--seq-len", "4096"], "1024"),
        (["count", "gpt2", "--precision", "fp17"], "fp16"),
        (["count"], "MODEL"),
        (["explain", "gpt2", "layer/attentoin"], "did you mean layer/attention"),
        (["hardware", "h100-sxn"], "h100-sxm"),
        (["plan", "serve", "gpt2", "--on", "0xh100-sxm"], "h100"),
        (["predict", "chinchilla", "--flops", "1e21"], "law"),
        (["predict", "besiroglu-2024"], "--flops"),
        (["fit", "no-such.csv"], "no-such.csv"),
        (["count", "nowhere/config.json"], "file that exists"),
        (["count", "gpt-4"], "did you mean gpt-4-as-quoted or gpt-4-rumour"),
        (["plan", "serve", "gpt2", "--on", "h100"], "did you mean h100-sxm or h100-pcie or h100-nvl"),
        (["schema", "cuont"], "count"),
        (["compare", "gpt2"], "two models"),
    ],
)  # fmt: skip
def test_bad_input_exits_two_and_says_what_is_wrong(arguments: list[str], says: str) -> None:
    assert says in refused(*arguments)


def test_an_infeasible_plan_exits_three() -> None:
    text = refused(
        "plan", "train", "gpt3-175b", "--tokens", "300B", "--on", "8xa100-sxm-80gb", code=3
    )
    assert "fits" in text
    done = isoflop("plan", "serve", "llama-3-8b", "--on", "h100-sxm", "--tpot", "1us")
    assert done.returncode == 3
    assert "limit" in done.stderr


def test_an_unconfirmed_model_says_so_beside_every_number() -> None:
    done = isoflop("count", "gpt-4-rumour")
    assert "gpt-4-rumour: Unconfirmed." in done.stderr
    assert not isoflop("count", "gpt2").stderr


def test_every_option_of_every_command_is_explained() -> None:
    app = build()
    for name in (*COMMANDS, *(f"plan {plan}" for plan in PLANS)):
        _, (*_, command), _ = app.parse_commands(name.split())
        silent = [a.name for a in command.assemble_argument_collection(parse_docstring=True)
                  if a.parse and not (a.parameter.help or a.children)]  # fmt: skip
        assert not silent, f"{name}: {silent}"


def test_a_spec_is_shown_whole() -> None:
    """Both stacks of an encoder-decoder, and what is merely true or false."""
    shown = isoflop("show", "t5-v1.1-base").stdout
    assert "encoder/layer x12" in shown
    assert "cross  " in shown
    assert "gated" in shown
    assert "bias" in isoflop("show", "gpt2").stdout
    assert "vision/layer x24" in isoflop("show", "llava-1.5-7b").stdout


def test_an_accelerator_is_shown_in_units_each_source_once() -> None:
    shown = isoflop("hardware", "h100-sxm").stdout
    assert "989.4 TFLOP/s" in shown
    assert "3.35 TB/s" in shown
    assert shown.count("whitepaper") == 1


def test_a_plan_prints_the_price_and_the_batch_it_rests_on() -> None:
    shown = isoflop("plan", "train", "gpt2", "--tokens", "1B", "--on", "8xh100-sxm").stdout
    assert "batch of 64 x 1,024 tokens" in shown  # 80 by the law, 8 to each accelerator
    price = answer("hardware", "h100-sxm")["hardware"][0]["numbers"]["dollars_per_hour"]["value"]
    assert f"dollars_per_hour = {price:g} (" in shown
    given = isoflop("plan", "train", "gpt2", "--tokens", "1B", "--on", "8xh100-sxm", "--price", "2")
    assert "dollars_per_hour" not in given.stdout


def test_a_closed_pipe_is_no_error() -> None:
    done = subprocess.run(
        f"{sys.executable} -m isoflop models | head -1",
        shell=True,
        capture_output=True,
        text=True,
        check=False,
    )
    assert "Traceback" not in done.stderr
    assert done.stdout.startswith("model")


def test_a_fitted_law_is_read_back(runs_file: Path, tmp_path: Path) -> None:
    law = tmp_path / "law.json"
    columns = ["--params", "N", "--flops", "C", "--loss", "L"]
    fitted = answer("fit", str(runs_file), *columns, "-o", str(law))
    assert fitted["law"]["alpha"] == pytest.approx(0.34, abs=1e-4)
    predicted = answer("predict", str(law), "--params", "1e9", "--tokens", "1e11")
    assert predicted["loss"] == pytest.approx(1.8 + 400 / 1e9**0.34 + 1500 / 1e11**0.36, rel=1e-5)


def test_fine_tuning_and_conventions_come_out_of_count() -> None:
    done = isoflop("count", "llama-2-7b", "--seq-len", "512", "--lora", "8", "--qlora", "--json")
    validate("count", done.stdout)
    out = json.loads(done.stdout)
    assert out["finetune"]["params_trained"] == 4_194_304
    assert out["finetune"]["base"] == "nf4-dq"
    assert out["memory"]["bytes_grads"] == 2 * 4_194_304
    assert out["flops"]["conventions"]["exact"] == out["flops"]["training"]
    assert out["flops"]["conventions"]["6n"] == out["flops"]["training_6n"]


def test_a_quantised_base_without_updates_and_an_unknown_target_are_refused() -> None:
    assert "go with --lora RANK" in refused("count", "gpt2", "--qlora")
    assert "it has q, k, v, out" in refused(
        "count", "gpt2", "--lora", "2", "--lora-targets", "c_attn"
    )


def test_a_file_that_is_not_ours_is_never_overwritten(runs_file: Path, tmp_path: Path) -> None:
    columns = ["--params", "N", "--flops", "C", "--loss", "L", "--bootstrap", "0"]
    before = runs_file.read_text()
    assert "nothing was written" in refused("fit", str(runs_file), *columns, "-o", str(runs_file))
    assert runs_file.read_text() == before
    for bad in (tmp_path, tmp_path / "no" / "law.json"):
        assert "--output" in refused("fit", str(runs_file), *columns, "-o", str(bad))
    assert "--output" in refused("calibrate", "-o", str(tmp_path / "no" / "p.json"))
    assert "--output" in refused("demo", "-o", "/dev/null/x")


#: Two steps of one trainer, more than twice as slow as isoflop thinks, and one not said whole.
OWN_STEPS = """\
row_id,source_family,model,seq_len,gpu_type,num_gpus,global_batch_seqs,precision,layers,hidden,heads,kv_heads,ffn,vocab,tp,pp,dp,micro_batch,recompute,zero_fsdp,step_time_s
a,mine,my-7b,4096,H100,64,512,bf16,32,4096,32,8,14336,128256,1,1,64,2,none,fsdp,8.9
b,mine,my-1b,4096,H100,8,512,bf16,16,2048,32,8,8192,128256,1,1,8,8,none,fsdp,11.8
c,mine,my-7b,4096,H100,64,512,bf16,32,4096,32,8,14336,128256,,,,2,none,fsdp,8.9
"""


def test_own_steps_teach_a_stack_and_leave_a_file(tmp_path: Path) -> None:
    rows, out = tmp_path / "rows.csv", tmp_path / "stack.toml"
    rows.write_text(OWN_STEPS)
    calibrate = ["calibrate", "--from", str(rows), "--stack", "torchtitan", "-o", str(out)]
    text = isoflop(*calibrate, "--json").stdout
    validate("calibrate", text)
    found = json.loads(text)["stack"]
    assert (found["name"], len(found["steps"]), len(found["skipped"])) == ("torchtitan", 2, 1)
    for step in found["steps"]:
        assert abs(step["after"] - step["measured"]) < abs(step["before"] - step["measured"]) / 2
    assert tomllib.loads(out.read_text())["fitted"]["residual_torchtitan"][0] > 1.3
    plan = ["plan", "train", "llama-3-8b", "--tokens", "1B", "--on", "64xh100-sxm", "--seq-len",
            "4096", "--global-batch", "512", "--tp", "1", "--zero", "3", "--json", "--stack"]  # fmt: skip
    known, told = (json.loads(isoflop(*plan, s).stdout)["days"] for s in ("torchtitan", str(out)))
    assert told > 1.3 * known
    assert "stack.toml" in refused(*plan, str(tmp_path / "no" / "stack.toml"))
    assert "be TOML" in refused(*plan, str(rows.rename(tmp_path / "rows.toml")))
    rows.write_text(OWN_STEPS)
    assert "what they say" in isoflop(*calibrate).stdout  # its own file is replaced
    assert "nothing was written" in refused(*calibrate[:-1], str(rows))
    assert "torchtune" in refused(*calibrate[:3], "--stack", "torchtun")
    assert "--from alone" in refused("calibrate", "--stack", "torchtitan")


@pytest.mark.parametrize(
    "law",
    ["{}", "[]", '{"law": null}', '{"law": {"A": 1' + "0" * 400 + ', "B": 1, "E": 1, "alpha": 1, "beta": 1}}',
     '{"law": {"A": 1e308, "B": 1e308, "E": 1e308, "alpha": 50, "beta": 50}}'],
)  # fmt: skip
def test_a_broken_law_file_is_refused(law: str, tmp_path: Path) -> None:
    (tmp_path / "law.json").write_text(law)
    assert "law" in refused("predict", str(tmp_path / "law.json"), "--flops", "1e20", "--json")


@pytest.mark.parametrize(
    "line", ["threads = 100000000", "model = 3", 'model = ["gpt2"]', "", "seq_len = -1"]
)
def test_a_broken_recipe_is_refused(line: str, tmp_path: Path) -> None:
    recipe = tmp_path / "r.toml"
    recipe.write_text(f"batch_size = 2\nsteps = 3\nlearning_rate = 0.1\nseq_len = 8\n{line}\n")
    assert "r.toml" in refused("train", str(recipe), "-o", str(tmp_path / "run"))


def test_control_characters_never_reach_the_terminal(tmp_path: Path) -> None:
    (tmp_path / "spec.toml").write_text('"a\\u001b[31m\\nb" = 1\n')
    text = refused("count", str(tmp_path / "spec.toml"))
    assert "\x1b" not in text
    assert all(line.startswith("error: ") for line in text.strip().splitlines())


def test_a_part_of_a_path_is_completed() -> None:
    assert "layer/attention/q" in refused("explain", "gpt2", "q")


def test_what_a_training_plan_fills_in_is_said_with_the_option_that_changes_it() -> None:
    asked = ("plan", "train", "gpt2", "--tokens", "10B", "--on", "8xa100-sxm-80gb")
    context, batch = answer(*asked)["notes"]
    assert context == "context 1,024, the model's longest: --seq-len"
    assert batch.startswith("batch 256 x 1,024 tokens")  # 292 by the law, 32 to each accelerator
    assert batch.endswith("--global-batch")
    assert answer(*asked, "--seq-len", "1024", "--global-batch", "512")["notes"] == []


def test_a_training_plan_that_does_not_fit_says_what_would_and_that_fits() -> None:
    asked = ("plan", "train", "llama-3-8b", "--tokens", "1B", "--seq-len", "8192",
             "--global-batch", "16")  # fmt: skip
    kept = ("--recompute", "none")
    said = refused(*asked, *kept, "--on", "2xh100-sxm", code=3)
    assert "what would fit: --recompute full" in said
    assert "4xh100-sxm" in said
    answer(*asked, "--on", "2xh100-sxm", "--recompute", "full")
    answer(*asked, *kept, "--on", "4xh100-sxm")
    assert answer(*asked, "--on", "2xh100-sxm")["recompute"] != "none"
    split = refused(*asked, "--on", "4xh100-sxm", "--dp", "4", "--zero", "0", code=3)
    assert "another layout, tp=" in split


def test_models_can_be_picked_by_a_part_of_their_names() -> None:
    names = [row["name"] for row in answer("models", "Qwen3")["models"]]
    assert "qwen3-8b" in names
    assert all("qwen3" in name for name in names)
    assert f"{len(names)} models: qwen {len(names)}" in isoflop("models", "qwen3").stdout
    assert "not known" in refused("models", "lamma")


def test_refusals_read_as_people_speak() -> None:
    unknown = refused("plan", "train", "gpt2", "--tokens", "1B", "--on", "h100x")
    assert "h100x: not known (did you mean h100-sxm" in unknown
    assert "budget is missing: must be given as one of" in refused(
        "plan", "budget", "--on", "h100-sxm"
    )
    assert "size is missing: must be given as" in refused("predict", "besiroglu-2024")
    assert "size=--params: must be" in refused("predict", "besiroglu-2024", "--params", "1e9")
    tower = refused("plan", "serve", "t5-small", "--on", "h100-sxm")
    assert "(t5-small has one: name a decoder alone)" in tower
