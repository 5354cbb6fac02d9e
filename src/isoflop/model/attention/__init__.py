"""A layer's attention, by its spec; context.py is what a forward pass tells it, and continued.py
what one tells it that reads a cache.
"""

from isoflop.arch.spec import Attention, LatentAttention, RelativeProjection
from isoflop.model.attention.context import Context, Memory, contexts
from isoflop.model.attention.continued import Keys, continued_contexts, span_of
from isoflop.model.attention.grouped import AttentionModule, KeysValues, RelativeAttentionModule
from isoflop.model.attention.latent import LatentAttentionModule

__all__ = [
    "AttentionModule",
    "Context",
    "Keys",
    "KeysValues",
    "LatentAttentionModule",
    "Memory",
    "RelativeAttentionModule",
    "contexts",
    "continued_contexts",
    "make_attention",
    "span_of",
]


def make_attention(
    spec: Attention | LatentAttention, d_model: int, *, causal: bool = True
) -> AttentionModule | LatentAttentionModule:
    """The module of a layer's attention; its tokens see later ones unless `causal`."""
    match spec:
        case LatentAttention():
            return LatentAttentionModule(spec, d_model)
        case Attention(position=RelativeProjection()):
            return RelativeAttentionModule(spec, d_model)
        case Attention():
            return AttentionModule(spec, d_model, causal=causal)
