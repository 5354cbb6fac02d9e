"""isoflop calibrate · isoflop check"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from cyclopts import Parameter

from isoflop.arch import Arch
from isoflop.cli.agreement import check_zoo, render_rows
from isoflop.cli.options import Count, Duration, Json, load_model
from isoflop.cli.output import check_output, emit, note, say
from isoflop.cli.progress import bar, busy
from isoflop.errors import Infeasible, InputError, Problem
from isoflop.quantity.units import (
    format_bytes,
    format_count,
    format_seconds,
    format_si,
)
from isoflop.report.text import table

if TYPE_CHECKING:
    from isoflop.check.run import RunCheck
    from isoflop.check.size import Size
    from isoflop.hardware.profile import Profile

#: A calibration this long meets the stated error; shorter ones have a wider spread.
SECONDS_CALIBRATE = 30.0
#: Operators shown with their part of a step's miss.
OPERATORS_SHOWN = 12


def calibrate_command(
    *,
    output: Annotated[Path | None, Parameter(name=["--output", "-o"])] = None,
    threads: Count | None = None,
    seconds: Duration = SECONDS_CALIBRATE,
    rows: Annotated[Path | None, Parameter(name="--from")] = None,
    stack: str | None = None,
    as_json: Json = False,
) -> None:
    """Measure this machine, or learn a trainer's software from a few steps of your own.

    Parameters
    ----------
    output
        Where the profile goes, profile.json when not given; `isoflop check --run --profile`
        reads it. With --from what the steps said, stack.toml when not given.
    threads
        CPU threads; 2, or as many as there are, when not given.
    seconds
        How long to measure, such as 30s; longer narrows the spread.
    rows
        A CSV file of your own step times, three or so: docs/own-steps.md says its columns; nothing
        is measured here.
    stack
        With --from: the software that the steps ran under, where the file does not say.
    """
    from isoflop.runs import write_whole

    if rows is not None:
        from isoflop.cli.calibrate_stack import calibrate_from

        return calibrate_from(rows, output or Path("stack.toml"), stack, as_json=as_json)
    if stack is not None:
        raise InputError("calibrate", [Problem("--stack", stack, "stands with --from alone")])
    output = output or Path("profile.json")
    check_output(output, "curves")
    profile = measure(threads, seconds)
    data = profile.to_json()
    write_whole(output, (json.dumps(data, indent=1) + "\n").encode())
    note(f"profile written to {output}")
    if as_json:
        return emit("calibrate", {"output": str(output), "profile": data})
    return say(describe_profile(profile))


def measure(threads: int | None, seconds: float) -> Profile:
    """A calibration with a progress line."""
    from isoflop.check.calibrate import calibrate
    from isoflop.check.measure import n_cores

    n_threads = min(2, n_cores()) if threads is None else threads
    with bar(f"calibrating {n_threads} threads", 1.0) as advance:
        return calibrate(
            threads=n_threads,
            seconds_budget=seconds,
            on_progress=lambda what, share: advance(share, what),
        )


def describe_profile(profile: Profile) -> str:
    """A profile in a few lines: the machine, and the best its kernels reached."""
    machine = profile.machine
    rows = [
        ["  machine", f"{machine.cpu}, {machine.n_threads} of {machine.n_cores} cores, {machine.system}"],
        ["  with", f"torch {machine.torch}, {machine.date}"],
        *([f"  {name}", value] for name, value in highlights(profile).items()),
        ["  pace", f"{profile.pace.low:.2f} to {profile.pace.high:.2f} of the median while measuring"],
        ["  measured", f"{len(profile.curves)} curves, {profile.n_rounds} rounds, {format_seconds(profile.seconds_spent)}"],
    ]  # fmt: skip
    return table(rows)


def highlights(profile: Profile) -> dict[str, str]:
    """The best rates on the grid, and the least a call costs."""
    from itertools import product
    from math import prod

    linear, add = profile.curve("linear_forward"), profile.curve("add_forward")
    best = max(2 * prod(sizes) / linear.at(*sizes) for sizes in product(*linear.grid))
    least, most = add.grid[0][0], add.grid[0][-1]
    moved = 3 * 4 * most / add.at(most)  # two fp32 numbers read and one written
    return {
        "matrix products": f"up to {format_si(best, 'FLOP/s')}",
        "memory": f"{format_si(moved, 'B/s')} adding {format_count(most)} numbers",
        "least call": f"{format_seconds(add.at(least))} for {format_count(least)} numbers",
    }


def read_profile(path: Path) -> Profile:
    """A profile that `isoflop calibrate` wrote.

    Raises:
        InputError: no such file, or not a profile.
    """
    from isoflop.arch.foreign import parse_json, read_file
    from isoflop.hardware.profile import Profile

    return Profile.from_json(parse_json(read_file(path), str(path)), str(path))


def check(
    model: str | None = None,
    /,
    *,
    zoo: Annotated[bool, Parameter(negative="")] = False,
    every: Annotated[bool, Parameter(name="--all", negative="")] = False,
    jobs: Count | None = None,
    run: Annotated[bool, Parameter(negative="")] = False,
    batch: Count | None = None,
    seq_len: Count | None = None,
    profile: Path | None = None,
    threads: Count | None = None,
    as_json: Json = False,
) -> None:
    """Hold derived numbers against the built module, and a real run.

    Parameters, buffers, bytes in memory and on disk, caches and FLOPs are to be equal; activations
    saved for backward, under each policy of recomputing, to be within 2 %.

    Parameters
    ----------
    model
        A zoo name, a config.json or its folder, a TOML spec, or hf:ORG/NAME.
    zoo
        Check every named model instead.
    every
        Show every number, not only sums and differences.
    jobs
        Processes for --zoo; 2, or as many as there are cores, when not given.
    run
        Also train a few steps here: seconds and memory, predicted and measured.
    batch
        Sequences per step of that run. When neither this nor --seq-len is given, they are
        chosen so that the run fits this machine and ends soon; a model too large for any size
        is cut down for it, and the table says how.
    seq_len
        Tokens per sequence of that run, those of an image included.
    profile
        A profile that `isoflop calibrate` wrote; made first when not given.
    threads
        CPU threads of a calibration made first.
    """
    stated = {"batch": batch, "seq-len": seq_len, "profile": profile, "threads": threads}
    check_stated({name: value for name, value in stated.items() if value is not None}, run=run)
    check_named(model, zoo=zoo, run=run, jobs=jobs)
    if model is None:
        return check_zoo(jobs, every=every, as_json=as_json)
    from isoflop.check.agree import agree

    arch = load_model(model)
    known = None if profile is None else read_profile(profile)
    with busy(f"building {arch.name} without its weights, and counting it: some seconds"):
        rows = agree(arch)
    wrong = [row for row in rows if not row.agrees]
    data: dict[str, Any] = {
        "model": arch.name,
        "rows": [row.to_json() for row in rows],
        "disagreements": len(wrong),
    }
    ran = run_here(arch, batch, seq_len, known, threads) if run else None
    if ran is not None:
        data |= run_json(*ran)
    if as_json:
        emit("check", data)
    else:
        say(render_rows(arch, rows, every=every))
        if ran is not None:
            say(render_run(*ran))
    if wrong:
        raise Infeasible(f"{arch.name}: {len(wrong)} of {len(rows)} numbers disagree")
    return None


def check_named(model: str | None, *, zoo: bool, run: bool, jobs: int | None) -> None:
    """Refuse what names no model or more than is meant.

    Raises:
        InputError: neither a model nor --zoo, both, or what goes with the other alone.
    """
    bad = []
    if model is None and not zoo:
        bad.append(Problem("MODEL", "nothing", "is named, or --zoo is given"))
    if model is not None and zoo:
        bad.append(Problem("MODEL", model, "is not named with --zoo, which checks every model"))
    if run and zoo:
        bad.append(Problem("--run", "given", "goes with one model"))
    if jobs is not None and not zoo:
        bad.append(Problem("--jobs", jobs, "goes with --zoo"))
    if bad:
        raise InputError("check", bad)


def check_stated(stated: Mapping[str, object], *, run: bool) -> None:
    """Refuse what would be ignored: options of a run that is not asked for, threads twice.

    Raises:
        InputError: such an option is given; all of them are listed.
    """
    bad = []
    if not run:
        rule, hint = "goes with --run", "add --run, or leave it out"
        bad = [Problem(f"--{name}", str(value), rule, hint) for name, value in stated.items()]
    elif "profile" in stated and "threads" in stated:
        rule, hint = "is not given with --profile", "a profile says how many threads it measured"
        bad = [Problem("--threads", stated["threads"], rule, hint)]
    if bad:
        raise InputError("check", bad)


def run_here(
    arch: Arch,
    batch: int | None,
    seq_len: int | None,
    profile: Profile | None,
    threads: int | None,
) -> tuple[Size, RunCheck]:
    """Predict and measure a real run, at the size asked for or a chosen one.

    Raises:
        Infeasible: the size asked for is predicted not to fit into this machine's memory.
        InputError: sequences longer than the model has positions for.
    """
    from isoflop.check.run import check_run
    from isoflop.check.size import choose_size

    known = measure(threads, SECONDS_CALIBRATE) if profile is None else profile
    size = choose_size(arch, batch, seq_len, known)
    note(f"training {describe_size(size)}")
    return size, check_run(size.arch, batch=size.batch, seq_len=size.seq_len, profile=known)


def run_json(size: Size, ran: RunCheck) -> dict[str, Any]:
    """`.run` with the two headline numbers, `.operators` with each operator's part."""
    data = ran.to_json()
    operators = [{"path": path, **seconds} for path, seconds in data.pop("rows").items()]
    return {"run": {**data.pop("run"), **size.to_json(), **data}, "operators": operators}


