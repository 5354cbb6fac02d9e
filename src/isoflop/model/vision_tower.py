"""A vision tower: patches to tokens, a transformer over them, a projector to the decoder's width
(Radford 2021, 2103.00020, section 2.4; Liu 2023, 2304.08485, section 4.1).

Where patches are merged or layers see windows, patches go through the tower window by window, and
in a window those of one merged token side by side; what leaves it stands row by row again.

Letters: I images · C colours · P patches · S tokens in the tower · W width of the tower ·
M tokens of an image that the decoder reads · D d_model.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import isqrt

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from isoflop.arch.spec import Attention, Chunked, Layer, Learned, Projector, Rope2d, VisionTower
from isoflop.model.attention import Context
from isoflop.model.layer import make_layer
from isoflop.model.parts import LearnedPositions, Linear, make_norm
from isoflop.model.rotary import Rotation


class ClassToken(nn.Module):
    """A trained vector that goes through the tower before the patches."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(width))

    def forward(self, x_IPW: Tensor) -> Tensor:
        return torch.cat((self.weight.expand(len(x_IPW), 1, -1), x_IPW), dim=1)


class ProjectorModule(nn.Module):
    """From the tower's width to the decoder's: linear maps, a GELU between two.

    Patches of one token come side by side; they are averaged, or make one vector.
    """

    def __init__(self, spec: Projector, width: int, d_model: int) -> None:
        super().__init__()
        self.n_merged, self.averaged = spec.merge**2, spec.averaged
        self.norm = make_norm(spec.norm, width)
        joined = width if spec.averaged else width * self.n_merged
        hidden = d_model if spec.d_hidden is None else spec.d_hidden
        widths = [joined, *[hidden] * (spec.n_maps - 1), d_model]
        for i in range(spec.n_maps):
            if i:
                self.add_module(f"activation_{i}", nn.GELU())
            self.add_module(f"linear_{i + 1}", Linear(widths[i], widths[i + 1], spec.bias))

    def forward(self, x_IPW: Tensor) -> Tensor:
        if self.averaged:
            x_IPW = torch.unflatten(x_IPW, 1, (-1, self.n_merged)).mean(2)
        x_IPW = self.norm(x_IPW)
        if not self.averaged and self.n_merged > 1:
            x_IPW = torch.unflatten(x_IPW, 1, (-1, self.n_merged)).flatten(2)
        for name, step in self.named_children():
            x_IPW = x_IPW if name == "norm" else step(x_IPW)
        return x_IPW


