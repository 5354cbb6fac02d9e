"""Fit a law to runs, and say what the fit does not know. Needs numpy.

`fit` returns a `FitResult`; its `law` is the light value that the rest of isoflop uses.
"""

from isoflop.laws.fit.result import Dropped, FitResult, Optimum, Prediction
from isoflop.laws.fit.solve import fit

__all__ = ["Dropped", "FitResult", "Optimum", "Prediction", "fit"]
