"""A tiny real calibration and a tiny real run: the right shape, no claim on the clock."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from isoflop.arch import llama, zoo
from isoflop.check import calibrate as calibration
from isoflop.check.cut import cut_down
from isoflop.check.kernels import KERNELS, Differentiable
from isoflop.check.measure import Step, Task
from isoflop.check.run import RunCheck, check_run
from isoflop.check.trace import trace
from isoflop.check.work import image_tokens
from isoflop.count import params
from isoflop.errors import InputError
from isoflop.hardware.profile import Profile

TINY = llama(
    "tiny", d_model=16, n_layers=2, n_heads=4, n_kv_heads=2, d_ff=24, vocab_size=64, max_seq_len=16
)


@pytest.fixture(scope="module")
def profile() -> Profile:
    steps: list[float] = []
    found = calibration.calibrate(
        threads=1, seconds_budget=3.0, on_progress=lambda _what, share: steps.append(share)
    )
    assert steps == sorted(steps)
    return found


def test_every_kernel_has_finite_positive_curves(profile) -> None:
    for kernel in KERNELS:
        names = [
            n
            for n in profile.curves
            if n.removesuffix("_forward").removesuffix("_backward") == kernel.name
        ]
        assert names, kernel.name
        for name in names:
            curve = profile.curves[name]
            assert curve.axes == kernel.axes
            assert all(math.isfinite(s) and s > 0 for s in curve.seconds)


def test_a_profile_says_what_was_measured(profile) -> None:
    assert profile.machine.n_threads == 1
    assert profile.machine.torch == torch.__version__
    assert profile.n_rounds >= 3
    assert profile.bytes_framework > 0
    assert profile.ratio_resident > 0
    assert 1.0 in profile.pace
    assert Profile.loads(profile.dumps()) == profile


def test_calibrating_leaves_the_threads_as_they_were(profile) -> None:
    assert profile.machine.n_cores >= 1
    before = torch.get_num_threads()
    with pytest.raises(InputError):
        calibration.calibrate(threads=0)
    assert torch.get_num_threads() == before


@pytest.mark.parametrize(("threads", "budget"), [(0, 1.0), (10**6, 1.0), (1, 0.0), (1.5, 1.0)])
def test_an_impossible_calibration_is_refused(threads, budget) -> None:
    with pytest.raises(InputError):
        calibration.calibrate(threads=threads, seconds_budget=budget)


@pytest.fixture(scope="module")
def check(profile) -> RunCheck:
    return check_run(TINY, batch=2, seq_len=16, profile=profile, steps=4)


def test_a_run_is_checked_in_time_and_memory(check) -> None:
    out = check.to_json()
    assert set(out["run"]) == {"seconds_step", "bytes_peak"}
    for line in out["run"].values():
        assert line["predicted"] > 0
        assert line["measured"] > 0
        assert line["error"] == pytest.approx(line["predicted"] / line["measured"] - 1)
    assert out["steps"] >= 4  # blocks of steps are finished
    assert out["pace"] > 0
    # The model's own state must fit into the peak.
    assert check.measured.bytes_peak > 12 * sum(w.numel() for w in Step(_task()).model.parameters())


def _task() -> Task:
    return Task(TINY, batch=2, seq_len=16, threads=1, steps=1, seconds_most=1.0)


def test_a_trace_uses_the_paths_of_the_description(check) -> None:
    step = Step(_task())
    step(0)
    rows = trace(step.model, step, 1)
    assert all(seconds > 0 for seconds in rows.values())
    described = {path for path, line in check.rows.items() if line.predicted} - {"batch"}
    forward = {path for path in described if path.startswith("forward/")}
    assert forward <= set(rows), forward - set(rows)
    assert "optimizer" in rows
    assert "backward/layer/attention/core" in rows


@pytest.mark.parametrize("name", ["t5-small", "llava-1.5-7b", "gpt-oss-20b", "deepseek-v3"])
def test_every_kind_of_model_runs_under_the_paths_of_its_description(profile, name) -> None:
    arch = cut_down(zoo.entry(name).arch, lambda a: params(a).value <= 3e6)
    if arch.vision is not None:  # 4 patches of an image instead of 576
        arch = replace(arch, vision=replace(arch.vision, image=2 * arch.vision.patch))
    seq_len = 8 + image_tokens(arch)
    found = check_run(arch, batch=2, seq_len=seq_len, profile=profile, steps=3, seconds_most=0.1)
    assert found.untimed == ()
    assert all(line.measured > 0 for line in found.run.values())
    cores = [path for path in found.rows if path.endswith("/core")]
    assert {path.split("/")[0] for path in cores} == {"forward", "backward"}
    for path in cores:
        assert found.rows[path].predicted > 0
        assert found.rows[path].measured > 0, path
    places = {
        "t5-small": "forward/encoder/layer/residual",
        "llava-1.5-7b": "forward/vision/patches",
    }
    if name in places:
        assert found.rows[places[name]].measured > 0
    residual = [path for path in found.rows if path.endswith("/residual")]
    assert all(found.rows[path].predicted for path in residual)


def test_every_kernel_gives_gradients_to_all_that_it_trains() -> None:
    for kernel in KERNELS:
        bench = kernel.bench(*(axis[0] for axis in kernel.grid))
        if isinstance(bench, Differentiable):
            assert set(bench.sample(2)) == {"_forward", "_backward"}
        else:
            assert set(bench.sample(2)) == {""}
