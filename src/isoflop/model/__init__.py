"""The model that an `Arch` describes, in plain single-device PyTorch.

parts.py, rms_norm.py, rotary.py, relative_bias.py and attention.py hold the pieces, layer.py
wires them, decoder.py, encoder_decoder.py and vision.py stack them, support.py says what is refused,
build.py initialises.
"""

from isoflop.model.attention import KeysValues
from isoflop.model.build import build, build_decoder, initialise
from isoflop.model.decoder import Decoder
from isoflop.model.encoder_decoder import EncoderDecoder
from isoflop.model.vision import Images, VisionDecoder

__all__ = [
    "Decoder",
    "EncoderDecoder",
    "Images",
    "KeysValues",
    "VisionDecoder",
    "build",
    "build_decoder",
    "initialise",
]
