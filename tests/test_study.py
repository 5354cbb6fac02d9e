"""The demo's path in small: nothing canned, and a step replaced by a constant is noticed."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from isoflop.cli.demo import Story, prepare, threads_for
from isoflop.cli.outputs import validate
from isoflop.count import Workload
from isoflop.errors import Fault, Infeasible, InputError
from isoflop.hardware.profile import Profile
from isoflop.laws.fit import fit
from isoflop.plan.cost import step_cost
from isoflop.plan.memory.peak import peak_memory
from isoflop.quantity import leaf
from isoflop.runs import read_metrics
from isoflop.study import ladder, launch, loop
from isoflop.train.loop import read_result

#: A demo in small: a handful of steps and validation bytes, a few seconds of calibration.
SMALL = {
    "isoflop.study.ladder.STEPS_LEAST": 2,
    "isoflop.study.ladder.BYTES_EVAL": 8192,
    "isoflop.study.loop.BYTES_EVAL": 8192,
    "isoflop.cli.demo.SHARE_TRAIN": 0.01,  # room for a machine ten times slower
    "isoflop.cli.demo.SHARE_CALIBRATE": 0.01,
}
SECONDS = 400.0


@pytest.fixture(autouse=True, scope="module")
def small() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        for name, value in SMALL.items():
            patch.setattr(name, value)
        yield


def tell(folder: Path) -> Path:
    """The whole demo, told into `folder`."""
    Story(prepare(folder), SECONDS, threads=1, told=lambda _: None).tell()
    return folder


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tell(tmp_path_factory.mktemp("demo") / "out")


def audit(folder: Path) -> list[str]:
    """What in a demo's report does not follow from what it left on disk, from scratch."""
    data = json.loads((folder / "demo.json").read_text())
    profile = Profile.from_json(json.loads((folder / "profile.json").read_text()))
    runs = [*data["rungs"], data["target"]]
    wrong = []
    for run in runs:
        wrong += audit_run(run, profile)
    again = fit(*([r[k] for r in data["rungs"]] for k in ("params", "tokens", "loss")), delta=1.0)
    for name in ("A", "B", "E", "alpha", "beta"):
        if not math.isclose(getattr(again.law, name), data["law"]["law"][name], rel_tol=1e-9):
            wrong.append(f"law.{name} is not the fit of the rungs")
    target = data["target"]
    predicted = again.law.loss(target["params"], target["tokens"])
    if not math.isclose(predicted, target["loss_predicted"]["predicted"], rel_tol=1e-9):
        wrong.append("the predicted loss is not the law's")
    if not math.isclose(loop.baseline(), data["baseline_markov2"], rel_tol=1e-9):
        wrong.append("the baseline is not the Markov model's")
    return wrong


def audit_run(run: dict[str, Any], profile: Profile) -> list[str]:
    """One run's numbers against its directory, the profile and the spec."""
    shapes = (*ladder.SHAPES, ladder.TARGET_SHAPE)
    arch = next(ladder.shape(*s) for s in shapes if run["name"].startswith(f"d{s[0]}-"))
    work = Workload.train(ladder.BATCH, ladder.SEQ_LEN)
    result = read_result(Path(run["run_dir"]))
    rows = read_metrics(Path(run["run_dir"]))
    expected = {
        "loss": (run["loss"], result.val_loss),
        "steps": (run["steps"], len(rows)),
        "tokens": (run["tokens"], result.tokens),
        "measured seconds": (run["seconds"]["measured"], sum(result.seconds_steps)),
        "predicted seconds": (
            run["seconds"]["predicted"], run["steps"] * float(step_cost(arch, work, profile).value)
        ),
        "predicted memory": (
            run["bytes_peak"]["predicted"], float(peak_memory(arch, work, profile).value)
        ),
    }  # fmt: skip
    return [
        f"{run['name']}: {what}"
        for what, (told, real) in expected.items()
        if not math.isclose(float(told), float(real or 0), rel_tol=1e-9)
    ]


def test_every_number_of_the_report_follows_from_the_files(demo: Path) -> None:
    assert audit(demo) == []
    validate("demo", (demo / "demo.json").read_text())
    assert {p.name for p in demo.glob("*.png")} == {"loss.png", "predicted-measured.png"}


