"""The small parts of a decoder: norms, positions, embedding, feed-forward, head.

Letters: B batch · T tokens · D d_model · E d_embed · F d_ff · V rows of the vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from isoflop.arch.spec import Activation, Arch, Dense, Head, LayerNorm, Learned, Norm, RmsNorm
from isoflop.model.rms_norm import rms_norm

ACTIVATIONS: dict[Activation, Callable[[Tensor], Tensor]] = {
    "relu": F.relu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "gelu_quick": lambda x: x * torch.sigmoid(1.702 * x),
    "silu": F.silu,
    "relu_squared": lambda x: F.relu(x).square(),
}


class Linear(nn.Linear):
    """A linear map whose weights wait for `build` to draw them."""

    def reset_parameters(self) -> None:
        """Draw nothing: weights are drawn once, by name, in build.py."""


def product_dtype(x: Tensor) -> torch.dtype:
    """What a product of x is computed in: autocast knows PyTorch's own products only."""
    device = x.device.type
    if torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device):
        return torch.get_autocast_dtype(device)
    return x.dtype


class TokenVectors(nn.Embedding):
    """A table of vectors that waits for `build` to draw it."""

    def reset_parameters(self) -> None:
        """Draw nothing: weights are drawn once, by name, in build.py."""


def make_norm(norm: Norm | None, *shape: int) -> nn.Module:
    """The module of a spec's norm over the last axis of `shape`; no norm passes its input on.

    More axes have vectors of their own: [N, H] is a norm of each of N heads.
    """
    match norm:
        case None:
            return nn.Identity()
        case LayerNorm():
            return LayerNormModule(norm, *shape)
        case RmsNorm():
            return RmsNormModule(norm, *shape)


class LayerNormModule(nn.Module):
    """Mean and variance removed; weight and bias where the spec trains them."""

    def __init__(self, norm: LayerNorm, *shape: int) -> None:
        super().__init__()
        self.eps = norm.eps
        self.weight = nn.Parameter(torch.empty(shape)) if norm.weight else None
        self.bias = nn.Parameter(torch.empty(shape)) if norm.bias else None

    def forward(self, x_BTD: Tensor) -> Tensor:
        vectors = [x for x in (self.weight, self.bias) if x is not None]
        if all(x.dim() == 1 for x in vectors):
            return F.layer_norm(x_BTD, x_BTD.shape[-1:], self.weight, self.bias, self.eps)
        x_BTD = F.layer_norm(x_BTD, x_BTD.shape[-1:], eps=self.eps)
        x_BTD = x_BTD if self.weight is None else x_BTD * self.weight
        return x_BTD if self.bias is None else x_BTD + self.bias


class RmsNormModule(nn.Module):
    """Root mean square removed; with `unit_offset` the stored weight is 1 less than used."""

    def __init__(self, norm: RmsNorm, *shape: int) -> None:
        super().__init__()
        self.eps = norm.eps
        self.unit_offset = norm.unit_offset
        self.weight = nn.Parameter(torch.empty(shape))

    def forward(self, x_BTD: Tensor) -> Tensor:
        weight = self.weight + 1 if self.unit_offset else self.weight
        if weight.dim() == 1:
            return rms_norm(x_BTD, weight, self.eps)
        return rms_norm(x_BTD, torch.ones_like(weight[0]), self.eps) * weight


class EmbeddingModule(nn.Module):
    """Token ids to vectors: looked up, scaled, projected, placed, normed, dropped out."""

    def __init__(self, arch: Arch) -> None:
        super().__init__()
        spec = arch.embedding
        width = spec.d_embed or arch.d_model
        self.scale = spec.scale
        self.dropout = spec.dropout
        self.tokens = TokenVectors(spec.n_rows, width)
        if width != arch.d_model:
            self.project: nn.Module = Linear(width, arch.d_model, bias=False)
        else:
            self.project = nn.Identity()
        self.positions = _make_positions(arch)
        self.norm = make_norm(spec.norm, arch.d_model)

    def forward(self, tokens_BT: Tensor, positions: Tensor) -> Tensor:
        """[B, T, D]; positions are [T], or [B, T] where each text has its own."""
        x_BTE: Tensor = self.tokens(tokens_BT)
        if self.scale != 1.0:
            x_BTE = x_BTE * self.scale
        x_BTD: Tensor = self.project(x_BTE)
        if self.positions is not None:
            x_BTD = x_BTD + self.positions(positions).to(x_BTD.dtype)
        x_BTD = self.norm(x_BTD)
        return F.dropout(x_BTD, self.dropout, self.training)


def _make_positions(arch: Arch) -> nn.Module | None:
    match arch.embedding.position:
        case None:
            return None
        case Learned() as learned:
            return LearnedPositions(learned, arch.d_model)
        case _:
            return SinusoidalPositions(arch.d_model)


class LearnedPositions(nn.Module):
    """A trained vector per position."""

    def __init__(self, learned: Learned, width: int) -> None:
        super().__init__()
        self.offset = learned.offset
        self.weight = nn.Parameter(torch.empty(learned.n_positions + learned.offset, width))

    def forward(self, positions: Tensor) -> Tensor:
        return F.embedding(positions + self.offset, self.weight)


