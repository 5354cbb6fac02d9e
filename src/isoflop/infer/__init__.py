"""From a model to text.

cache.py keeps what was read, read.py reads on with it or without, sample.py chooses a token from
logits, generate.py writes; tokens.py turns text to tokens and back, stops.py says where a text ends.
"""

from isoflop.infer.cache import Cache
from isoflop.infer.generate import Completion, Generation, Piece, Request, generate, pieces, stream
from isoflop.infer.read import Cached, Encoded, Recomputed
from isoflop.infer.sample import GREEDY, Sampling
from isoflop.infer.tokens import ByteTokenizer, FileTokenizer, Tokenizer

__all__ = [
    "GREEDY",
    "ByteTokenizer",
    "Cache",
    "Cached",
    "Completion",
    "Encoded",
    "FileTokenizer",
    "Generation",
    "Piece",
    "Recomputed",
    "Request",
    "Sampling",
    "Tokenizer",
    "generate",
    "pieces",
    "stream",
]
