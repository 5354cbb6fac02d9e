"""How figures look."""

from __future__ import annotations

from typing import Any

STYLE: Any = {  # matplotlib types its keys one by one
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.alpha": 0.25,
    "figure.dpi": 150,
    "svg.fonttype": "none",
}
#: One colour per size, dark to light; the held-out run has its own.
COLOURS = ("#2b4c7e", "#3f8f8b", "#c08a2d", "#7a4f8a")
HELD_OUT = "#c0392b"