class VisionModule(nn.Module):
    """Patches to tokens, layers in which each sees all or its window, and the projector.

    Layers behind the one that the projector reads are stored, as published weights have them.
    """

    def __init__(self, spec: VisionTower, d_model: int) -> None:
        super().__init__()
        self.spec = spec
        width, n_patches = spec.d_model, (spec.image // spec.patch) ** 2
        self.patches = Linear(spec.channels * spec.frames * spec.patch**2, width, spec.patch_bias)
        self.class_token = ClassToken(width) if spec.class_token else nn.Identity()
        table = Learned(n_patches + spec.class_token)
        self.positions = LearnedPositions(table, width) if spec.positions else None
        self.pre_norm = make_norm(spec.pre_norm, width)
        self.layers = nn.ModuleList(make_layer(x, width, causal=False) for x in spec.layers)
        self.final_norm = make_norm(spec.final_norm, width)
        self.projector = ProjectorModule(spec.projector, width, d_model)

    def forward(self, pixels: Tensor) -> Tensor:
        """[I, M, D], an image's tokens row by row; pixels are [I, C * frames, height, width]."""
        n_rows, n_columns = (size // self.spec.patch for size in pixels.shape[-2:])
        grid = Grid.of(self.spec, n_rows, n_columns, pixels.device)
        pixels_IPX = F.unfold(pixels, self.spec.patch, stride=self.spec.patch).mT
        x_ISW: Tensor = self.class_token(self.patches(pixels_IPX[:, grid.order_P]))
        if self.positions is not None:
            n_first = int(self.spec.class_token)
            x_ISW = x_ISW + self.positions(F.pad(grid.order_P + n_first, (n_first, 0)))
        x_ISW = self._through_layers(self.pre_norm(x_ISW), grid)
        if self.spec.feature_layer is None:
            x_ISW = self.final_norm(x_ISW)
        y_IMD: Tensor = self.projector(x_ISW[:, 1:] if self.spec.class_token else x_ISW)
        if grid.window is None:
            return y_IMD
        first_M = grid.order_P[:: self.spec.projector.merge**2]  # of the patches of each token
        return y_IMD[:, first_M.argsort()]

    def _through_layers(self, x_ISW: Tensor, grid: Grid) -> Tensor:
        """Windows of one size are told apart as texts of a batch are."""
        n_images, n_tokens, _ = x_ISW.shape
        run = list(zip(self.spec.layers, self.layers, strict=True))[: self.spec.n_run]
        told: dict[str, Context] = {}
        for spec, layer in run:
            if spec.name not in told:
                told[spec.name] = _context(spec, grid, x_ISW)
            n_seen = n_tokens if told[spec.name].bias is not None else chunk_of(spec) or n_tokens
            x_ISW = layer(x_ISW.reshape(-1, n_seen, x_ISW.shape[-1]), told[spec.name])
            x_ISW = x_ISW.reshape(n_images, n_tokens, -1)
        return x_ISW


@dataclass(frozen=True, slots=True)
class Grid:
    """An image's patches, and the order in which they go through the tower.

    `window` is how many of them a side windows have, None where no layer has any. Those at the
    right and lower edge may be smaller. `order_P` has the patches' numbers, counted row by row.
    """

    n_columns: int
    window: int | None
    order_P: Tensor  # noqa: N815 - shape suffix

    @classmethod
    def of(
        cls, tower: VisionTower, n_rows: int, n_columns: int, device: torch.device | str = "cpu"
    ) -> Grid:
        window, merge = window_side(tower), tower.projector.merge
        side = window or max(n_rows, n_columns)
        return cls(n_columns, window, in_windows(n_rows, n_columns, side, merge, device))

    @property
    def places_P2(self) -> Tensor:  # noqa: N802 - shape suffix
        """Each patch's row and column, in the tower's order."""
        return torch.stack((self.order_P // self.n_columns, self.order_P % self.n_columns), dim=-1)

    def uneven_windows(self, chunk: int) -> Tensor | None:
        """Which patches see which, [P, P], where windows differ in size; None where all are full."""
        n_rows = len(self.order_P) // self.n_columns
        if self.window is None or not (n_rows % self.window or self.n_columns % self.window):
            return None
        row_P, column_P = (self.places_P2 // isqrt(chunk)).unbind(-1)
        return (row_P[:, None] == row_P) & (column_P[:, None] == column_P)


def _context(layer: Layer, grid: Grid, x_ISW: Tensor) -> Context:
    """The turn of each patch by its row and its column, and the windows that are not full."""
    chunk = chunk_of(layer)
    bias = None if chunk is None else grid.uneven_windows(chunk)
    attention = layer.attention
    if not isinstance(attention, Attention) or not isinstance(attention.position, Rope2d):
        return Context(bias=bias)
    places = grid.places_P2
    if chunk is not None and bias is None:
        places = torch.unflatten(places, 0, (-1, chunk)).repeat(len(x_ISW), 1, 1)
    turn = Rotation.of_grid(attention.position, attention.d_head, places, x_ISW.dtype)
    return Context(turn, bias=bias)


def chunk_of(layer: Layer) -> int | None:
    """How many patches a window has; None where a layer sees all."""
    attention = layer.attention
    if isinstance(attention, Attention) and isinstance(attention.span, Chunked):
        return attention.span.chunk
    return None


def window_side(tower: VisionTower) -> int | None:
    """How many patches a side windows have, which are squares; None where no layer has any."""
    chunks = {chunk for layer in tower.layers if (chunk := chunk_of(layer)) is not None}
    return isqrt(max(chunks)) if chunks else None


def in_windows(
    n_rows: int, n_columns: int, window: int, merge: int, device: torch.device | str = "cpu"
) -> Tensor:
    """The numbers of an image's patches, window by window, in each those that merge together.

    >>> in_windows(4, 4, window=4, merge=2).tolist()
    [0, 1, 4, 5, 2, 3, 6, 7, 8, 9, 12, 13, 10, 11, 14, 15]
    >>> in_windows(2, 3, window=2, merge=1).tolist()
    [0, 1, 3, 4, 2, 5]
    """
    number_P = torch.arange(n_rows * n_columns, device=device)
    row_P, column_P = number_P // n_columns, number_P % n_columns
    rank_P = torch.zeros_like(number_P)
    for side in (window, merge, 1):
        rank_P = (rank_P * n_rows + row_P // side) * n_columns + column_P // side
    return rank_P.argsort()
