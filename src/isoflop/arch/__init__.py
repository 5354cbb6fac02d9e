"""The spec of a model, and the ways to get one.

spec/ holds the `Arch`; families/ builds it from a family's few numbers; hf/ reads and
writes Hugging Face `config.json`; toml.py reads and writes our own spec files; zoo.py
holds the named models; load.py turns what a user typed into an `Arch`. Below them:
foreign.py bounds what comes from outside, toml_boundary.py (pydantic) serves toml.py, and
hub.py alone reaches the network. The names of hf/ are loaded when they are first used: its
tables of thirty config types would be a tenth of the start of each command.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from isoflop.arch.families import gpt, llama, palm
from isoflop.arch.load import Loaded, load
from isoflop.arch.spec import Arch, Attention, Dense, Experts, LatentAttention, Layer, Wiring
from isoflop.arch.toml import parse_spec, read_spec, write_spec
from isoflop.arch.zoo import ZooEntry

if TYPE_CHECKING:
    from isoflop.arch.hf import Reading, from_hf, read_hf, to_hf

__all__ = [
    "Arch",
    "Attention",
    "Dense",
    "Experts",
    "LatentAttention",
    "Layer",
    "Loaded",
    "Reading",
    "Wiring",
    "ZooEntry",
    "from_hf",
    "gpt",
    "llama",
    "load",
    "palm",
    "parse_spec",
    "read_hf",
    "read_spec",
    "to_hf",
    "write_spec",
]


def __getattr__(name: str) -> Any:
    if name in ("Reading", "from_hf", "read_hf", "to_hf"):
        return getattr(import_module("isoflop.arch.hf"), name)
    raise AttributeError(f"module 'isoflop.arch' has no attribute {name!r}")
