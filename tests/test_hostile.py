"""Input that means harm, or makes no sense: refused in a line, at once, and nothing is left behind."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest

from isoflop.cli.app import run
from isoflop.errors import Infeasible, InputError
from isoflop.hardware import parse_cluster
from isoflop.laws import Demand, Law, find_law
from isoflop.laws.demand import params_for
from isoflop.plan.budgeting.plan import Ask
from isoflop.plan.budgeting.settle import plan_budget
from isoflop.plan.goodput import NeverEnds, Rhythm
from isoflop.quantity import number
from isoflop.quantity.units import parse_count, parse_real, parse_whole
from isoflop.train.data import ByteCorpus

PLAN = ("plan", "train", "gpt2", "--tokens", "1e9", "--on", "8xh100-sxm")
SERVE = ("plan", "serve", "llama-3-8b", "--on", "8xh100-sxm")
BUDGET = ("plan", "budget", "--flops", "1e21", "--on", "64xh100-sxm")


def refusal(capsys: pytest.CaptureFixture[str], *arguments: object, code: int = 2) -> str:
    """The error of a command that must fail with `code`, no data, and lines that say error."""
    with pytest.raises(SystemExit) as stopped:
        run([str(argument) for argument in arguments])
    said = capsys.readouterr()
    assert stopped.value.code == code, said.err
    assert said.out == ""
    assert all(line.startswith("error: ") for line in said.err.splitlines())
    return said.err


def process(*arguments: str, stdout: int | None = subprocess.PIPE, **env: str) -> tuple[int, str]:
    """The exit code and the errors of a command in a process of its own."""
    done = subprocess.run(
        [sys.executable, "-m", "isoflop", *arguments],
        stdout=stdout, stderr=subprocess.PIPE, text=True, check=False, timeout=60,
        env={**os.environ, **env},
    )  # fmt: skip
    return done.returncode, done.stderr


# --- numbers ------------------------------------------------------------------------------------


@pytest.mark.parametrize("option", ["--tp", "--pp", "--cp", "--ep", "--dp", "--virtual", "--zero"])
def test_a_fraction_is_never_cut_to_a_whole_size(
    option: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert f"{option}=2.5" in refusal(capsys, *PLAN, f"{option}=2.5")


def test_no_other_option_cuts_a_fraction(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    runs = tmp_path / "runs.csv"
    for option in ("--drop-worst", "--bootstrap", "--seed"):
        assert f"{option}=2.5" in refusal(capsys, "fit", runs, f"{option}=2.5")
    for command in ("calibrate", "demo"):
        assert "--threads=2.5" in refusal(capsys, command, "--threads=2.5", "-o", tmp_path / "x")
    assert "--threads=2.5" in refusal(capsys, "check", "gpt2", "--run", "--threads=2.5")
    assert "--tp=2.5" in refusal(capsys, *SERVE, "--tp=2.5")


def test_a_zero_is_read_where_it_means_something(capsys: pytest.CaptureFixture[str]) -> None:
    assert parse_whole("0") == 0
    assert "zero=7" in refusal(capsys, *PLAN, "--zero", "7")
    run_code = process(*PLAN, "--zero", "0", "--json")[0]
    assert run_code == 0


@pytest.mark.parametrize("text", ["2,5", "1,,,0", "1_", "10,00", "1,0000"])
def test_a_comma_that_may_be_a_decimal_point_is_refused(
    text: str, capsys: pytest.CaptureFixture[str]
) -> None:
    for parse in (parse_count, parse_real):
        with pytest.raises(InputError):
            parse(text, "price")
    with pytest.raises(InputError):
        parse_cluster(f"{text}xh100-sxm")
    assert parse_count("1,024") == parse_cluster("1_024xh100-sxm").count == 1024
    assert f"--price={text}" in refusal(capsys, *PLAN, f"--price={text}")


# --- options that would be ignored --------------------------------------------------------------


@pytest.mark.parametrize(
    "arguments",
    [
        ("count", "gpt2", "--lora-targets", "nonsense"),
        ("hardware", "h100-sxm", "--vendor", "amd"),
        ("check", "gpt2", "--batch", "4"),
        ("check", "gpt2", "--profile", "nowhere.json"),
        ("check", "gpt2", "--run", "--profile", "nowhere.json", "--threads", "1"),
        ("explain", "gpt2", "layer", "--seq-len", "99999"),
    ],
)
def test_nothing_that_was_said_is_dropped(
    arguments: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    assert "must " in refusal(capsys, *arguments)


def test_less_than_one_parameter_or_token_has_no_loss(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    law = "besiroglu-2024"
    assert "tokens=" in refusal(capsys, "predict", law, "--flops", "1e-20", "--json")
    assert "params=0.5" in refusal(capsys, "predict", law, "--params", "0.5", "--tokens", "9")
    assert "params=1e-50" in refusal(capsys, "fit", tmp_path / "x.csv", "--at", "1e-50:9")


# --- laws ---------------------------------------------------------------------------------------

STEEP = Law(A=1, B=1, E=1, alpha=50, beta=1e-9)


def test_a_law_past_what_a_float_holds_is_refused() -> None:
    huge = Law(A=1e308, B=1e308, E=1e308, alpha=1e308, beta=1e-308)
    with pytest.raises(InputError, match="can be written"):
        STEEP.loss(1e9, 1e9)
    for law in (huge, Law(A=1e300, B=1e-300, E=1, alpha=1e-9, beta=1e-9)):
        with pytest.raises(InputError, match="can be written"):
            law.optimum(1e20)
    assert math.isfinite(params_for(Law(A=1, B=1, E=1, alpha=1e-9, beta=50), 1e12))


@pytest.mark.parametrize("value", ['"1"', "true", "null", "[1]", "1e400"])
def test_a_law_file_holds_numbers(
    value: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rest = '"B": 1, "E": 1, "alpha": 0.3, "beta": 0.3, "params_convention": "total"'
    (tmp_path / "law.json").write_text(f'{{"law": {{"A": {value}, {rest}}}}}')
    refusal(capsys, "predict", tmp_path / "law.json", "--flops", "1e20", "--json")


# --- failures without end -----------------------------------------------------------------------


@pytest.mark.parametrize(
    "trouble", ["--mtbf-hours=1", "--mtbf-hours=1e-50", "--restart=1e12", "--restart=1e59"]
)
@pytest.mark.parametrize("budget", [BUDGET, ("plan", "budget", "--dollars", "1e5", *BUDGET[4:])])
def test_a_run_that_never_ends_is_infeasible(
    budget: tuple[str, ...], trouble: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert "never ends" in refusal(capsys, *budget, trouble, "--json", code=3)


def test_a_plan_just_short_of_that_has_ranges() -> None:
    ask = Ask(
        "flops", 1e21, parse_cluster("64xh100-sxm"), find_law("besiroglu-2024"), Demand(),
        mtbf_hours=4, seconds_restart=900,
    )  # fmt: skip
    plan = plan_budget(ask)
    assert 0 < plan.nodes()["goodput"].value < 0.1
    assert all(math.isfinite(n.interval.high) for n in plan.nodes().values() if n.interval)


def test_goodput_is_refused_before_it_rounds_to_zero() -> None:
    hour = number(3600)
    with pytest.raises(NeverEnds):
        Rhythm(hour, hour, number(60), number(0), number(5 * 3600)).check()
    Rhythm(hour, hour, number(60), number(0), number(3 * 3600)).check()


# --- files and folders that are none --------------------------------------------------------------


@pytest.fixture
def odd_files(tmp_path: Path) -> list[Path]:
    """A pipe without a writer, a link to a device without end, a folder."""
    pipe, device, folder = (tmp_path / f"{n}.json" for n in ("pipe", "device", "folder"))
    os.mkfifo(pipe)
    device.symlink_to("/dev/zero")
    folder.mkdir()
    return [pipe, device, folder]


def test_a_law_and_a_recipe_are_ordinary_files(
    odd_files: list[Path], capsys: pytest.CaptureFixture[str]
) -> None:
    for path in odd_files:
        assert "ordinary file" in refusal(capsys, "predict", path, "--flops", "1e20")
        assert "ordinary file" in refusal(capsys, "train", path)


def test_data_are_ordinary_files(odd_files: list[Path]) -> None:
    pipe, device, folder = odd_files
    for path in (pipe, device, Path("/dev/zero"), folder.parent):
        with pytest.raises(InputError, match="ordinary file"):
            ByteCorpus.from_path(path)


def test_an_output_that_cannot_be_written_is_refused_before_the_work(
    odd_files: list[Path], capsys: pytest.CaptureFixture[str]
) -> None:
    for path in (*odd_files, "/dev/full", "/proc/law.json", "/sys/law.json", "x" * 300):
        text = refusal(capsys, "calibrate", "-o", path)
        assert "nothing was written" in text
    assert "can be made" in refusal(capsys, "demo", "-o", "x" * 300)


def test_asking_whether_a_folder_can_be_written_leaves_nothing_there(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    refusal(capsys, "fit", tmp_path / "none.csv", "-o", tmp_path / "law.json")
    assert list(tmp_path.iterdir()) == []


# --- sizes --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "line", ['model = "megatron-1t"', 'model = "gpt2"\nbatch_size = 100000000000']
)
def test_a_step_larger_than_this_machine_is_not_tried(
    line: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    batch = "" if "batch_size" in line else "batch_size = 1\n"
    (tmp_path / "r.toml").write_text(
        f"{line}\n{batch}seq_len = 64\nsteps = 2\nlearning_rate = 1e-3\n"
    )
    text = refusal(capsys, "train", tmp_path / "r.toml", "-o", tmp_path / "run", code=3)
    assert "more than this machine's" in text
    assert not (tmp_path / "run").exists()


def test_a_batch_that_nothing_holds_is_refused_without_weighing_every_pipeline(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from isoflop.plan.memory.room import Request

    weighed, weigh = [], Request._stage
    monkeypatch.setattr(Request, "_stage", lambda *a: weighed.append(a) or weigh(*a))
    refusal(capsys, *SERVE, "--batch", "1e8", code=3)
    assert len(weighed) < 200  # 12,386 where each stage of each pipeline is weighed


def test_a_limit_missed_by_far_is_said_in_few_digits() -> None:
    from isoflop.cli.plan_budget import check_days

    ask = Ask("flops", 1e21, parse_cluster("64xh100-sxm"), find_law("besiroglu-2024"), days=1e-9)
    with pytest.raises(Infeasible) as missed:
        check_days(plan_budget(ask))
    assert len(str(missed.value).splitlines()[1]) < 100
    assert "0% of" not in str(missed.value)


# --- terminals ----------------------------------------------------------------------------------


def test_narrow_terminals_and_code_pages_are_borne() -> None:
    for columns in ("0", "1", "20", "many"):
        assert process("--help", COLUMNS=columns) == (0, "")
    ascii_only = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONIOENCODING": "ascii"}
    assert process(*SERVE, **ascii_only) == (0, "")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="this system has no /dev/full")
def test_a_full_disk_behind_stdout_is_an_error_in_one_line() -> None:
    with Path("/dev/full").open("w") as full:
        code, text = process("count", "gpt2", stdout=full.fileno())
    assert (code, text) == (3, "error: the output could not be written: No space left on device\n")


def test_json_is_whole_or_absent(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        run(["predict", "besiroglu-2024", "--flops", "1e21", "--json"])
    assert stopped.value.code == 0
    assert json.loads(capsys.readouterr().out)["command"] == "predict"
