"""Attention: one function, several backends.

dispatch.py holds `attention`; arguments.py checks a call into options.py's `Options`, which
every backend reads; choice.py says which backend runs and why. Backends: reference.py is the
oracle, blockwise.py (with tiles.py) runs in O(N) memory anywhere, sdpa.py, flex.py and
flash3.py call libraries, kernels/ is our own in Triton. multi_head.py and flash.py are the
textbook's calls.
"""

from isoflop.attention.choice import Backend, Choice, Refused
from isoflop.attention.dispatch import attention, explain_dispatch
from isoflop.attention.flash import flash_attention
from isoflop.attention.multi_head import multi_head_attention
from isoflop.attention.options import BlockMask, Sinks

__all__ = [
    "Backend",
    "BlockMask",
    "Choice",
    "Refused",
    "Sinks",
    "attention",
    "explain_dispatch",
    "flash_attention",
    "multi_head_attention",
]
