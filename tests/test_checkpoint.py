"""Any interruption leaves the same bits; any damage is found; any change is refused."""

from __future__ import annotations

import hashlib
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from isoflop.arch import gpt
from isoflop.errors import InputError
from isoflop.model import build
from isoflop.runs import Run, WriteFailed, read_metrics
from isoflop.train import Recipe, checkpoint
from isoflop.train.data import ByteCorpus
from isoflop.train.loop import read_result, train
from isoflop.train.optim import adamw

#: Dropout, so that resuming must get the random numbers right; a tied head, so that one
#: weight has two names.
ARCH = gpt("tiny", d_model=16, n_layers=2, n_heads=2, vocab_size=256, max_seq_len=16, dropout=0.1)
RECIPE = Recipe(
    seq_len=16, batch_size=2, steps=12, learning_rate=1e-2, warmup_steps=3,
    eval_every=4, eval_bytes=256, checkpoint_every=5,
)  # fmt: skip
TEXT = "".join(f"def f{i}(x):\n    return x * {i} + {i * i}\n" for i in range(200)).encode()
CORPUS = ByteCorpus.from_documents("functions", [TEXT])


@pytest.fixture(autouse=True)
def _one_thread():
    torch.set_num_threads(1)


def bits(run: Path) -> tuple[list[dict[str, Any]], dict[str, str]]:
    """The log without its clock, and the digest of each file of the last checkpoint."""
    rows = [{k: v for k, v in row.items() if k != "seconds"} for row in read_metrics(run)]
    last = max((run / "checkpoints").glob("step-*"))
    names = ("model.safetensors", "optimizer.safetensors")
    return rows, {n: hashlib.sha256((last / n).read_bytes()).hexdigest() for n in names}


@pytest.fixture(scope="module")
def straight(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("straight")
    torch.set_num_threads(1)
    train(RECIPE, ARCH, CORPUS, folder)
    return folder


@pytest.fixture
def stopped(tmp_path) -> Path:
    """A run of eight steps, with checkpoints at 5 and 8."""
    train(RECIPE, ARCH, CORPUS, tmp_path / "run", stop_after=8)
    return tmp_path / "run"


#: A process that does as asked in children of its own, which can then be killed. It is one
#: for all tests because it takes seconds to load torch.
NURSERY = """
import os, shutil, sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
from test_checkpoint import ARCH, CORPUS, RECIPE, checkpoint, save, torch, train
torch.set_num_threads(1)

def wait(row):
    if row["step"] == 7:
        print("seven", os.getpid(), flush=True)
        sys.stdin.read()

def exit_of(work, *arguments):
    child = os.fork()
    if child == 0:
        work(*arguments)
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])

POINTS = {"open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.listdir", "os.scandir"}

def save_and_die_at(point, run):
    left = [point]
    def count(event, arguments):
        if event in POINTS:
            left[0] -= 1
            if left[0] < 0:
                os._exit(137)
    sys.addaudithook(count)
    save(run, 3)

def crash(folder):
    base, run = folder / "base", folder / "run"
    save(folder / "warm", 1)  # what torch loads late is loaded now: loading a module opens files
    for point in range(200):
        shutil.copytree(base, run)
        died = exit_of(save_and_die_at, point, run) == 137
        latest = checkpoint.latest(run)
        found = latest.checkpoint
        if latest.damaged or found is None or found.step != 3 and (found.step != 2 or not died):
            return f"point {point}: died {died}, found {found}"
        checkpoint.clean(run)
        if list(run.glob("checkpoints/.*")):
            return f"point {point}: litter"
        if not died:
            return point
        shutil.rmtree(run)

for line in sys.stdin:
    task, _, folder = line.strip().partition(" ")
    if task == "train":
        code = exit_of(lambda: train(RECIPE, ARCH, CORPUS, folder, on_step=wait))
        print("killed" if code == -9 else code, flush=True)
    else:
        print(crash(Path(folder)), flush=True)
"""


@pytest.fixture(scope="module")
def nursery() -> Iterator[subprocess.Popen[str]]:
    command = [sys.executable, "-W", "ignore", "-c", NURSERY, str(Path(__file__).parent)]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True) as process:
        yield process
        process.stdin.close()