def describe_size(size: Size) -> str:
    """Which model runs, at which size, and who chose it."""
    name = f"{size.arch.name} CUT DOWN" if size.cut else size.arch.name
    names = {"batch": "batch", "seq_len": "length"}
    chosen = " and ".join(names[field] for field in size.chosen)
    return f"{name}, {size.batch} x {size.seq_len} tokens" + (
        f" ({chosen} chosen)" if chosen else ""
    )


def render_run(size: Size, ran: RunCheck) -> str:
    """Predicted against measured, and the operators with the largest part."""
    step, peak = ran.run["seconds_step"], ran.run["bytes_peak"]
    head = [
        ["  time of a step", format_seconds(step.predicted), format_seconds(step.measured), f"{100 * step.error:+.1f} %"],
        ["  peak memory", format_bytes(peak.predicted), format_bytes(peak.measured), f"{100 * peak.error:+.1f} %"],
    ]  # fmt: skip
    largest = sorted(ran.rows.items(), key=lambda row: -max(row[1].predicted, row[1].measured))
    parts = [
        [f"  {path}", format_seconds(line.predicted), format_seconds(line.measured), _part(line.predicted - line.measured, step.measured)]
        for path, line in largest[:OPERATORS_SHOWN]
    ]  # fmt: skip
    return "\n".join(
        [
            *_headline(size, ran),
            table(head, ["", "predicted", "measured", "miss"], "lrrr"),
            *_untimed(ran),
            "\nthe largest operators, measured under a profiler; miss in parts of the step",
            table(parts, ["", "predicted", "measured", "miss"], "lrrr"),
        ]
    )


def _headline(size: Size, ran: RunCheck) -> list[str]:
    """What was run: never a cut model as if it were the whole."""
    lines = [f"\na real run of {describe_size(size)}, in a process of its own; the machine was "
             f"{ran.pace:.2f} times as slow as when calibrated, which the prediction takes in"]  # fmt: skip
    if size.cut:
        cut = dict.fromkeys(
            f"{c.field.rpartition('.')[2]} {c.whole:,} to {c.cut:,}" for c in size.cut
        )
        lines.append(
            f"the whole model does not fit here or takes too long; cut were {', '.join(cut)}"
        )
    return lines


def _untimed(ran: RunCheck) -> list[str]:
    if not ran.untimed:
        return []
    kernels = ", ".join(ran.untimed)
    return [
        f"the profile is of an earlier version and lacks {kernels}: too little is predicted; calibrate again"
    ]


def _part(difference: float, whole: float) -> str:
    return f"{100 * difference / whole:+.1f} %"
