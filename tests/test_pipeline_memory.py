"""What every rank holds over a step: placed in time, drawn in text, in a figure and as JSON."""

from __future__ import annotations

import json
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest

from isoflop.arch import gpt
from isoflop.arch.zoo import entry
from isoflop.cli.app import run
from isoflop.cli.outputs import validate
from isoflop.errors import InputError
from isoflop.hardware import parse_cluster
from isoflop.plan import Layout, plan_train
from isoflop.plan.memory.pipeline import PipelineMemory, memory_of_pipeline, without_gaps
from isoflop.plan.memory.render import render_memory
from isoflop.plan.step.setting import Setting

GPT = gpt("g", d_model=64, n_layers=16, n_heads=4, vocab_size=96, max_seq_len=64)
SETTING = Setting(GPT, parse_cluster("8xa100-sxm-80gb"), Layout(pp=4), 64, 8)


def of(layout: Layout, n_micro: int = 8) -> PipelineMemory:
    return memory_of_pipeline(replace(SETTING, layout=layout, global_batch=n_micro))


@pytest.mark.parametrize("layout", [Layout(pp=4), Layout(pp=4, virtual=2), Layout()], ids=str)
def test_the_most_of_a_step_is_what_the_plan_says(layout: Layout) -> None:
    plan = plan_train(
        GPT, 10**6, SETTING.cluster, seq_len=64, global_batch=8, layout=layout, recompute="full"
    )
    memory = memory_of_pipeline(plan.ask.setting(plan.layout))
    _, held = memory.peak
    assert float(held.moment.bytes) == pytest.approx(float(plan.bytes_per_accelerator.value))


def test_a_rank_works_on_one_thing_at_a_time_and_all_end_together() -> None:
    memory = of(Layout(pp=4, virtual=2))
    for row in memory.ranks:
        assert all(before.end <= after.start for before, after in pairwise(row))
        assert (row[-1].moment.when, row[-1].end) == ("step", memory.end)
    # 1F1B over 4 ranks and 8 micro-batches: 3 forwards and backwards more than its own 8.
    assert of(Layout(pp=4)).end == (8 + 3) * 3 + 1


def test_waiting_holds_no_more_than_working_and_what_stands_stands_from_the_start() -> None:
    memory = of(Layout(pp=4))
    for row in memory.ranks:
        whole = without_gaps(row)
        assert whole[0].start == 0
        assert all(a.end == b.start for a, b in pairwise(whole))
        assert max(h.moment.bytes for h in whole) == max(h.moment.bytes for h in row)
    first, last = without_gaps(memory.ranks[3])[0], memory.ranks[3][-1]
    assert first.moment.bytes == last.moment.bytes


def test_the_picture_has_a_chart_of_each_rank_and_names_the_most() -> None:
    memory = of(Layout(pp=4))
    text = render_memory(memory, width=40)
    rank, held = memory.peak
    assert text.startswith(f"most on rank {rank} at {held.moment.when}: ")
    assert [f"rank  {r} |" in text for r in range(4)] == [True] * 4
    rows = [line for line in text.splitlines() if "|" in line]
    assert {len(line.split("|")[1]) for line in rows} == {40}
    charts = [rows[i : i + 8] for i in range(0, 32, 8)]
    # Work reaches the last rank three forwards after the first: 3 of 34 columns in 40.
    assert [min(len(line.split("|")[1]) - len(line.split("|")[1].lstrip()) for line in chart)
            for chart in charts] == [0, 1, 2, 3]  # fmt: skip


def test_more_ranks_than_a_screen_are_refused() -> None:
    many = replace(SETTING, layout=Layout(pp=16), cluster=parse_cluster("64xa100-sxm-80gb"))
    memory = memory_of_pipeline(many)
    assert "rank 15" in render_memory(memory)
    wide = PipelineMemory((*memory.ranks, memory.ranks[0]), memory.bytes_available)
    with pytest.raises(InputError, match="ranks=17"):
        render_memory(wide)
    with pytest.raises(InputError, match=r"arch\.encoder"):
        memory_of_pipeline(replace(SETTING, arch=entry("t5-small").arch, layout=Layout()))


# --- the command line ---------------------------------------------------------------------------

ASK = ["plan", "train", "gpt2", "--tokens", "1e9", "--on", "4xh100-sxm", "--seq-len", "1024",
       "--global-batch", "8", "--pp", "4", "--timeline"]  # fmt: skip


def said(capsys: pytest.CaptureFixture[str], *arguments: str, code: int = 0) -> str:
    with pytest.raises(SystemExit) as ended:
        run([*ASK, *arguments])
    out = capsys.readouterr()
    assert ended.value.code == code, out.err
    return out.out if code == 0 else out.err


def test_the_command_line_prints_writes_and_draws(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert "most on rank" in said(capsys)
    printed = said(capsys, "--json")
    validate("plan train", printed)
    timeline = json.loads(printed)["timeline"]
    assert len(timeline["ranks"]) == 4
    assert timeline["peak"]["bytes"] == max(m["bytes"] for r in timeline["ranks"] for m in r)
    assert timeline["peak"]["bytes"] == pytest.approx(json.loads(printed)["bytes_per_accelerator"])
    said(capsys, "-o", str(tmp_path / "a.json"))
    assert json.loads((tmp_path / "a.json").read_text())["timeline"] == timeline
    said(capsys, "-o", str(tmp_path / "a.svg"))
    svg = (tmp_path / "a.svg").read_text()
    assert "rank 3" in svg
    assert "most: " in svg


def test_files_that_are_there_and_other_endings_are_refused(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    (tmp_path / "a.svg").write_text("mine")
    assert "new file" in said(capsys, "-o", str(tmp_path / "a.svg"), code=2)
    assert (tmp_path / "a.svg").read_text() == "mine"
    assert "end in .json" in said(capsys, "-o", str(tmp_path / "a.txt"), code=2)
    assert "--timeline" in said(capsys, "--emit", "megatron", code=2)
