"""isoflop demo: the whole loop on this machine."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from cyclopts import Parameter

from isoflop.cli.options import Count, Json, Real
from isoflop.cli.output import SCHEMA, emit, note, say
from isoflop.cli.progress import bar
from isoflop.errors import InputError, Problem
from isoflop.quantity.units import format_bytes, format_count, format_exact, format_seconds
from isoflop.report.text import table

if TYPE_CHECKING:
    from isoflop.hardware.profile import Profile
    from isoflop.study.ladder import Ladder, Rung
    from isoflop.study.loop import Loop, Result

#: Shares of the demo's time: calibration, and the training of all runs. The rest is
#: imports, evaluation, fits, figures, and room for a machine that is busier than it was.
SHARE_CALIBRATE, SHARE_TRAIN = 0.12, 0.5
#: Kept for the held-out run's evaluation, the baseline and the figures.
SECONDS_END = 12.0
MINUTES_LEAST = 0.5


def demo(
    *,
    output: Annotated[Path, Parameter(name=["--output", "-o"])] = Path("demo-out"),
    minutes: Real = 4.0,
    threads: Count | None = None,
    as_json: Json = False,
) -> None:
    """The whole loop on this machine, in minutes.

    Parameters
    ----------
    output
        A directory for runs, figures and numbers; made anew, so it must not exist or be
        an earlier demo's.
    minutes
        How long it may take; longer ladders say more.
    threads
        CPU threads; 2, or 1 where no two cores are idle, when not given.
    """
    from isoflop.check.measure import n_cores

    n_threads = threads_for(n_cores()) if threads is None else threads
    bad = []
    if minutes < MINUTES_LEAST:
        bad.append(Problem("--minutes", minutes, f"is at least {MINUTES_LEAST}"))
    if not 1 <= n_threads <= n_cores():
        bad.append(Problem("--threads", n_threads, f"is 1 to {n_cores()}, the cores there are"))
    if bad:
        raise InputError("demo", bad)
    story = Story(prepare(output), minutes * 60, n_threads, note if as_json else say)
    data = story.tell()
    if as_json:
        emit("demo", data)


def threads_for(n_cores: int) -> int:
    """Two, where two cores have nothing else to do.

    On a busy machine two threads wait for each other, and spin while they do: with 8 processes on
    4 cores runs took 5 to 10 times as long as alone, where one thread takes twice.
    """
    idle = n_cores - os.getloadavg()[0]
    return min(2, max(1, round(idle)))


def prepare(output: Path) -> Path:
    """An empty directory; an earlier demo's content is replaced, anything else refused."""
    import shutil

    report = output / "demo.json"
    try:
        if not _is_free(output):
            rule = "is a new directory, or one that an earlier demo wrote"
            problem = Problem("--output", str(output), rule, "choose another with -o")
            raise InputError("demo", [problem])
        if output.exists():
            shutil.rmtree(output)
        output.mkdir(parents=True)
        # Written first, so that a demo that was broken off can be run again in its place.
        report.write_text(json.dumps({"schema": SCHEMA, "command": "demo"}) + "\n")
    except OSError as error:
        problem = Problem("--output", str(output), "can be made", error.strerror or "")
        raise InputError("demo", [problem]) from None
    return output


def _is_free(output: Path) -> bool:
    """Whether nothing of anybody else's stands there."""
    if not output.exists():
        return True
    return output.is_dir() and ((output / "demo.json").exists() or not any(output.iterdir()))


