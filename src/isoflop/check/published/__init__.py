"""Predicted against published.

table.py reads a CSV file; shapes.py, machines.py and rates.py turn what publications say
into our models, machines and seconds; step.py makes a `Measured` of each step time, memory.py
and runs.py predict peaks and whole runs; predict.py holds the predictors of a step and how
they are refitted; score.py says how far predictions were off; judge.py puts it together.
measurements.csv ships with isoflop: published step times, each with its source.
"""

from isoflop.check.published.judge import Report, validate
from isoflop.check.published.score import Judged, Score
from isoflop.check.published.step import Measured, read_rows

__all__ = ["Judged", "Measured", "Report", "Score", "read_rows", "validate"]