class SinusoidalPositions(nn.Module):
    """Fixed waves of the position."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.width = width

    def forward(self, positions: Tensor) -> Tensor:
        return sinusoids(positions, self.width)


def sinusoids(positions: Tensor, width: int) -> Tensor:
    """[..., D] in float64: sine and cosine in turn, wavelengths from 2 pi to 10,000 * 2 pi.

    Vaswani 2017 (1706.03762), section 3.5.
    """
    even = torch.arange(0, width, 2, dtype=torch.float64, device=positions.device)
    angles_TP = positions.double()[..., None] * 10_000.0 ** (-even / width)
    waves_TD = torch.stack((angles_TP.sin(), angles_TP.cos()), dim=-1).flatten(-2)
    return waves_TD[..., :width]


def hidden_unit(activation: Activation, up_F: Tensor, gate_F: Tensor | None) -> Tensor:
    """What stands between the matrices: act(up), or act(gate) * up when there is a gate."""
    if gate_F is None:
        return ACTIVATIONS[activation](up_F)
    if activation == "silu_clamped":
        return clamped_unit(up_F, gate_F)
    return ACTIVATIONS[activation](gate_F) * up_F


def clamped_unit(up_F: Tensor, gate_F: Tensor) -> Tensor:
    """GPT-OSS's: both clamped at 7, the gate from above only, and (up + 1) * gated.

    OpenAI 2025 (2508.10925), section 2.2; openai/gpt-oss, gpt_oss/torch/model.py, swiglu.
    """
    gate_F, up_F = gate_F.clamp(max=7.0), up_F.clamp(-7.0, 7.0)
    return (up_F + 1) * (gate_F * torch.sigmoid(1.702 * gate_F))


class FeedForwardModule(nn.Module):
    """down(act(up(x))), or down(act(gate(x)) * up(x)) when gated.

    Gate and up are separate matrices: halves of one product are strided, and on a CPU the
    activation over them takes 1.8 times as long.
    """

    def __init__(self, spec: Dense, d_model: int) -> None:
        super().__init__()
        self.activation = spec.activation
        self.dropout = spec.dropout
        self.gate = Linear(d_model, spec.d_ff, spec.bias) if spec.gated else None
        self.up = Linear(d_model, spec.d_ff, spec.bias)
        self.down = Linear(spec.d_ff, d_model, spec.bias)

    def forward(self, x_BTD: Tensor) -> Tensor:
        gate_BTF = None if self.gate is None else self.gate(x_BTD)
        up_BTF: Tensor = self.up(x_BTD)
        return self.shrink(up_BTF, gate_BTF)

    def shrink(self, up_BTF: Tensor, gate_BTF: Tensor | None) -> Tensor:
        """What stands between the matrices, and back to the stream's width."""
        h_BTF = hidden_unit(self.activation, up_BTF, gate_BTF)
        h_BTF = F.dropout(h_BTF, self.dropout, self.training)
        y_BTD: Tensor = self.down(h_BTF)
        return y_BTD


def make_head(arch: Arch) -> HeadModule | ProjectedHead:
    """The head; tied to an embedding of another width than the layers', it projects first."""
    rows, width = arch.embedding.n_rows, arch.embedding.d_embed
    if arch.head.tied and width not in (None, arch.d_model):
        return ProjectedHead(arch.head, rows, arch.d_model, width or arch.d_model)
    return HeadModule(arch.head, rows, arch.d_model)


class HeadModule(nn.Module):
    """Vectors to logits, with a matrix of its own or the embedding's."""

    def __init__(self, head: Head, n_rows: int, d_model: int) -> None:
        super().__init__()
        self.scale = head.scale
        self.softcap = head.softcap
        self.weight = None if head.tied else nn.Parameter(torch.empty(n_rows, d_model))
        self.bias = nn.Parameter(torch.empty(n_rows)) if head.bias else None

    def matrix(self, embedding_VD: Tensor) -> Tensor:
        """Its own, or the embedding's where it is tied."""
        return embedding_VD if self.weight is None else self.weight

    def forward(self, x_BTD: Tensor, embedding_VD: Tensor) -> Tensor:
        logits_BTV = F.linear(x_BTD, self.matrix(embedding_VD), self.bias)
        if self.scale != 1.0:
            logits_BTV = logits_BTV * self.scale
        if self.softcap is not None:
            logits_BTV = self.softcap * torch.tanh(logits_BTV / self.softcap)
        return logits_BTV

    def finish_(self, product_RV: Tensor) -> Tensor | float:
        """What comes after the product, in place; returns the logits' derivative by the product."""
        if self.scale != 1.0:
            product_RV.mul_(self.scale)
        if self.softcap is None:
            return self.scale
        share_RV = product_RV.div_(self.softcap).tanh_().square()
        product_RV.mul_(self.softcap)
        return self.scale * (1 - share_RV)


class ProjectedHead(nn.Module):
    """To the embedding's width, then to logits with its matrix (OPT 350m)."""

    def __init__(self, head: Head, n_rows: int, d_model: int, d_embed: int) -> None:
        super().__init__()
        self.project = Linear(d_model, d_embed, bias=False)
        self.logits = HeadModule(head, n_rows, d_embed)

    def forward(self, x_BTD: Tensor, embedding_VE: Tensor) -> Tensor:
        logits_BTV: Tensor = self.logits(self.project(x_BTD), embedding_VE)
        return logits_BTV
