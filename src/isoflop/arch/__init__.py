"""The spec of a model, and the ways to get one.

spec.py holds the `Arch`; families.py builds it from a family's few numbers; hf.py
reads and writes Hugging Face `config.json`; toml.py reads and writes our own spec
files; zoo.py holds the named models; load.py turns what a user typed into an `Arch`.
"""

from isoflop.arch.families import gpt, llama, palm
from isoflop.arch.spec import Arch, Attention, Dense, Experts, LatentAttention, Layer, Wiring

__all__ = [
    "Arch",
    "Attention",
    "Dense",
    "Experts",
    "LatentAttention",
    "Layer",
    "Wiring",
    "gpt",
    "llama",
    "palm",
]
