"""Hugging Face folders of safetensors, in and out.

A family is one table (table.py, tables/) of names and changes of layout (change.py) that
serves both ways. folder.py and header.py say what is in a folder and refuse what cannot be
trusted; read.py fills a model from it, write.py writes one. Nothing is ever unpickled.
"""

from isoflop.model.weights.read import Weights, load_model, read_weights
from isoflop.model.weights.write import save_model

__all__ = ["Weights", "load_model", "read_weights", "save_model"]
