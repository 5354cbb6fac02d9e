"""A table of published measurements judged: errors by source and by chip, beside baselines.

Of step times the error that counts is on sources that a predictor's constants were not
chosen on: each source is left out in turn and predicted by a refit to the others.
"""

from __future__ import annotations

import statistics
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from importlib.resources import as_file, files
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal, TypeAlias

from isoflop.arch import Experts
from isoflop.check.published.memory import judge_memory
from isoflop.check.published.missing import Lacking, lacking
from isoflop.check.published.predict import (
    PREDICT,
    REFIT,
    Predictor,
    Refit,
    at_peak,
    best_constant,
    constant,
)
from isoflop.check.published.runs import judge_runs
from isoflop.check.published.score import Judged, Score, score, scores
from isoflop.check.published.step import Measured, measured_rows
from isoflop.check.published.table import Form, Table, read_table
from isoflop.check.published.width import Part, width_from
from isoflop.check.step_formula import Predicted
from isoflop.errors import InputError
from isoflop.plan.step.setting import Setting

#: How rows were predicted. as shipped: by the predictor as it is. in-sample: its constants
#: refitted to the very rows. source or chip left out: refitted to the other sources or chips. model
#: left out: to other models, so that most stacks are known by others of their steps.
Method: TypeAlias = Literal[
    "as shipped", "in-sample", "source left out", "chip left out", "model left out"
]
#: Models of a source are left out in so many turns.
TURNS = 4


@dataclass(frozen=True, slots=True)
class Noise:
    """How far one configuration differs between neighbouring releases: no model can do better."""

    name: str
    n_configurations: int
    n_pairs: int
    median: float
    mean: float

    def to_json(self) -> dict[str, Any]:
        return {"name": self.name, "n_configurations": self.n_configurations,
                "n_pairs": self.n_pairs, "median": self.median, "mean": self.mean}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Report:
    """`rows`, `families`, `chips` and `overall` are by the method `headline`."""

    source: str
    form: Form
    headline: Method
    rows: tuple[Judged, ...]
    methods: dict[Method, Score]
    stacks: tuple[Score, ...] = ()
    baselines: tuple[Score, ...] = ()
    noise_floor: tuple[Noise, ...] = ()
    assumed: tuple[tuple[str, int], ...] = ()

    @property
    def families(self) -> tuple[Score, ...]:
        return scores(self.rows, lambda r: r.family)

    @property
    def width_from(self) -> dict[str, tuple[Part, ...]]:
        """Which numbers the ranges come from, by family."""
        names = dict.fromkeys(r.family for r in self.rows)
        return {name: width_from([r for r in self.rows if r.family == name]) for name in names}

    @property
    def lacking(self) -> dict[str, Lacking]:
        """What is missing, by family."""
        names = dict.fromkeys(r.family for r in self.rows)
        return {name: lacking([r for r in self.rows if r.family == name]) for name in names}

    @property
    def chips(self) -> tuple[Score, ...]:
        return scores([r for r in self.rows if r.error is not None], lambda r: r.group)

    @property
    def overall(self) -> Score:
        return self.methods[self.headline]

    def _family(self, found: Score) -> dict[str, Any]:
        width = [part.to_json() for part in self.width_from[found.name]]
        return {**found.to_json(), **self.lacking[found.name].to_json(), "width_from": width}

    def to_json(self) -> dict[str, Any]:
        return {
            "source": self.source,
            "kind": self.form,
            "headline": self.headline,
            "rows": [r.to_json() for r in self.rows],
            "families": [self._family(s) for s in self.families],
            "chips": [s.to_json() for s in self.chips],
            "overall": self.overall.to_json(),
            "stacks": [s.to_json() for s in self.stacks],
            "methods": [s.to_json() for s in self.methods.values()],
            "baselines": [s.to_json() for s in self.baselines],
            "noise_floor": [n.to_json() for n in self.noise_floor],
            "assumed": [{"what": what, "rows": n} for what, n in self.assumed],
        }


def validate(
    path: str | Path | None = None, *, predict: Predictor = PREDICT, refit: Refit = REFIT
) -> Report:
    """Judge the rows of a file, or the measurements that isoflop ships with.

    The file's kind is told by its header: step times, memory, or whole runs.

    Raises:
        InputError: the file or cells of it cannot be read.
    """
    if path is None:
        with as_file(files("isoflop.check.published").joinpath("measurements.csv")) as shipped:
            table = replace(read_table(shipped), name="the measurements that isoflop ships with")
        return judge_steps(table, predict, refit, headline="source left out")
    table = read_table(path)
    match table.form:
        case "step":
            return judge_steps(table, predict, refit, headline="as shipped")
        case "memory":
            return _as_shipped(table, judge_memory(table))
        case "run":
            runs = judge_runs(table)
            return _as_shipped(table, runs.rows, runs.assumed)


def _as_shipped(table: Table, rows: tuple[Judged, ...], assumed: Sequence[str] = ()) -> Report:
    return Report(
        table.name, table.form, "as shipped", rows, {"as shipped": score("as shipped", rows)},
        assumed=tuple(Counter(assumed).most_common()),
    )  # fmt: skip


