"""Figures of a ladder, as files. matplotlib only; no display is needed."""

from __future__ import annotations

from pathlib import Path

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from isoflop.quantity.units import format_count
from isoflop.report.style import COLOURS, HELD_OUT, STYLE
from isoflop.study.loop import Loop, Result

#: Axes that span less than this factor are easier to read straight.
LOGARITHMIC_FROM = 4


def draw(loop: Loop, folder: Path) -> list[Path]:
    """All figures of a loop, as PNG; returns their paths."""
    with mpl.rc_context(STYLE):
        figures = {
            "loss.png": _loss_figure(loop),
            "predicted-measured.png": _agreement_figure(loop),
        }
        for name, figure in figures.items():
            figure.savefig(folder / name)
    return [folder / name for name in figures]


def _loss_figure(loop: Loop) -> Figure:
    """Loss over tokens, a line per size, and the held-out run with its predicted interval."""
    figure = Figure(figsize=(7.2, 4.6), layout="constrained")
    axes = figure.add_subplot()
    sizes = sorted({r.rung.params for r in loop.results})
    for size, colour in zip(sizes, COLOURS, strict=False):
        rows = [r for r in loop.results if r.rung.params == size]
        _law_line(axes, loop, size, colour)
        axes.plot(*_points(rows), "o", color=colour, label=f"{format_count(size)} parameters")
    _held_out(axes, loop)
    axes.axhline(loop.baseline, color="#888", linestyle=":", linewidth=1)
    axes.annotate("order-2 Markov model", (0.01, loop.baseline), xycoords=("axes fraction", "data"),
                  ha="left", va="bottom", color="#666", fontsize=9)  # fmt: skip
    axes.set(xscale="log", xlabel="training tokens (bytes)", ylabel="validation loss (nats per byte)",
             title="A law fitted to small runs, and the run it never saw")  # fmt: skip
    _plain_ticks(axes.xaxis)
    axes.legend(frameon=False)
    return figure


def _plain_ticks(axis: Axis) -> None:
    """A logarithmic axis labelled as people write numbers: 200,000, 1 M."""
    axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.set_major_formatter(FuncFormatter(lambda value, _: format_count(value)))
    axis.set_minor_formatter(NullFormatter())


def _points(rows: list[Result]) -> tuple[list[int], list[float]]:
    return [r.rung.tokens for r in rows], [r.outcome.val_loss for r in rows]


def _law_line(axes: Axes, loop: Loop, params: int, colour: str) -> None:
    tokens = [r.rung.tokens for r in (*loop.results, loop.target)]
    span = np.geomspace(min(tokens) * 0.8, max(tokens) * 1.25, 100)
    axes.plot(
        span, [loop.law.law.loss(params, t) for t in span], color=colour, linewidth=1, alpha=0.7
    )


def _held_out(axes: Axes, loop: Loop) -> None:
    rung, loss = loop.target.rung, loop.loss
    _law_line(axes, loop, rung.params, HELD_OUT)
    if loss.low is not None and loss.high is not None:
        # A law's middle may lie outside the range of its resamples: no arm reaches back.
        reach = [[max(0.0, loss.predicted - loss.low)], [max(0.0, loss.high - loss.predicted)]]
        axes.errorbar([rung.tokens], [loss.predicted], yerr=reach, color=HELD_OUT, capsize=5,
                      fmt="_", label="predicted, 90 % interval")  # fmt: skip
    axes.plot([rung.tokens], [loss.measured], "*", color=HELD_OUT, markersize=13,
              label=f"held out: {format_count(rung.params)} parameters")  # fmt: skip


def _agreement_figure(loop: Loop) -> Figure:
    """Predicted against measured seconds and bytes of every run; the line is a perfect hit."""
    figure = Figure(figsize=(8.4, 4.2), layout="constrained")
    left, right = figure.subplots(1, 2)
    runs = (*loop.results, loop.target)
    _agreement(
        left, [(r.seconds.measured, r.seconds.predicted) for r in runs], "seconds of training", 1
    )
    memory = [(r.bytes_peak.measured, r.bytes_peak.predicted) for r in runs]
    _agreement(right, memory, "peak memory (MB)", 1e6)
    return figure


def _agreement(axes: Axes, pairs: list[tuple[float, float]], what: str, unit: float) -> None:
    measured, predicted = (np.array(x) / unit for x in zip(*pairs, strict=True))
    ends = np.array(
        [min(measured.min(), predicted.min()) * 0.8, max(measured.max(), predicted.max()) * 1.25]
    )
    axes.plot(ends, ends, color="#888", linewidth=1)
    axes.fill_between(
        ends, ends * 0.8, ends * 1.2, color="#888", alpha=0.15, linewidth=0, label="within 20 %"
    )
    axes.plot(measured[:-1], predicted[:-1], "o", color=COLOURS[0], label="rungs")
    axes.plot(measured[-1:], predicted[-1:], "*", color=HELD_OUT, markersize=13, label="held out")
    axes.set(xlabel="measured", ylabel="predicted", title=what)
    if ends[1] / ends[0] > LOGARITHMIC_FROM:
        axes.set(xscale="log", yscale="log")
        _plain_ticks(axes.xaxis)
        _plain_ticks(axes.yaxis)
    axes.legend(frameon=False, loc="upper left")
