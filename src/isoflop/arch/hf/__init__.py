"""Hugging Face `config.json` to `Arch`, and back.

A `Family` (family.py) is a table of keys and what a table cannot say; gpt.py, parallel.py,
llama.py, gemma.py, moe.py, t5.py and vision.py hold the families, registry.py lists them.
read.py and write.py are the two ways; config.py is a foreign config while it is read,
rope.py the keys of rotary positions, words.py those of activations and of no effect.
"""

from isoflop.arch.hf.read import Reading, from_hf, read_hf
from isoflop.arch.hf.registry import FAMILIES
from isoflop.arch.hf.write import differences, to_hf

__all__ = ["FAMILIES", "Reading", "differences", "from_hf", "read_hf", "to_hf"]
