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


class TokenVectors(nn.Embedding):
    """A table of vectors that waits for `build` to draw it."""

    def reset_parameters(self) -> None:
        """Draw nothing: weights are drawn once, by name, in build.py."""


def make_norm(norm: Norm | None, width: int) -> nn.Module:
    """The module of a spec's norm; no norm passes its input on."""
    match norm:
        case None:
            return nn.Identity()
        case LayerNorm():
            return LayerNormModule(norm, width)
        case RmsNorm():
            return RmsNormModule(norm, width)


class LayerNormModule(nn.Module):
    """Mean and variance removed; weight and bias where the spec trains them."""

    def __init__(self, norm: LayerNorm, width: int) -> None:
        super().__init__()
        self.eps = norm.eps
        self.weight = nn.Parameter(torch.empty(width)) if norm.weight else None
        self.bias = nn.Parameter(torch.empty(width)) if norm.bias else None

    def forward(self, x_BTD: Tensor) -> Tensor:
        return F.layer_norm(x_BTD, x_BTD.shape[-1:], self.weight, self.bias, self.eps)


class RmsNormModule(nn.Module):
    """Root mean square removed; with `unit_offset` the stored weight is 1 less than used."""

    def __init__(self, norm: RmsNorm, width: int) -> None:
        super().__init__()
        self.eps = norm.eps
        self.unit_offset = norm.unit_offset
        self.weight = nn.Parameter(torch.empty(width))

    def forward(self, x_BTD: Tensor) -> Tensor:
        weight = self.weight + 1 if self.unit_offset else self.weight
        return rms_norm(x_BTD, weight, self.eps)


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

    def forward(self, tokens_BT: Tensor, positions_T: Tensor) -> Tensor:
        x_BTE: Tensor = self.tokens(tokens_BT)
        if self.scale != 1.0:
            x_BTE = x_BTE * self.scale
        x_BTD: Tensor = self.project(x_BTE)
        if self.positions is not None:
            x_BTD = x_BTD + self.positions(positions_T).to(x_BTD.dtype)
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

    def forward(self, positions_T: Tensor) -> Tensor:
        return F.embedding(positions_T + self.offset, self.weight)


class SinusoidalPositions(nn.Module):
    """Sine and cosine in turn, wavelengths from 2 pi to 10,000 * 2 pi (Vaswani 2017, 3.5)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.width = width

    def forward(self, positions_T: Tensor) -> Tensor:
        even = torch.arange(0, self.width, 2, dtype=torch.float64, device=positions_T.device)
        angles_TP = positions_T.double()[:, None] * 10_000.0 ** (-even / self.width)
        waves_TD = torch.stack((angles_TP.sin(), angles_TP.cos()), dim=-1).flatten(-2)
        return waves_TD[:, : self.width]


class FeedForwardModule(nn.Module):
    """down(act(up(x))), or down(act(gate(x)) * up(x)) when gated.

    Gate and up are separate matrices: halves of one product are strided, and on a CPU the
    activation over them takes 1.8 times as long.
    """

    def __init__(self, spec: Dense, d_model: int) -> None:
        super().__init__()
        self.activation = ACTIVATIONS[spec.activation]
        self.dropout = spec.dropout
        self.gate = Linear(d_model, spec.d_ff, spec.bias) if spec.gated else None
        self.up = Linear(d_model, spec.d_ff, spec.bias)
        self.down = Linear(spec.d_ff, d_model, spec.bias)

    def forward(self, x_BTD: Tensor) -> Tensor:
        h_BTF: Tensor = self.up(x_BTD)
        if self.gate is None:
            h_BTF = self.activation(h_BTF)
        else:
            h_BTF = self.activation(self.gate(x_BTD)) * h_BTF
        h_BTF = F.dropout(h_BTF, self.dropout, self.training)
        y_BTD: Tensor = self.down(h_BTF)
        return y_BTD


class HeadModule(nn.Module):
    """Vectors to logits, with a matrix of its own or the embedding's."""

    def __init__(self, head: Head, n_rows: int, d_model: int) -> None:
        super().__init__()
        self.scale = head.scale
        self.softcap = head.softcap
        self.weight = None if head.tied else nn.Parameter(torch.empty(n_rows, d_model))
        self.bias = nn.Parameter(torch.empty(n_rows)) if head.bias else None

    def forward(self, x_BTD: Tensor, embedding_VD: Tensor) -> Tensor:
        weight_VD = embedding_VD if self.weight is None else self.weight
        logits_BTV = F.linear(x_BTD, weight_VD, self.bias)
        if self.scale != 1.0:
            logits_BTV = logits_BTV * self.scale
        if self.softcap is not None:
            logits_BTV = self.softcap * torch.tanh(logits_BTV / self.softcap)
        return logits_BTV


def mean_loss(logits_BTV: Tensor, targets_BT: Tensor) -> Tensor:
    """Mean cross entropy in nats per token, in at least single precision.

    A target of -100 is left out of the mean.
    """
    wide = torch.promote_types(logits_BTV.dtype, torch.float32)
    return F.cross_entropy(logits_BTV.flatten(0, 1).to(wide), targets_BT.flatten())
