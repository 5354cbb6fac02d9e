"""Fit the uncertain numbers of a step to published steps, and judge the fit where it was not made.

python benchmarks/step_fit.py ROWS.csv            judge: in-sample, each source and chip left out
python benchmarks/step_fit.py ROWS.csv --write    also write src/isoflop/hardware/fitted.toml
                                                  and benchmarks/step_fit.md
"""

from __future__ import annotations

import io
import random
import statistics
import sys
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import redirect_stdout
from itertools import chain
from pathlib import Path

from isoflop.check.calibrate_stack import learn, may_move
from isoflop.check.published import read_rows
from isoflop.check.step_fit import Fitted, Problem, Row, fit
from isoflop.hardware.fitted import PRIORS, Beliefs, toml_of
from isoflop.hardware.stack import find_stack
from isoflop.plan.step.seconds import step_time

FITTED = Path(__file__).parent.parent / "src/isoflop/hardware/fitted.toml"
#: 1.8 times the time of the same configuration in the next release.
LEFT_OUT = {"T0476"}
#: Models of a source are left out in so many turns.
TURNS = 4
#: Own steps that a stack is calibrated on, each from another third by size, how often they are
#: drawn, and the fewest steps of a stack (of it on one chip) to do so.
CALIBRATED_ON, DRAWS, FEWEST = 3, 20, 6


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


def leave_out(problem: Problem, key: Callable[[Row], str], name: str) -> dict[str, Beliefs]:
    """Each group predicted by a fit to the others; the fits."""
    print(f"\n## Each {name} left out in turn\n\n{HEAD}")
    everything: list[tuple[Row, float, bool, float]] = []
    fits: dict[str, Beliefs] = {}
    for group in sorted({key(r) for r in problem.rows}):
        kept = [i for i, r in enumerate(problem.rows) if key(r) != group]
        out = [r for r in problem.rows if key(r) == group]
        fits[group] = fit(problem, kept).beliefs
        found = [(r, *j) for r, j in zip(out, judged(out, fits[group]), strict=True)]
        print(line(group, *zip(*found, strict=True)))
        everything += found
    print(line("all", *zip(*everything, strict=True)))
    return fits


KNOWN = (
    "\n## A known stack: models left out\n\nA quarter of each source's models left out in turn, so "
    "that others of its steps are known:\nwhat a range is worth for a trainer that was fitted."
    f"\n\n{HEAD}"
)


def known(problem: Problem) -> None:
    """Each source's rows, predicted by a fit to other models, its own among them."""
    print(KNOWN)
    turns: dict[tuple[str, str], int] = {}
    for row in problem.rows:
        taken = sum(family == row.family for family, _ in turns)
        turns.setdefault((row.family, row.setting.arch.name), taken % TURNS)
    fits = [
        fit(
            problem,
            [i for i, r in enumerate(problem.rows) if turns[r.family, r.setting.arch.name] != k],
        )
        for k in range(TURNS)
    ]
    everything: list[tuple[Row, float, bool, float]] = []
    for family in sorted({row.family for row in problem.rows}):
        out = [row for row in problem.rows if row.family == family]
        found = [(r, *j) for r in out
                 for j in judged([r], fits[turns[family, r.setting.arch.name]].beliefs)]  # fmt: skip
        print(line(family, *zip(*found, strict=True)))
        everything += found
    print(line("all", *zip(*everything, strict=True)))


OWN = (
    "\n## A source left out, then calibrated on three of its own steps\n\n"
    "One step from each third by accelerator-seconds, {draws} times drawn at random; the error is "
    "of\nthe stack's other steps: on all its chips, and where all were of one chip.\n\n"
    "| stack | chip | steps | sort | before | after | worst tenth of draws |\n"
    "|---|---|--:|---|--:|--:|--:|"
)


