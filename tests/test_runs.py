"""Run directories: what a crash, a second process or a foreign folder may do to them."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from isoflop.errors import InputError
from isoflop.runs import Manifest, Run, Status, WriteFailed, durable, read_metrics, write_whole
from isoflop.runs.lock import is_held

MANIFEST = Manifest({"recipe": {"steps": 9, "betas": (0.9, 0.95)}, "torch": "2.13"}, {"host": "a"})


def rows_of(folder: Path) -> list[tuple[int, float]]:
    return [(row["step"], row["loss"]) for row in read_metrics(folder)]


def test_a_run_reads_back_what_was_written(tmp_path):
    with Run.create(tmp_path / "a" / "run", MANIFEST) as run:
        run.log({"step": 1, "loss": 0.1})
        run.write_status(Status("finished", "", {"step": 1}))
    record = Run.read(tmp_path / "a" / "run")
    assert record.manifest.identity["recipe"] == {"steps": 9, "betas": [0.9, 0.95]}
    assert record.manifest.about == {"host": "a"}
    assert (record.status.state, record.status.details) == ("finished", {"step": 1})
    assert record.metrics == ({"step": 1, "loss": 0.1},)
    assert (tmp_path / "a" / "run").stat().st_mode & 0o077 == 0


def test_the_same_run_is_gone_on_with_and_another_is_refused_by_key_and_values(tmp_path):
    Run.create(tmp_path, MANIFEST).close()
    Run.create(tmp_path, MANIFEST).close()
    Run.open(tmp_path).close()
    other = Manifest({"recipe": {"steps": 8, "betas": [0.9, 0.95]}, "torch": "2.14"})
    with pytest.raises(InputError) as caught:
        Run.create(tmp_path, other)
    assert [(p.field, p.value) for p in caught.value.problems] == [
        ("recipe.steps", 8),
        ("torch", "2.14"),
    ]
    assert "equal the run's own 9" in str(caught.value)
    Run.create(tmp_path, MANIFEST).close()  # the refusal has let go of the lock


def test_a_folder_that_is_no_run_is_refused_and_left_as_it_was(tmp_path):
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(InputError, match=r"holds thesis\.tex"):
        Run.create(tmp_path, MANIFEST)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


@pytest.mark.parametrize("bad", ["file", "file/below", "nul\0byte", "long" * 100])
def test_a_path_that_cannot_be_a_folder_is_an_input_error(tmp_path, bad):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="can be made and read"):
        Run.create(tmp_path / bad, MANIFEST)


@pytest.mark.parametrize(
    "text",
    ["", "[]", "{", "NaN", '{"schema": "isoflop/1"}', '{"schema": "x", "identity": {}, "about": {}}',
     "[" * 100_000, "\udcff", '{"identity": ' + "9" * 5000 + "}"],
)  # fmt: skip
def test_a_damaged_manifest_is_an_input_error(tmp_path, text):
    (tmp_path / "manifest.json").write_bytes(text.encode(errors="surrogateescape"))
    with pytest.raises(InputError, match=r"manifest\.json"):
        Run.read(tmp_path)


def test_no_run_is_an_input_error(tmp_path):
    with pytest.raises(InputError, match="No such file"):
        Run.read(tmp_path / "nowhere")
    with pytest.raises(InputError, match="No such file"):
        Run.open(tmp_path / "nowhere")


# --- metrics ----------------------------------------------------------------------------


@given(cut=st.integers(0, 200), n_rows=st.integers(1, 5))
def test_a_log_cut_anywhere_keeps_every_whole_line_and_goes_on(tmp_path_factory, cut, n_rows):
    folder = tmp_path_factory.mktemp("run")
    with Run.create(folder, MANIFEST) as run:
        for step in range(1, n_rows + 1):
            run.log({"step": step, "loss": step / 7})
    path = folder / "metrics.jsonl"
    data = path.read_bytes()[:cut]
    path.write_bytes(data)
    whole = data.count(b"\n")
    assert rows_of(folder) == [(step, step / 7) for step in range(1, whole + 1)]
    with Run.open(folder) as run:
        run.log({"step": 99, "loss": 0.5})
    assert rows_of(folder) == [(step, step / 7) for step in range(1, whole + 1)] + [(99, 0.5)]


def test_of_a_step_logged_twice_the_last_line_counts(tmp_path):
    with Run.create(tmp_path, MANIFEST) as run:
        for step, loss in [(1, 4.0), (2, 3.0), (3, 2.0), (2, 2.5), (3, 2.25)]:
            run.log({"step": step, "loss": loss})
    assert rows_of(tmp_path) == [(1, 4.0), (2, 2.5), (3, 2.25)]


@pytest.mark.parametrize("line", ["{", "[1]", '{"loss": 1}', '{"step": true}', '{"step": NaN}'])
def test_a_bad_line_before_the_last_is_named(tmp_path, line):
    (tmp_path / "metrics.jsonl").write_text(f'{{"step": 1}}\n{line}\n{{"step": 3}}\n')
    with pytest.raises(InputError, match=r"metrics\.jsonl line 2"):
        read_metrics(tmp_path)


def test_a_run_without_a_log_has_no_rows(tmp_path):
    assert read_metrics(tmp_path) == []


# --- status and lock --------------------------------------------------------------------


def test_an_error_that_leaves_the_run_is_its_status(tmp_path):
    with pytest.raises(ZeroDivisionError), Run.create(tmp_path, MANIFEST):
        1 / 0  # noqa: B018 - the error is the point
    status = Run.read(tmp_path).status
    assert (status.state, status.reason) == ("failed", "ZeroDivisionError('division by zero')")
    assert not is_held(tmp_path)


HOLDER = """
import sys
from isoflop.runs import Manifest, Run, Status
run = Run.create(sys.argv[1], Manifest({"recipe": {"steps": 9, "betas": [0.9, 0.95]}, "torch": "2.13"}))
run.write_status(Status("running"))
print("held", flush=True)
sys.stdin.read()
"""


def test_a_second_process_is_told_who_holds_the_run_until_kill_9_frees_it(tmp_path):
    command = [sys.executable, "-c", HOLDER, str(tmp_path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == b"held\n"
        with pytest.raises(InputError) as caught:
            Run.create(tmp_path, MANIFEST)
        assert f"pid {holder.pid} on {socket.gethostname()}" in str(caught.value)
        assert Run.read(tmp_path).status.state == "running"
        holder.send_signal(signal.SIGKILL)
        holder.wait()
    assert Run.read(tmp_path).status.state == "interrupted"
    with Run.create(tmp_path, MANIFEST):
        assert json.loads((tmp_path / "lock").read_text())["pid"] == os.getpid()


# --- durable ----------------------------------------------------------------------------


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_a_write_that_fails_leaves_the_old_file_and_no_litter(tmp_path, monkeypatch, call):
    write_whole(tmp_path / "a", b"old")

    def fail(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(durable.os, call, fail)
    with pytest.raises(WriteFailed, match=r"could not write 3 B: No space left .* free there"):
        write_whole(tmp_path / "a", b"new")
    assert (tmp_path / "a").read_bytes() == b"old"
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def test_the_file_reaches_the_disk_before_its_name_and_the_folder_after(tmp_path, monkeypatch):
    calls = []
    for name in ("fsync", "replace"):
        real = getattr(os, name)
        monkeypatch.setattr(
            durable.os, name, lambda *a, name=name, real=real: (calls.append(name), real(*a))
        )
    write_whole(tmp_path / "a", b"x")
    assert calls == ["fsync", "replace", "fsync"]


def test_what_a_killed_process_left_is_swept_at_the_next_start(tmp_path):
    Run.create(tmp_path, MANIFEST).close()
    (tmp_path / ".isoflop-torn").write_text("half")
    Run.create(tmp_path, MANIFEST).close()
    assert not (tmp_path / ".isoflop-torn").exists()


def test_runs_load_nothing_heavy():
    code = "import isoflop.runs, sys; print(*sys.modules)"
    loaded = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert not {"torch", "numpy", "scipy", "pydantic"} & set(loaded.stdout.split())
