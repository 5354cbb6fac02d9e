"""Predicted against measured: seconds per step and memory peak of six models on this CPU.

    python benchmarks/step_time_cpu.py --threads 1 -o benchmarks/results
    python benchmarks/step_time_cpu.py --kinds -o benchmarks

With `--kinds`, one small model of each kind that a CPU has no fused attention for, beside two it has.

The machine is calibrated before the first shape and again after the last; the prediction
reads the first profile and the pace of reference kernels timed between the steps; the second
says how far the machine itself moved meanwhile.
A shape whose processor time is far from its wall time was disturbed, and is marked.
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from isoflop.arch import Arch, gpt, llama, zoo
from isoflop.arch.spec import Alibi, RelativeProjection, Window
from isoflop.check.calibrate import calibrate
from isoflop.check.cut import cut_down
from isoflop.check.run import RunCheck, check_run
from isoflop.count import params
from isoflop.hardware.profile import Profile

#: Processor time of one thread below this share of wall time: somebody else was running.
UNDISTURBED = 0.95


@dataclass(frozen=True)
class Shape:
    """A model and its batch."""

    arch: Arch
    batch: int
    seq_len: int


SHAPES = (
    Shape(gpt("gpt-tiny", d_model=64, n_layers=2, n_heads=4, vocab_size=256, max_seq_len=64), 8, 64),
    Shape(llama("llama-small", d_model=128, n_layers=4, n_heads=8, n_kv_heads=2, d_ff=344,
                vocab_size=256, max_seq_len=128), 32, 128),
    Shape(gpt("gpt-middle", d_model=256, n_layers=4, n_heads=8, vocab_size=2048, max_seq_len=256), 4, 256),
    Shape(llama("llama-wide", d_model=512, n_layers=2, n_heads=8, n_kv_heads=4, d_ff=1376,
                vocab_size=1024, max_seq_len=256), 4, 256),
    Shape(gpt("gpt-long", d_model=192, n_layers=8, n_heads=6, vocab_size=512, max_seq_len=512), 4, 512),
    Shape(llama("llama-vocabulary", d_model=320, n_layers=3, n_heads=5, d_ff=864, vocab_size=8192,
                max_seq_len=128), 16, 128),
)  # fmt: skip


def _kind(name: str, n_kv_heads: int = 8, **attention: Any) -> Arch:
    """The same small Llama, with another attention."""
    arch = llama(name, d_model=256, n_layers=4, n_heads=8, n_kv_heads=n_kv_heads, d_ff=704,
                 vocab_size=1024, max_seq_len=512)  # fmt: skip
    layer = replace(arch.layers[0], attention=replace(arch.layers[0].attention, **attention))
    return replace(arch, layers=(layer,) * 4)


def _shrunk(name: str, parameters: float = 4e6) -> Arch:
    """A named model, cut down by the code of `isoflop check --run`."""
    return cut_down(zoo.entry(name).arch, lambda arch: float(params(arch).value) <= parameters)


def kinds() -> tuple[Shape, ...]:
    """One of each kind of attention, then models of the zoo cut down to 4 M parameters."""
    capped = _kind("softcap", 4, logit_softcap=50.0)
    return (
        Shape(_kind("plain"), 8, 256),
        Shape(_kind("window", span=Window(128)), 8, 256),
        Shape(_kind("alibi", position=Alibi()), 8, 256),
        Shape(capped, 8, 256),
        Shape(replace(capped, name="softcap-long"), 4, 512),
        Shape(_kind("sinks", 2, sinks=True), 8, 256),
        Shape(_kind("sinks-window", 2, sinks=True, span=Window(128)), 4, 512),
        Shape(_kind("dropout", dropout=0.1), 8, 256),
        Shape(_kind("distances", position=RelativeProjection()), 8, 256),
        *(Shape(_shrunk(name), 8, 256) for name in ("t5-v1.1-small", "t5-small", "bloom-560m", "gemma-2-2b", "gpt-oss-20b", "deepseek-v3")),
        Shape(_shrunk("llava-1.5-7b"), 2, 704),
    )  # fmt: skip


def main() -> None:
    options = _options()
    shapes = kinds() if options.kinds else SHAPES
    profile = calibrate(threads=options.threads, seconds_budget=options.seconds, on_progress=_say)
    checks = {}
    for shape in shapes:
        _say(shape.arch.name, len(checks) / len(shapes))
        checks[shape.arch.name] = check_run(
            shape.arch, batch=shape.batch, seq_len=shape.seq_len, profile=profile
        )
    after = calibrate(threads=options.threads, seconds_budget=options.seconds, on_progress=_say)
    text = _table(checks, profile, after)
    print(text)
    if options.output is not None:
        stem = "step_time_kinds_cpu" if options.kinds else "step_time_cpu"
        _write(options.output / f"{stem}_{options.threads}", text, checks, profile)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--kinds", action="store_true", help="kinds of attention, not six models")
    parser.add_argument("--seconds", type=float, default=30.0, help="budget of a calibration")
    parser.add_argument("-o", "--output", type=Path, help="folder for the markdown and JSON")
    return parser.parse_args()


def _say(what: str, share: float) -> None:
    print(f"{share:5.0%} {what}", file=sys.stderr)


def _table(checks: dict[str, RunCheck], profile: Profile, after: Profile) -> str:
    machine = profile.machine
    lines = [
        f"{machine.cpu}, {machine.n_cores} cores, {machine.n_threads} threads, "
        f"torch {machine.torch}, {datetime.now(UTC):%Y-%m-%d %H:%M} UTC",
        "",
        "| model | ms predicted | ms measured | error | MB predicted | MB measured | error | pace | cpu / wall |",
        "|---|--:|--:|--:|--:|--:|--:|--:|--:|",
        *(_line(name, check, machine.n_threads) for name, check in checks.items()),
        "",
        *_summary(checks),
        f"machine after / before: {_moved(profile, after):.3f} (median over all curves)",
    ]
    return "\n".join(lines)


def _line(name: str, check: RunCheck, threads: int) -> str:
    seconds, size = check.run["seconds_step"], check.run["bytes_peak"]
    share = check.measured.seconds_cpu / check.measured.seconds_step / threads
    disturbed = " disturbed" if share < UNDISTURBED and threads == 1 else ""
    return (
        f"| {name} | {seconds.predicted * 1e3:.2f} | {seconds.measured * 1e3:.2f} | {seconds.error:+.1%} "
        f"| {size.predicted / 1e6:.1f} | {size.measured / 1e6:.1f} | {size.error:+.1%} | {check.pace:.2f} | {share:.2f}{disturbed} |"
    )


def _summary(checks: dict[str, RunCheck]) -> list[str]:
    found = []
    for field, what in (("seconds_step", "step time"), ("bytes_peak", "peak memory")):
        errors = [abs(check.run[field].error) for check in checks.values()]
        mean = sum(errors) / len(errors)
        found.append(f"{what}: mean error {mean:.1%}, largest {max(errors):.1%}  ")
    return found


def _moved(before: Profile, after: Profile) -> float:
    """How much slower the second calibration found the machine."""
    ratios = sorted(
        sum(after.curves[name].seconds) / sum(curve.seconds)
        for name, curve in before.curves.items()
        if name in after.curves and after.curves[name].grid == curve.grid
    )
    return ratios[len(ratios) // 2]


def _write(stem: Path, text: str, checks: dict[str, RunCheck], profile: Profile) -> None:
    stem.parent.mkdir(parents=True, exist_ok=True)
    data: dict[str, Any] = {
        "schema": "isoflop/1",
        "models": {name: check.to_json() for name, check in checks.items()},
        "profile": profile.to_json(),
    }
    stem.with_suffix(".md").write_text(f"# Step time on a CPU, predicted and measured\n\n{text}\n")
    stem.with_suffix(".json").write_text(json.dumps(data, indent=1) + "\n")


if __name__ == "__main__":
    main()
