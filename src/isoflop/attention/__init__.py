"""Attention: one function, several backends.

dispatch.py holds `attention` and says which backend runs and why; reference.py is the
oracle, sdpa.py PyTorch's fused kernels; multi_head.py is the textbook's call on
[batch, tokens, width] tensors.
"""

from isoflop.attention.dispatch import Backend, Choice, attention, choose_backend
from isoflop.attention.multi_head import multi_head_attention

__all__ = ["Backend", "Choice", "attention", "choose_backend", "multi_head_attention"]
