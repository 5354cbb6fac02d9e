"""The decoder that an `Arch` describes, in plain single-device PyTorch.

parts.py, rms_norm.py, rotary.py (with rope_scaling.py), attention/ and experts/ hold the pieces,
layer.py wires them, decoder.py stacks them, initial.py draws weights, support.py says what is
refused.
"""

from isoflop.model.build import build
from isoflop.model.decoder import Decoder
from isoflop.model.initial import INITIAL, MaximalUpdate, Normal, initialise

__all__ = ["INITIAL", "Decoder", "MaximalUpdate", "Normal", "build", "initialise"]