def judge_steps(table: Table, predict: Predictor, refit: Refit, headline: Method) -> Report:
    """Every row by every method, the baselines, and how well any model could do."""
    rows = measured_rows(table)
    by_method: dict[Method, tuple[Judged, ...]] = {"as shipped": judged(rows, lambda _: predict)}
    kept = usable(rows)
    if kept:
        fitted = refit(kept)
        by_method["in-sample"] = judged(rows, lambda _: fitted)
        by_method["source left out"] = left_out(rows, refit, lambda r: r.family)
        by_method["chip left out"] = left_out(rows, refit, lambda r: r.chip)
        turns = turns_of(rows)
        by_method["model left out"] = left_out(rows, refit, lambda r: turns[r.family, model_of(r)])
    return Report(
        source=table.name,
        form="step",
        headline=headline if headline in by_method else "as shipped",
        rows=by_method.get(headline, by_method["as shipped"]),
        methods={method: score(method, found) for method, found in by_method.items()},
        stacks=tuple(by_stack(by_method)),
        baselines=tuple(baselines(rows)),
        noise_floor=tuple(noise_floor(kept)),
        assumed=tuple(Counter(a for r in kept for a in r.assumptions).most_common()),
    )


def usable(rows: Sequence[Measured]) -> tuple[Measured, ...]:
    """Rows with a setting and a time."""
    return tuple(r for r in rows if r.setting is not None and r.measured_seconds is not None)


def judged(
    rows: Sequence[Measured], predictor: Callable[[Measured], Predictor | None]
) -> tuple[Judged, ...]:
    """Each row beside the prediction of the predictor that is chosen for it."""
    return tuple(judge(row, predictor(row)) for row in rows)


def judge(row: Measured, predictor: Predictor | None) -> Judged:
    """One row; a reason in place of a prediction where there can be none."""
    setting = row.setting
    group = row.chip if setting is None else f"{row.chip} {setting.compute}"
    sort = "" if setting is None else _sort(setting)
    found = Judged(row.row_id, row.family, group, row.model, "seconds", row.measured_seconds,
                   skipped=row.skipped, sort=sort)  # fmt: skip
    if setting is None or row.measured_seconds is None:
        return found
    if predictor is None:
        return replace(found, skipped="no other source to fit to")
    try:
        node = predictor(setting)
    except InputError as error:
        return replace(found, skipped=str(error.problems[0]))
    found = replace(found, predicted=float(node.value))
    if isinstance(node, Predicted):
        found = replace(found, widths=node.widths, known=node.known)
    span = node.interval
    return found if span is None else replace(found, low=span.low, high=span.high)


def left_out(
    rows: Sequence[Measured], refit: Refit, key: Callable[[Measured], str]
) -> tuple[Judged, ...]:
    """Each row predicted by a refit to the rows whose `key` is another."""
    kept = usable(rows)
    others = {name: [r for r in kept if key(r) != name] for name in dict.fromkeys(map(key, kept))}
    fitted = {name: refit(rest) for name, rest in others.items() if rest}
    return judged(rows, lambda row: fitted.get(key(row)))


def model_of(row: Measured) -> str:
    """A row's model without remarks on how it was run."""
    return row.model.partition(" (")[0]


def turns_of(rows: Sequence[Measured]) -> dict[tuple[str, str], str]:
    """In which turn a source's model is left out: one after the other, in order of appearance."""
    models: dict[str, dict[str, None]] = defaultdict(dict)
    for row in rows:
        models[row.family][model_of(row)] = None
    return {(f, m): str(i % TURNS) for f, own in models.items() for i, m in enumerate(own)}


def by_stack(by_method: dict[Method, tuple[Judged, ...]]) -> Iterator[Score]:
    """Scores where the trainer's software was known by other steps of its own, and where not."""
    ways: tuple[tuple[str, Method, bool], ...] = (
        ("known", "model left out", True),
        ("unknown", "source left out", False),
    )
    for name, method, known in ways:
        found = [r for r in by_method.get(method, ()) if r.known is known]
        if found:
            yield score(f"stack {name}, {method}", found)


def baselines(rows: Sequence[Measured]) -> Iterator[Score]:
    """What no model of the step at all would reach."""
    for share in (0.4, 0.5):
        flat = constant(share)
        yield score(f"{share:g} of peak for every row", judged(rows, lambda _, flat=flat: flat))  # type: ignore[misc]
    if kept := usable(rows):
        best = best_constant(kept, at_peak)
        name = "best share of peak per chip and format"
        yield score(f"{name}, in-sample", judged(rows, lambda _: best))
        refit = partial(best_constant, ideal=at_peak)
        yield score(f"{name}, source left out", left_out(rows, refit, lambda r: r.family))


def noise_floor(rows: Sequence[Measured]) -> Iterator[Noise]:
    """Differences of neighbouring releases at everything else equal, dense and experts apart."""
    groups: dict[Any, list[Measured]] = defaultdict(list)
    for row in rows:
        assert row.setting is not None
        groups[row.model, row.kind, replace(row.setting, stack="")].append(row)
    found: dict[str, list[list[float]]] = defaultdict(list)
    for (_, _, setting), group in groups.items():
        if len(group) > 1:
            found[_sort(setting)].append(list(_differences(group)))
    for name, each in sorted(found.items()):
        pairs = [d for differences in each for d in differences]
        yield Noise(name, len(each), len(pairs), statistics.median(pairs), statistics.fmean(pairs))


def _differences(group: Sequence[Measured]) -> Iterator[float]:
    ordered = sorted(group, key=lambda r: r.setting.stack if r.setting else "")
    for a, b in pairwise(r.measured_seconds for r in ordered):
        assert a is not None
        assert b is not None
        yield abs(a / b - 1)


def _sort(setting: Setting) -> str:
    layers = setting.arch.kinds.values()
    return "experts" if any(isinstance(x.feed_forward, Experts) for x in layers) else "dense"
