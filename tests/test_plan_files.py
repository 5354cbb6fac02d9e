"""Plans as files: for trainers, held side by side, and asked again with other answers."""

from __future__ import annotations

import json
import math
import shlex
import tomllib
from pathlib import Path
from typing import Any

import pytest

from isoflop.arch import Arch, gpt
from isoflop.arch.zoo import entry
from isoflop.cli.app import run
from isoflop.cli.outputs import validate
from isoflop.count.stages import layers_of_stage
from isoflop.errors import InputError, UnknownName
from isoflop.hardware import parse_cluster
from isoflop.plan import Layout, TrainPlan, plan_train
from isoflop.plan.diff import diff, leaves
from isoflop.plan.emit import KINDS, emitted
from isoflop.plan.schedule import ScheduleName, n_stages
from isoflop.plan.training.plan import what_if
from isoflop.train.recipe import parse_recipe

SMALL = gpt("small", d_model=512, n_layers=12, n_heads=8, vocab_size=5000, max_seq_len=2048)


def planned(
    layout: Layout, *, arch: Arch = SMALL, on: str = "64xh100-sxm", **more: Any
) -> TrainPlan:
    more = {"global_batch": 64, "seq_len": 1024, **more}
    return plan_train(arch, 10**9, parse_cluster(on), layout=layout, **more)


def flags(text: str) -> dict[str, str | None]:
    """The arguments of a command line by name."""
    words = shlex.split(text)
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
    assert flags(emitted("torchrun", planned(Layout(dp=4))))["--nproc-per-node"] == "4"


@pytest.mark.parametrize(
    "layout",
    [
        Layout(dp=16, micro_batch=2),
        Layout(tp=2, dp=8, cp=2, zero=3),
        Layout(tp=2, pp=4, dp=4, zero=2, micro_batch=2, virtual=3),
        Layout(pp=7, dp=8, zero=3),
        Layout(pp=2, dp=8, zero=3, schedule="dualpipev"),
        Layout(pp=2, dp=8, schedule="gpipe"),
    ],
)
def test_torchtitan_splits_as_the_layout_does(layout: Layout) -> None:
    job = tomllib.loads(emitted("torchtitan", planned(layout)))
    ways, work = job["parallelism"], job["training"]
    copies = ways["data_parallel_replicate_degree"] * ways["data_parallel_shard_degree"]
    assert copies == layout.dp
    ranks = copies * ways["tensor_parallel_degree"] * ways["context_parallel_degree"]
    assert ranks * ways["pipeline_parallel_degree"] == layout.n_accelerators
    assert work["seq_len"] * work["global_batch_size"] == 1024 * 64
    per_rank = work["local_batch_size"] * layout.dp
    assert 64 % per_rank == 0
    if layout.pp > 1:
        assert per_rank == 64
        assert ways["pipeline_parallel_microbatch_size"] == layout.micro_batch
        chunks = n_stages(layout.pipeline, layout.pp)
        least = [ways[f"pipeline_parallel_{end}_stage_less_layers"] for end in ("first", "last")]
        assert ways["pipeline_parallel_layers_per_stage"] * chunks - sum(least) == 12
    else:
        assert work["local_batch_size"] == layout.micro_batch
    assert (ways["data_parallel_shard_degree"] > 1) == (layout.zero > 0)
    assert (ways["fsdp_reshard_after_forward"] == "always") == (layout.zero == 3)


@pytest.mark.parametrize(
    ("layout", "more", "field"),
    [
        (Layout(dp=8, zero=1), {}, "zero=1"),
        (Layout(tp=2, dp=8, sequence_parallel=False), {}, "sequence_parallel=False"),
        (Layout(dp=8), {"recompute": "selective"}, "recompute=selective"),
        (Layout(dp=4, cp=2), {}, "zero=0"),
        (Layout(pp=5, dp=8), {}, "pp=5"),
        (Layout(dp=8), {"precision": "fp16"}, "precision=fp16"),
    ],
)
def test_torchtitan_refuses_by_name_what_it_cannot_say(
    layout: Layout, more: dict[str, Any], field: str
) -> None:
    with pytest.raises(InputError, match=field):
        emitted("torchtitan", planned(layout, **more))


@pytest.mark.parametrize(
    ("layout", "name"),
    [
        (Layout(pp=2, dp=8), "1F1B"),
        (Layout(pp=2, dp=8, virtual=3), "Interleaved1F1B"),
        (Layout(pp=2, dp=8, schedule="gpipe"), "GPipe"),
        (Layout(pp=2, dp=8, schedule="dualpipev"), "DualPipeV"),
    ],
)
def test_torchtitan_names_the_schedule_as_pytorch_does(layout: Layout, name: str) -> None:
    from torch.distributed.pipelining.schedules import get_schedule_class

    said = tomllib.loads(emitted("torchtitan", planned(layout)))["parallelism"]
    assert said["pipeline_parallel_schedule"] == name
    assert get_schedule_class(name).__name__ == f"Schedule{name}"


@pytest.mark.parametrize("schedule", ["gpipe", "zb-h1", "zb-h2", "dualpipe", "dualpipev"])
def test_trainers_refuse_schedules_that_they_do_not_have(schedule: ScheduleName) -> None:
    plan = planned(Layout(pp=4, dp=8, schedule=schedule))
    with pytest.raises(InputError, match=f"schedule={schedule}: must hold: is 1f1b"):
        emitted("megatron", plan)
    if schedule not in ("gpipe", "dualpipev"):
        with pytest.raises(InputError, match=f"schedule={schedule}: must hold"):
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
    assert search["evaluated"] + search["refused"] == search["enumerated"]
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
    path = tmp_path / "job.toml"
    said(capsys, *ASK, "--dp", "2", "--emit", "torchtitan", "-o", str(path))
    assert tomllib.loads(path.read_text())["training"]["seq_len"] == 1024
    assert "new file" in said(
        capsys, *ASK, "--dp", "2", "--emit", "torchtitan", "-o", str(path), code=2
    )
    assert "--emit" in said(capsys, *ASK, "-o", str(path), code=2)
