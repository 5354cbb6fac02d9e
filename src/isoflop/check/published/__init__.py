"""Predicted against published.

table.py reads a CSV file; shapes.py, machines.py and rates.py turn what publications say
into our models, machines and seconds; step.py makes a `Measured` of each row.
"""

from isoflop.check.published.step import Measured, read_rows

__all__ = ["Measured", "read_rows"]
