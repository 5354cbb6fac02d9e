"""isoflop: write down a language model once, and know what it costs before you run it."""

__version__ = "0.1.0"