def ask(nursery: subprocess.Popen[str], task: str, folder: Path) -> str:
    nursery.stdin.write(f"{task} {folder}\n")
    nursery.stdin.flush()
    return nursery.stdout.readline().strip()


# --- resume -----------------------------------------------------------------------------


@pytest.mark.parametrize("stops", [[1], [5], [4, 7], [11], list(range(1, 12))])
def test_stopping_and_going_on_equals_never_stopping(tmp_path, straight, stops):
    for stop in stops:
        assert train(RECIPE, ARCH, CORPUS, tmp_path, stop_after=stop).state == "stopped"
    assert train(RECIPE, ARCH, CORPUS, tmp_path).state == "finished"
    assert bits(tmp_path) == bits(straight)


def test_another_seed_has_other_bits(tmp_path, straight):
    train(replace(RECIPE, seed=1), ARCH, CORPUS, tmp_path)
    assert bits(tmp_path) != bits(straight)


def test_kill_9_in_mid_training_then_going_on_equals_never_stopping(tmp_path, straight, nursery):
    word, pid = ask(nursery, "train", tmp_path).split()
    assert word == "seven"
    os.kill(int(pid), signal.SIGKILL)
    assert nursery.stdout.readline() == "killed\n"
    result = read_result(tmp_path)
    assert (result.state, result.step) == ("interrupted", 7)
    with (tmp_path / "metrics.jsonl").open("ab") as log:
        log.write(b'{"step": 8, "lo')  # what a write cut in two would leave
    train(RECIPE, ARCH, CORPUS, tmp_path)
    assert bits(tmp_path) == bits(straight)


def test_a_finished_run_is_left_as_it_is(straight):
    before = {p: p.read_bytes() for p in straight.rglob("*") if p.is_file() and p.name != "lock"}
    assert train(RECIPE, ARCH, CORPUS, straight).step == 12
    assert before == {p: p.read_bytes() for p in before}


@pytest.mark.parametrize(
    ("recipe", "arch", "corpus", "key"),
    [
        (replace(RECIPE, learning_rate=0.02), ARCH, CORPUS, "recipe.learning_rate=0.02"),
        (replace(RECIPE, threads=2), ARCH, CORPUS, "recipe.threads=2"),
        (RECIPE, replace(ARCH, max_seq_len=15), CORPUS, "arch.max_seq_len=15"),
        (RECIPE, ARCH, ByteCorpus.from_documents("functions", [TEXT[::-1]]), "data.sha256="),
    ],
)
def test_a_changed_recipe_arch_or_text_is_refused_by_name(stopped, recipe, arch, corpus, key):
    before = bits(stopped)
    if arch is not ARCH:
        recipe = replace(recipe, seq_len=15)
    with pytest.raises(InputError) as caught:
        train(recipe, arch, corpus, stopped)
    assert key in str(caught.value)
    assert "equal the run's own" in str(caught.value)
    assert bits(stopped) == before


def test_another_torch_is_refused(stopped, monkeypatch):
    monkeypatch.setattr(torch, "__version__", "9.9")
    with pytest.raises(InputError, match=r"torch=9\.9: must equal the run's own 2\."):
        train(RECIPE, ARCH, CORPUS, stopped)


def test_a_checkpoint_of_another_run_is_refused(stopped, tmp_path):
    train(replace(RECIPE, seed=1), ARCH, CORPUS, tmp_path / "other", stop_after=9)
    name = "checkpoints/step-00000009"
    shutil.copytree(tmp_path / "other" / name, stopped / name)
    with pytest.raises(InputError, match="step-00000009: must belong to this run"):
        train(RECIPE, ARCH, CORPUS, stopped)


# --- damage -----------------------------------------------------------------------------


def damage(path: Path, draw: random.Random) -> None:
    data = bytearray(path.read_bytes())
    match draw.choice(["flip", "cut", "zero", "delete", "grow"]):
        case "flip":
            data[draw.randrange(len(data))] ^= 1 << draw.randrange(8)
        case "cut":
            del data[draw.randrange(len(data)) :]
        case "zero":
            place = draw.randrange(len(data))
            page = slice(place, place + 64)
            if not any(data[page]):
                data[place] = 1
            else:
                data[page] = bytes(len(data[page]))
        case "delete":
            path.unlink()
            return
        case "grow":
            data += draw.randbytes(draw.randrange(1, 9))
    path.write_bytes(data)


