"""The decoder that an `Arch` describes, in plain single-device PyTorch.

parts.py, rms_norm.py, rotary.py and attention.py hold the pieces, layer.py wires them,
experts/ are mixtures of experts, decoder.py stacks them, support.py says what is refused,
build.py initialises.
"""

from isoflop.model.build import build, initialise
from isoflop.model.decoder import Decoder

__all__ = ["Decoder", "build", "initialise"]
