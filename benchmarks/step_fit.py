"""Fit the uncertain numbers of a step to published steps, and judge the fit where it was not made.

python benchmarks/step_fit.py ROWS.csv            judge: in-sample, each source and chip left out
python benchmarks/step_fit.py ROWS.csv --write    also write src/isoflop/hardware/fitted.toml
"""

from __future__ import annotations

import random
import statistics
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from isoflop.check.calibrate_stack import calibrate_stack
from isoflop.check.published import read_rows
from isoflop.check.step_fit import Fitted, Problem, Row, fit
from isoflop.hardware.fitted import PRIORS, Beliefs
from isoflop.plan.step import step_time

FITTED = Path(__file__).parent.parent / "src/isoflop/hardware/fitted.toml"
#: 1.8 times the time of the same configuration in the next release.
LEFT_OUT = {"T0476"}
CALIBRATED_ON, DRAWS = 3, 5


def rows_of(path: Path) -> list[Row]:
    """Pretraining steps that a Setting can say."""
    return [
        Row(m.setting, m.measured_seconds, m.family)
        for m in read_rows(path)
        if m.setting is not None and m.measured_seconds is not None
        if m.kind == "pretrain" and m.row_id not in LEFT_OUT
        if "tpu" not in m.chip and m.setting.n_micro_batches
    ]


def line(name: str, rows: Sequence[Row], errors: Sequence[float], inside: Sequence[bool],
         widths: Sequence[float]) -> str:  # fmt: skip
    parts = []
    for sparse in (False, True):
        chosen = [abs(e) for r, e in zip(rows, errors, strict=True) if r.sparse is sparse]
        parts.append(f"{statistics.fmean(chosen):7.1%}" if chosen else f"{'-':>7s}")
    bias, held = statistics.fmean(errors), statistics.fmean(inside)
    return (f"| {name:18s} | {len(rows):4d} | {parts[0]} | {parts[1]} | {bias:+7.1%} | "
            f"{held:5.0%} | {statistics.median(widths):6.1%} |")  # fmt: skip


HEAD = ("| left out           | rows |   dense | experts |    bias | held |  width |\n"
        "|--------------------|-----:|--------:|--------:|--------:|-----:|-------:|")  # fmt: skip


def judged(rows: Sequence[Row], beliefs: Beliefs) -> Iterator[tuple[float, bool, float]]:
    """Error, whether the range held, and its half-width, per row."""
    for row in rows:
        node = step_time(row.setting, beliefs)
        value, range_ = float(node.value), node.interval
        assert range_ is not None
        width = (range_.high - range_.low) / 2 / value
        yield value / row.seconds - 1, row.seconds in range_, width


def leave_out(problem: Problem, key: Callable[[Row], str], name: str) -> None:
    print(f"\nEach {name} left out in turn:\n{HEAD}")
    everything: list[tuple[Row, float, bool, float]] = []
    for group in sorted({key(r) for r in problem.rows}):
        kept = [i for i, r in enumerate(problem.rows) if key(r) != group]
        out = [r for r in problem.rows if key(r) == group]
        beliefs = fit(problem, kept).beliefs
        found = [(r, *j) for r, j in zip(out, judged(out, beliefs), strict=True)]
        print(line(group, *zip(*found, strict=True)))
        everything += found
        if name == "source":
            calibrated(out, beliefs)
    print(line("all", *zip(*everything, strict=True)))


def calibrated(out: Sequence[Row], beliefs: Beliefs) -> None:
    """The same rows after three of their stack's own were read, in the mean of five draws."""
    by_stack: dict[str, list[Row]] = {}
    for row in out:
        by_stack.setdefault(row.setting.stack, []).append(row)
    found: list[tuple[Row, float, bool, float]] = []
    for stack, rows in by_stack.items():
        for draw in range(DRAWS if len(rows) > CALIBRATED_ON else 0):
            chosen = random.Random(f"{stack} {draw}").sample(range(len(rows)), CALIBRATED_ON)
            known = calibrate_stack([rows[i] for i in chosen], beliefs).beliefs
            rest = [r for i, r in enumerate(rows) if i not in chosen]
            for row in rest:
                error = float(step_time(row.setting, known).value) / row.seconds - 1
                found.append((row, error, True, 0.0))
    if found:
        rows, errors, *_ = zip(*found, strict=True)
        both = [
            [abs(e) for r, e in zip(rows, errors, strict=True) if r.sparse is sparse]
            for sparse in (False, True)
        ]
        texts = [f"{statistics.fmean(b):7.1%}" if b else f"{'-':>7s}" for b in both]
        print(
            f"| ..with 3 of its own | {'':3s} | {texts[0]} | {texts[1]} |         |      |        |"
        )


def table(problem: Problem, found: Fitted) -> None:
    print(
        "\n| number | prior | fitted | low | high | moved | told |\n|---|--:|--:|--:|--:|--:|--:|"
    )
    for name, moved in sorted(found.moved.items()):
        value, low, high = found.beliefs.posterior[name]
        prior = float(problem.priors[name].value)
        print(f"| {name} | {prior:.4g} | {value:.4g} | {low:.4g} | {high:.4g} | {moved:+.2f} | "
              f"{found.told[name]:.2f} |")  # fmt: skip


def write(beliefs: Beliefs) -> None:
    text = "# Written by benchmarks/step_fit.py: name = [value, low, high] at 90 %.\n[fitted]\n"
    for name, numbers in sorted(beliefs.posterior.items()):
        text += f"{name} = [{', '.join(f'{n:.5g}' for n in numbers)}]\n"
    FITTED.write_text(text)


def main() -> None:
    problem = Problem(rows_of(Path(sys.argv[1])), PRIORS)
    found = fit(problem)
    if "--write" in sys.argv:
        write(found.beliefs)
    table(problem, found)
    scored = list(judged(problem.rows, found.beliefs))
    print(f"\nIn-sample:\n{HEAD}\n{line('none', problem.rows, *zip(*scored, strict=True))}")
    leave_out(problem, lambda r: r.family, "source")
    leave_out(problem, lambda r: r.setting.cluster.chip.name, "chip")


if __name__ == "__main__":
    main()