@dataclass
class Story:
    """One demo: each chapter says what it does, does it, and hands its value on."""

    folder: Path
    seconds: float
    threads: int
    told: Callable[[str], None]

    def __post_init__(self) -> None:
        self.began = time.monotonic()

    def tell(self) -> dict[str, Any]:
        gpt3 = self.price_gpt3()
        profile = self.calibrate()
        ladder = self.plan(profile)
        loop = self.climb(ladder)
        figures = self.compare(loop)
        data = {
            "directory": str(self.folder),
            "machine": asdict(profile.machine),
            "seconds_total": time.monotonic() - self.began,
            "gpt3": gpt3,
            **loop.to_json(),
            "figures": figures,
        }
        whole = {"schema": SCHEMA, "command": "demo", **data}
        (self.folder / "demo.json").write_text(json.dumps(whole, indent=2, allow_nan=False) + "\n")
        self.told(
            f"\nall of it in {format_seconds(data['seconds_total'])}; numbers, runs and figures: {self.folder}/"
        )
        return data

    def chapter(self, number: int, title: str) -> None:
        self.told(f"\n{number}. {title}\n")

    def price_gpt3(self) -> dict[str, Any]:
        """What GPT-3 costs to train and to serve, and why."""
        from isoflop.arch import zoo
        from isoflop.cli.plan_serve import render_serve
        from isoflop.cli.plan_train import render_train
        from isoflop.hardware import parse_cluster
        from isoflop.plan import plan_serve, plan_train

        self.chapter(1, "GPT-3, from its spec alone")
        arch = zoo.entry("gpt3-175b").arch
        train = plan_train(
            arch, 300 * 10**9, parse_cluster("1024xa100-sxm-80gb"), seq_len=2048, global_batch=1536
        )
        serve = plan_serve(
            arch, parse_cluster("8xa100-sxm-80gb"), input_tokens=1024, output_tokens=256, batch=1
        )
        self.told(render_train(train))
        self.told("\n" + render_serve(serve))
        return {"train": train.to_json(), "serve": serve.to_json()}

    def calibrate(self) -> Profile:
        """Measure this machine's kernels; no model is known to the measurement."""
        from isoflop.cli.check import describe_profile, measure

        self.chapter(2, f"This machine, measured with {self.threads} threads")
        budget = SHARE_CALIBRATE * self.seconds
        profile = measure(self.threads, budget)
        (self.folder / "profile.json").write_text(json.dumps(profile.to_json(), indent=1) + "\n")
        self.told(describe_profile(profile))
        return profile

    def plan(self, profile: Profile) -> Ladder:
        """The longest ladder that fits the time, each run predicted before it is made."""
        from isoflop.plan.cost import step_cost
        from isoflop.plan.memory.peak import peak_memory
        from isoflop.study.ladder import plan_ladder

        self.chapter(3, "A ladder of small models, predicted")
        ladder = plan_ladder(
            SHARE_TRAIN * self.seconds,
            self.threads,
            lambda arch, work: step_cost(arch, work, profile),
            lambda arch, work: peak_memory(arch, work, profile),
        )
        rows = [
            [
                f"  {r.name}",
                format_exact(r.params),
                format_count(r.tokens),
                format_seconds(r.seconds.value),
                format_bytes(r.bytes_peak.value),
            ]
            for r in (*ladder.rungs, ladder.target)
        ]
        self.told(
            table(rows, ["  run", "params", "tokens", "predicted time", "peak memory"], "lrrrr")
        )
        self.told(
            f"\n  the last one is held out: it is predicted before it is trained ({format_seconds(ladder.seconds)} in all)"
        )
        return ladder

    def climb(self, ladder: Ladder) -> Loop:
        """Train the rungs, fit their law, predict the held-out run, train it."""
        from isoflop.study import launch
        from isoflop.study.loop import Loop, Result, baseline, climb, fit_ladder, runs_csv

        def train(rung: Any) -> Any:
            with bar(f"training {rung.name}", rung.recipe.steps) as advance:
                return launch.run(
                    rung,
                    self.folder / "runs" / rung.name,
                    on_progress=lambda step, _, loss: advance(step, f"loss {loss:.3f}"),
                )

        self.chapter(4, "The runs, measured")
        results = climb(ladder, train)
        runs_csv(results, self.folder / "runs.csv")
        self.told(
            table(
                [self._row(r) for r in results],
                ["  run", "loss", "time", "miss", "memory", "miss"],
                "lrrrrr",
            )
        )
        self.chapter(5, "The law these runs give, and its word on the held-out run")
        law = fit_ladder(results)
        target = self.keep_time(ladder, results)
        prediction = law.predict(target.params, target.tokens)
        from isoflop.cli.laws import render_fit

        self.told(render_fit(law, [prediction]))
        outcome = train(target)
        return Loop(results, law, prediction, Result.of(target, outcome), baseline())

    def keep_time(self, ladder: Ladder, results: tuple[Result, ...]) -> Rung:
        """The held-out run, cut where the machine has become too slow for it."""
        from isoflop.study.ladder import shorten

        target = ladder.target
        slowness = sum(r.seconds.measured for r in results) / sum(
            r.seconds.predicted for r in results
        )
        left = self.seconds - (time.monotonic() - self.began) - SECONDS_END
        needed = float(target.seconds.value) * max(1.0, slowness)
        longest = max(r.recipe.steps for r in ladder.rungs)
        steps = max(longest, int(target.recipe.steps * left / needed))
        if steps >= target.recipe.steps:
            return target
        cut = shorten(target, steps)
        self.told(
            f"  the runs took {slowness:.2f} times what was predicted: to keep the time, the "
            f"held-out run gets {format_count(cut.tokens)} tokens, not {format_count(target.tokens)}\n"
        )
        return cut

    def _row(self, r: Result) -> list[str]:
        return [
            f"  {r.rung.name}",
            f"{r.outcome.val_loss:.4f}",
            format_seconds(r.seconds.measured),
            f"{100 * r.seconds.error:+.0f} %",
            format_bytes(r.bytes_peak.measured),
            f"{100 * r.bytes_peak.error:+.0f} %",
        ]

    def compare(self, loop: Loop) -> list[str]:
        """Predicted against measured for the run that was held out; figures of all."""
        from isoflop.report.figures import draw

        self.chapter(6, f"The held-out run {loop.target.rung.name}: predicted against measured")
        rows = [
            ["  loss, nats per byte", f"{loop.loss.predicted:.4f}", f"{loop.loss.measured:.4f}",
             f"{100 * loop.loss.error:+.1f} %", _verdict(loop.loss.inside)],
            ["  time", format_seconds(loop.target.seconds.predicted), format_seconds(loop.target.seconds.measured),
             f"{100 * loop.target.seconds.error:+.1f} %", _verdict(loop.target.seconds.inside)],
            ["  peak memory", format_bytes(loop.target.bytes_peak.predicted),
             format_bytes(loop.target.bytes_peak.measured), f"{100 * loop.target.bytes_peak.error:+.1f} %", ""],
        ]  # fmt: skip
        self.told(table(rows, ["", "predicted", "measured", "miss", "90 % interval"], "lrrrl"))
        below = loop.target.outcome.val_loss < loop.baseline
        self.told(
            f"\n  an order-2 Markov model of the same bytes reaches {loop.baseline:.4f}: "
            f"the trained model is {'below' if below else 'NOT below'} it"
        )
        return [path.name for path in draw(loop, self.folder)]


def _verdict(inside: bool | None) -> str:
    return {True: "measured lies inside", False: "measured lies OUTSIDE", None: ""}[inside]
