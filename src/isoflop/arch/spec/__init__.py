"""The spec of a language model: a frozen value that cannot be impossible.

An `Arch` is built of small frozen dataclasses. Where architectures differ in kind,
the field is a union (`Attention | LatentAttention`, `Dense | Experts`, `Rope | Alibi |
RelativeBias | None`), not a set of flags. Every constructor checks its rules and
raises `InputError` with all the problems it found; nothing is rounded or rewritten.

Letters, here and everywhere in isoflop (the scaling book's):
    B batch · T query tokens · S key tokens · D d_model · F d_ff · N n_heads ·
    K n_kv_heads · H d_head · V vocab_size · L n_layers · E n_experts · k experts per token

One file per noun; everything is imported from here.
"""

from isoflop.arch.spec.attention import (
    Attention,
    BlockSparse,
    Chunked,
    Full,
    LatentAttention,
    QkNorm,
    Span,
    Window,
)
from isoflop.arch.spec.ends import Embedding, Encoder, Head, Projector, VisionTower
from isoflop.arch.spec.feed_forward import Activation, Dense, Experts, FeedForward
from isoflop.arch.spec.layer import Layer, Wiring
from isoflop.arch.spec.norms import LayerNorm, Norm, RmsNorm
from isoflop.arch.spec.positions import (
    Alibi,
    DynamicScaling,
    Learned,
    LinearScaling,
    Llama3Scaling,
    LongRopeScaling,
    Position,
    RelativeBias,
    RelativeProjection,
    Rope,
    Rope2d,
    RopeScaling,
    Sinusoidal,
    YarnScaling,
)
from isoflop.arch.spec.whole import Arch

__all__ = [
    "Activation",
    "Alibi",
    "Arch",
    "Attention",
    "BlockSparse",
    "Chunked",
    "Dense",
    "DynamicScaling",
    "Embedding",
    "Encoder",
    "Experts",
    "FeedForward",
    "Full",
    "Head",
    "LatentAttention",
    "Layer",
    "LayerNorm",
    "Learned",
    "LinearScaling",
    "Llama3Scaling",
    "LongRopeScaling",
    "Norm",
    "Position",
    "Projector",
    "QkNorm",
    "RelativeBias",
    "RelativeProjection",
    "RmsNorm",
    "Rope",
    "Rope2d",
    "RopeScaling",
    "Sinusoidal",
    "Span",
    "VisionTower",
    "Window",
    "Wiring",
    "YarnScaling",
]
