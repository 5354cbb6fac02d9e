"""The model that an `Arch` describes, in plain single-device PyTorch.


parts.py, rms_norm.py, rotary.py (with rope_scaling.py), relative_bias.py, attention/ and experts/
hold the pieces, layer.py wires them, decoder.py, encoder_decoder.py and vision.py stack them,
initial.py draws weights, support.py says what is refused.
"""

from isoflop.model.attention import KeysValues
from isoflop.model.build import build, build_decoder
from isoflop.model.decoder import Decoder
from isoflop.model.encoder_decoder import EncoderDecoder
from isoflop.model.initial import INITIAL, MaximalUpdate, Normal, initialise
from isoflop.model.vision import Images, VisionDecoder

__all__ = [
    "INITIAL",
    "Decoder",
    "EncoderDecoder",
    "Images",
    "KeysValues",
    "MaximalUpdate",
    "Normal",
    "VisionDecoder",
    "build",
    "build_decoder",
    "initialise",
]