def test_every_mutation_of_every_file_is_found_and_named(stopped):
    newest = stopped / "checkpoints" / "step-00000008"
    assert checkpoint.verify(newest).step == 8
    for seed in range(240):
        draw = random.Random(seed)
        path = sorted(newest.iterdir())[seed % 3]
        data = path.read_bytes()
        damage(path, draw)
        with pytest.raises(checkpoint.Damaged) as caught:
            checkpoint.verify(newest)
        assert caught.value.problems[0].field == path.name, seed
        path.write_bytes(data)
    assert checkpoint.verify(newest).step == 8


def test_a_damaged_checkpoint_is_set_aside_and_the_one_before_gives_the_same_bits(
    stopped, straight
):
    newest = stopped / "checkpoints" / "step-00000008"
    (newest / "optimizer.safetensors").write_bytes(b"")
    found = checkpoint.latest(stopped)
    assert found.checkpoint is not None
    assert found.checkpoint.step == 5
    assert "optimizer.safetensors" in found.damaged[newest]
    train(RECIPE, ARCH, CORPUS, stopped)
    assert bits(stopped) == bits(straight)
    assert "optimizer.safetensors" in Run.read(stopped).status.details["notes"][0]
    assert (stopped / "checkpoints" / "damaged-step-00000008").is_dir()


def test_a_run_with_only_damaged_checkpoints_does_not_silently_start_again(stopped):
    for path in (stopped / "checkpoints").glob("*/model.safetensors"):
        path.unlink()
    with pytest.raises(InputError) as caught:
        train(RECIPE, ARCH, CORPUS, stopped)
    assert len(caught.value.problems) == 2
    assert "restore one, or start again" in str(caught.value)


# --- the disk ---------------------------------------------------------------------------


def save(run: Path, step: int) -> None:
    run.mkdir(exist_ok=True)
    model = build(ARCH)
    optimizer = adamw(model, RECIPE)
    model.loss(*[torch.zeros(1, 4, dtype=torch.long)] * 2).backward()
    optimizer.step()
    checkpoint.save(run, step=step, run="r", model=model, optimizer=optimizer, counters={})


def test_the_newest_two_are_kept(tmp_path):
    for step in (1, 2, 3, 10):
        save(tmp_path, step)
    names = sorted(path.name for path in (tmp_path / "checkpoints").iterdir())
    assert names == ["step-00000003", "step-00000010"]


def test_a_full_disk_at_any_byte_keeps_the_checkpoint_before_and_leaves_no_litter(tmp_path):
    save(tmp_path, 1)
    files = list((tmp_path / "checkpoints" / "step-00000001").iterdir())
    largest = max(path.stat().st_size for path in files)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    for offset in range(50):
        try:
            resource.setrlimit(resource.RLIMIT_FSIZE, (offset * largest // 50, before[1]))
            with pytest.raises(WriteFailed) as caught:
                save(tmp_path, 2)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)
        assert "File too large" in str(caught.value)
        assert "what was saved before is intact" in str(caught.value)
        assert [p.name for p in (tmp_path / "checkpoints").iterdir()] == ["step-00000001"]
    found = checkpoint.latest(tmp_path).checkpoint
    assert found is not None
    assert found.step == 1


def test_a_disk_that_fills_up_during_training_stops_it_and_room_lets_it_go_on(stopped, straight):
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, before[1]))
        with pytest.raises(WriteFailed):
            train(RECIPE, ARCH, CORPUS, stopped)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert read_result(stopped).state == "failed"
    train(RECIPE, ARCH, CORPUS, stopped)
    assert bits(stopped) == bits(straight)


def test_death_at_any_file_call_of_a_save_leaves_a_whole_checkpoint(tmp_path, nursery):
    save(tmp_path / "base", 1)
    save(tmp_path / "base", 2)
    answer = ask(nursery, "crash", tmp_path)
    assert int(answer) >= 10, answer
