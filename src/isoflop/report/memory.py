"""A step's memory as a figure: a panel for each rank, time from left to right."""

from __future__ import annotations

from pathlib import Path

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from isoflop.plan.memory.pipeline import Held, PipelineMemory, without_gaps
from isoflop.quantity.units import format_bytes
from isoflop.report.style import COLOURS, HELD_OUT, STYLE

#: What a panel stacks, from the bottom: its label, colour and parts.
LAYERS = (
    ("weights, gradients, optimizer", COLOURS[0],
     ("bytes_weights", "bytes_grads", "bytes_optimizer", "bytes_gathered")),
    ("software", "#9aa5b1", ("bytes_overhead",)),
    ("activations", COLOURS[2], ("bytes_activations",)),
)  # fmt: skip
GB = 1e9


def draw_memory(memory: PipelineMemory, title: str, path: Path) -> None:
    """One panel for each rank, as SVG or PNG by the file's name."""
    ranks = len(memory.ranks)
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(8.4, 1.1 + 1.1 * ranks), layout="constrained")
        panels = figure.subplots(ranks, 1, sharex=True, sharey=True, squeeze=False)[:, 0]
        for rank, axes in enumerate(panels):
            _panel(axes, memory.ranks[rank], float(memory.bytes_available))
            axes.set_ylabel(f"rank {rank}\nGB")
        _peak(panels[memory.peak[0]], memory.peak[1])
        panels[-1].set(xlabel="time, in forwards of one micro-batch on one stage",
                       xlim=(0, float(memory.end)), ylim=(0, None))  # fmt: skip
        figure.suptitle(title)
        handles, labels = panels[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=4, frameon=False)
        figure.savefig(path)


def _panel(axes: Axes, row: tuple[Held, ...], available: float) -> None:
    row = without_gaps(row)
    times = [float(held.start) for held in row] + [float(row[-1].end)]
    below = [0.0] * len(times)
    for label, colour, names in LAYERS:
        sizes = [sum(float(size) for name, size in held.moment.parts if name in names) / GB
                 for held in row]  # fmt: skip
        above = [base + size for base, size in zip(below, [*sizes, sizes[-1]], strict=True)]
        axes.fill_between(times, below, above, step="post", color=colour, linewidth=0, label=label)
        below = above
    axes.axhline(available / GB, color=HELD_OUT, linestyle="--", linewidth=1,
                 label="the accelerator's memory")  # fmt: skip


def _peak(axes: Axes, held: Held) -> None:
    at = (float(held.start + held.end) / 2, float(held.moment.bytes) / GB)
    axes.plot(*at, "v", color=HELD_OUT, markersize=6)
    text = f"most: {format_bytes(held.moment.bytes)} at {held.moment.when}"
    axes.annotate(text, at, xytext=(6, 3), textcoords="offset points", fontsize=9, color=HELD_OUT)