def test_the_runs_really_learned(demo: Path) -> None:
    data = json.loads((demo / "demo.json").read_text())
    losses = [run["loss"] for run in data["rungs"]]
    assert len(set(losses)) == len(losses)
    assert all(1.0 < x < math.log(256) for x in losses)
    longest = {r["name"]: r["loss"] for r in data["rungs"]}
    assert longest["d64-t4"] < longest["d64-t1"]


PLANTED = [(n, d, 1.2 + 5 / n**0.3 + 60 / d**0.4) for n in (1e4, 1e5, 1e6) for d in (1e5, 1e6, 1e7)]


def changed(function: Any, **fields: float) -> Any:
    """The function, with some fields of what it returns made constant."""
    return lambda *a, **k: replace(function(*a, **k), **fields)


#: Steps of the demo, each replaced by something that does no work.
CANNED: dict[str, tuple[str, Any]] = {
    "loss": ("isoflop.study.launch._listen", changed(launch._listen, val_loss=1.9)),
    "seconds": ("isoflop.study.launch._listen", changed(launch._listen, seconds=1.0)),
    "predicted seconds": (
        "isoflop.plan.cost.step_cost", lambda *_: leaf("seconds_step", "seconds", 0.01)
    ),
    "predicted memory": (
        "isoflop.plan.memory.peak.peak_memory", lambda *_: leaf("bytes_peak", "bytes", 10**8)
    ),
    "law": (
        "isoflop.study.loop.fit",
        lambda *_, **__: fit(*zip(*PLANTED, strict=True), bootstrap=50),
    ),
    "baseline": ("isoflop.study.loop.Markov.nats", lambda _, text: 0 * text.numpy() + 1.7),
}  # fmt: skip


@pytest.mark.parametrize("step", CANNED)
def test_a_step_replaced_by_a_constant_is_noticed(step: str, demo: Path, tmp_path: Path) -> None:
    folder = tmp_path / "out"
    profile = Profile.from_json(json.loads((demo / "profile.json").read_text()))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Story, "calibrate", lambda _: profile)  # this machine is calibrated already
        patch.setattr(*CANNED[step])
        tell(folder)
    (folder / "profile.json").write_bytes((demo / "profile.json").read_bytes())
    assert audit(folder)


def test_the_audit_accepts_the_same_path_with_nothing_replaced(demo: Path, tmp_path: Path) -> None:
    profile = Profile.from_json(json.loads((demo / "profile.json").read_text()))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Story, "calibrate", lambda _: profile)
        folder = tell(tmp_path / "out")
    (folder / "profile.json").write_bytes((demo / "profile.json").read_bytes())
    assert audit(folder) == []


def test_a_ladder_fits_its_time_and_varies_both_axes() -> None:
    cheap = ladder.plan_ladder(
        100.0, 1, lambda *_: leaf("s", "seconds", 0.01), lambda *_: leaf("b", "bytes", 1)
    )
    assert cheap.seconds <= 100.0
    assert len({r.params for r in cheap.rungs}) == len({r.tokens for r in cheap.rungs}) == 3
    assert all(
        r.params < cheap.target.params and r.tokens < cheap.target.tokens for r in cheap.rungs
    )
    cut = ladder.shorten(cheap.target, 100)
    assert float(cut.seconds.value) == pytest.approx(1.0)


def test_too_little_time_is_infeasible_and_says_what_is_needed() -> None:
    with pytest.raises(Infeasible, match="give it more time"):
        ladder.plan_ladder(
            0.1, 1, lambda *_: leaf("s", "seconds", 0.01), lambda *_: leaf("b", "bytes", 1)
        )


def test_a_directory_that_is_no_demo_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("do not delete")
    with pytest.raises(InputError, match="new directory"):
        prepare(tmp_path)
    assert (tmp_path / "thesis.tex").exists()


def test_a_failing_run_is_told_with_its_reason(tmp_path: Path) -> None:
    rung = ladder.plan_ladder(
        1e4, 1, lambda *_: leaf("s", "seconds", 1.0), lambda *_: leaf("b", "bytes", 1)
    ).rungs[0]
    with pytest.raises(Fault, match="no-such-file"):
        launch.run(rung, tmp_path / "run", data="no-such-file")


@pytest.mark.parametrize(
    ("cores", "load", "threads"), [(4, 0.3, 2), (4, 2.2, 2), (4, 2.8, 1), (4, 9.0, 1), (1, 0.0, 1)]
)
def test_two_threads_only_where_two_cores_are_idle(
    cores: int, load: float, threads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("os.getloadavg", lambda: (load, load, load))
    assert threads_for(cores) == threads
