"""The whole loop: calibrate, plan a ladder, predict, train, fit, predict, train, compare.

Every number that ends up in the report is derived, measured or fitted here, from the
values handed over; nothing is known beforehand.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeAlias

from isoflop.laws.fit import FitResult, Prediction, fit
from isoflop.study.ladder import BYTES_EVAL, SEQ_LEN, Ladder, Rung
from isoflop.study.launch import Outcome
from isoflop.train.data import read_corpus, validation_starts
from isoflop.train.markov import Markov
from isoflop.train.recipe import PYTHON_LIBRARY

#: Trains one rung and says what it measured.
Train: TypeAlias = Callable[[Rung], Outcome]

#: Resamples behind the law's intervals.
BOOTSTRAP = 400
#: Log-loss residuals are small and none is an outlier to be tamed: least squares.
DELTA = 1.0


@dataclass(frozen=True, slots=True)
class Compared:
    """A prediction beside what was measured."""

    predicted: float
    measured: float
    low: float | None = None
    high: float | None = None

    @property
    def error(self) -> float:
        """Relative and signed: above zero where too much was predicted."""
        return self.predicted / self.measured - 1

    @property
    def inside(self) -> bool | None:
        """Whether the measured value lies in the predicted interval; None without one."""
        if self.low is None or self.high is None:
            return None
        return self.low <= self.measured <= self.high

    def to_json(self) -> dict[str, Any]:
        return {
            "predicted": self.predicted,
            "measured": self.measured,
            "error": self.error,
            "low": self.low,
            "high": self.high,
            "inside": self.inside,
        }


@dataclass(frozen=True, slots=True)
class Result:
    """A run that was predicted and made."""

    rung: Rung
    outcome: Outcome
    seconds: Compared
    bytes_peak: Compared

    @classmethod
    def of(cls, rung: Rung, outcome: Outcome) -> Result:
        span = rung.seconds.interval
        seconds = Compared(float(rung.seconds.value), outcome.seconds)
        if span is not None:
            seconds = replace(seconds, low=span.low, high=span.high)
        return cls(
            rung, outcome, seconds, Compared(float(rung.bytes_peak.value), outcome.bytes_peak)
        )

    def to_json(self) -> dict[str, Any]:
        return {
            **self.rung.to_json(),
            "loss": self.outcome.val_loss,
            "seconds": self.seconds.to_json(),
            "bytes_peak": self.bytes_peak.to_json(),
            "run_dir": self.outcome.run_dir,
        }


@dataclass(frozen=True, slots=True)
class Loop:
    """Everything one ladder gave: its runs, the law, and the held-out run's fate."""

    results: tuple[Result, ...]
    law: FitResult
    prediction: Prediction
    target: Result
    baseline: float

    @property
    def loss(self) -> Compared:
        """The held-out run's loss against what the law said before it was made."""
        span = self.prediction.interval
        low, high = (span.low, span.high) if span else (None, None)
        return Compared(self.prediction.loss, self.target.outcome.val_loss, low, high)

    def to_json(self) -> dict[str, Any]:
        return {
            "rungs": [r.to_json() for r in self.results],
            "law": self.law.to_json(),
            "target": {**self.target.to_json(), "loss_predicted": self.loss.to_json()},
            "baseline_markov2": self.baseline,
            "beats_baseline": self.target.outcome.val_loss < self.baseline,
        }


def climb(ladder: Ladder, train: Train) -> tuple[Result, ...]:
    """Train every rung, smallest first."""
    return tuple(Result.of(rung, train(rung)) for rung in ladder.rungs)


def fit_ladder(results: tuple[Result, ...]) -> FitResult:
    """The law of the rungs; the held-out run is not among them."""
    fitted = fit(
        [r.rung.params for r in results],
        [r.rung.tokens for r in results],
        [r.outcome.val_loss for r in results],
        delta=DELTA,
        bootstrap=BOOTSTRAP,
    )
    return replace(fitted, law=replace(fitted.law, name="this ladder", params_convention="total"))


def summary(loop: Loop) -> Mapping[str, Compared]:
    """The three predictions of the held-out run."""
    return {
        "loss": loop.loss,
        "seconds": loop.target.seconds,
        "bytes_peak": loop.target.bytes_peak,
    }


def runs_csv(results: tuple[Result, ...], path: Path) -> None:
    """The rungs as a table that `isoflop fit` reads back."""
    lines = ["params,tokens,flops,loss"]
    lines += [
        f"{r.rung.params},{r.rung.tokens},{r.rung.flops},{r.outcome.val_loss!r}" for r in results
    ]
    path.write_text("\n".join(lines) + "\n")


def baseline(order: int = 2) -> float:
    """Nats per byte of a Markov model: same training bytes, same predicted validation bytes."""
    corpus = read_corpus(PYTHON_LIBRARY)
    starts = validation_starts(corpus, eval_bytes=BYTES_EVAL, seq_len=SEQ_LEN)
    nats = Markov.fit(corpus.train, order).nats(corpus.validation)
    predicted = [nats[start + 1 : start + 1 + SEQ_LEN] for start in starts]
    return float(sum(part.sum() for part in predicted) / (len(starts) * SEQ_LEN))