def calibrated(rows: Sequence[Row], fits: dict[str, Beliefs]) -> None:
    """Errors of a stack's other steps after three of its own."""
    print(OWN.format(draws=DRAWS))
    groups: dict[tuple[str, str, str], list[Row]] = defaultdict(list)
    for row in rows:
        stack = find_stack(row.setting.stack).residual.name.removeprefix("residual_")
        for chip in ("all", row.setting.cluster.chip.name):
            groups[row.family, stack, chip].append(row)
    overall: dict[tuple[str, bool], list[float]] = defaultdict(list)
    for (family, stack, chip), own in sorted(groups.items()):
        if len(own) < FEWEST:
            continue
        before, after = _with_three(own, fits[family], f"{stack} {chip}")
        for sparse in (False, True):
            if not before[sparse]:
                continue
            means = sorted(statistics.fmean(draw) for draw in after[sparse])
            worst = means[int(0.9 * len(means))]
            steps = sum(r.sparse is sparse for r in own)
            print(f"| {stack} | {chip} | {steps} | {'experts' if sparse else 'dense'} | "
                  f"{statistics.fmean(before[sparse]):.1%} | {statistics.fmean(means):.1%} | {worst:.1%} |")  # fmt: skip
            overall["all" if chip == "all" else "one", sparse] += chain.from_iterable(after[sparse])
    for (chips, sparse), errors in sorted(overall.items()):
        print(f"| all | {chips} | | {'experts' if sparse else 'dense'} | | {statistics.fmean(errors):.1%} | |")  # fmt: skip


def _with_three(own: Sequence[Row], beliefs: Beliefs, seed: str) -> tuple[
    dict[bool, list[float]], dict[bool, list[list[float]]]
]:  # fmt: skip
    """Sizes of the errors before, and of each draw after, dense and experts apart."""
    problem, everyone = Problem(own, beliefs, may_move), range(len(own))
    before = _sizes(problem, {}, everyone)
    after: dict[bool, list[list[float]]] = {False: [], True: []}
    by_size = sorted(everyone, key=lambda i: own[i].seconds * own[i].setting.cluster.count)
    thirds = [by_size[len(own) * k // 3 : len(own) * (k + 1) // 3] for k in range(CALIBRATED_ON)]
    for draw in range(DRAWS):
        drawn = random.Random(f"{seed} {draw}")
        chosen = [drawn.choice(third) for third in thirds]
        moved = learn(problem, chosen).moved
        rest = [i for i in everyone if i not in chosen]
        for sparse, errors in _sizes(problem, moved, rest).items():
            if errors:
                after[sparse].append(errors)
    return before, after


def _sizes(problem: Problem, moved: Mapping[str, float], which: Sequence[int]) -> dict[
    bool, list[float]
]:  # fmt: skip
    out: dict[bool, list[float]] = {False: [], True: []}
    for i, seconds in zip(which, problem.seconds(problem.values(moved), which), strict=True):
        out[problem.rows[i].sparse].append(abs(float(seconds) / problem.rows[i].seconds - 1))
    return out


def table(problem: Problem, found: Fitted) -> None:
    """Each number before and after; `moved` in deviations of its prior, `told` of its variance."""
    print(
        "\n## The numbers\n\n`moved`: by how many standard deviations of the prior; `told`: the "
        "share of the prior's\nvariance that the steps took away.\n\n"
        "| number | prior | fitted | low | high | moved | told |\n|---|--:|--:|--:|--:|--:|--:|"
    )
    for name, moved in sorted(found.moved.items()):
        value, low, high = found.beliefs.posterior[name]
        prior = float(problem.priors[name].value)
        print(f"| {name} | {prior:.4g} | {value:.4g} | {low:.4g} | {high:.4g} | {moved:+.2f} | "
              f"{found.told[name]:.2f} |")  # fmt: skip


def write(beliefs: Beliefs) -> None:
    head = "# Written by benchmarks/step_fit.py: name = [value, low, high] at 90 %.\n[fitted]\n"
    FITTED.write_text(head + toml_of(beliefs.posterior))


def report(problem: Problem, found: Fitted) -> None:
    """Everything as a page."""
    print(
        "# Seconds of a training step: fit and errors\n\n"
        f"Written by `make step-fit` over {len(problem.rows)} published steps. Errors are sizes of\n"
        "predicted / measured - 1 in the mean, dense models and mixtures of experts apart; `held` is\n"
        "how many measurements the 90 % ranges hold, `width` their median half-width."
    )
    scored = list(judged(problem.rows, found.beliefs))
    print(f"\n## In-sample\n\n{HEAD}\n{line('none', problem.rows, *zip(*scored, strict=True))}")
    fits = leave_out(problem, lambda r: r.family, "source")
    calibrated(problem.rows, fits)
    leave_out(problem, lambda r: r.setting.cluster.chip.name, "chip")
    known(problem)
    table(problem, found)


def main() -> None:
    problem = Problem(rows_of(Path(sys.argv[1])), PRIORS)
    found, page = fit(problem), io.StringIO()
    with redirect_stdout(page):
        report(problem, found)
    print(page.getvalue())
    if "--write" in sys.argv:
        write(found.beliefs)
        Path(__file__).with_suffix(".md").write_text(page.getvalue())


if __name__ == "__main__":
    main()
