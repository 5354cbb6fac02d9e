"""A decoder that reads images: what its vision tower makes of them stands in the place of tokens
(LLaVA, Liu 2023, 2304.08485, section 4.1).

Parameter names are a contract, the same paths as in the count trees: those of a decoder, and
`vision.patches.weight`, `vision.class_token.weight`, `vision.positions.weight`,
`vision.layers.0.attention.q.weight`, `vision.projector.linear_1.weight`, ...

Letters: I images · C colours · M tokens of an image · B batch · T tokens · D d_model ·
V vocab_size.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from isoflop.arch.spec import (
    Arch,
    Attention,
    Full,
    Layer,
    Rope,
    Rope2d,
    Span,
    VisionTower,
    Window,
)
from isoflop.errors import Fault, InputError, Problem
from isoflop.model.attention import Context, contexts
from isoflop.model.decoder import Decoder
from isoflop.model.vision_tower import VisionModule, chunk_of, window_side


@dataclass(frozen=True, slots=True)
class Images:
    """Images, and where their tokens stand among those of the text.

    `pixels` are [I, C, height, width], stills, or [I, C, frames, height, width] where a patch spans
    several frames; several such batches where images differ in size. `places` [B, T] is true at
    each token of an image. Images fill them in order, sequence after sequence.
    """

    pixels: Tensor | tuple[Tensor, ...]
    places: Tensor

    @property
    def batches(self) -> tuple[Tensor, ...]:
        """Images of one size each."""
        return (self.pixels,) if isinstance(self.pixels, Tensor) else self.pixels

    @classmethod
    def at(cls, token: int, tokens_BT: Tensor, pixels: Tensor | tuple[Tensor, ...]) -> Images:
        """Images in the place of every `token`, a number that the tokenizer keeps for them."""
        return cls(pixels, tokens_BT == token)


class VisionDecoder(Decoder):
    """A decoder with a vision tower; without images it is the decoder alone."""

    def __init__(self, arch: Arch) -> None:
        super().__init__(arch)
        if arch.vision is None:
            raise Fault(f"{arch.name} has no vision tower")
        self.vision = VisionModule(arch.vision, arch.d_model)

    def forward(
        self,
        tokens_BT: Tensor,
        images: Images | None = None,
        *,
        targets_BT: Tensor | None = None,
    ) -> Tensor:
        """Logits [B, T, V] of the token after each, or with targets their `loss`.

        An image's tokens count among T.

        Raises:
            InputError: images of another size, or as many places as they do not fill.
        """
        if images is None:
            return super().forward(tokens_BT, targets_BT=targets_BT)
        self._check(tokens_BT, images)
        x_BTD = self._embed(tokens_BT)
        spec, place_BT1 = self.vision.spec, images.places[..., None]
        read = [self.vision(_in_frames(x, spec)).flatten(0, 1) for x in images.batches]
        vectors = read[0] if len(read) == 1 else torch.cat(read)
        x_BTD = x_BTD.masked_scatter(place_BT1, vectors.to(x_BTD.dtype))
        return self._read(x_BTD, self._told_with(x_BTD, images), targets_BT)

    def loss(self, tokens_BT: Tensor, targets_BT: Tensor, images: Images | None = None) -> Tensor:
        """Mean cross entropy in nats per token; a target of -100 is left out of the mean."""
        loss: Tensor = self(tokens_BT, images, targets_BT=targets_BT)
        return loss

    def _told_with(self, x_BTD: Tensor, images: Images) -> dict[str, Context]:
        """What each kind of layer is told of a text with images."""
        tower, places_BT, positions = self.vision.spec, images.places, None
        if any(_in_sections(layer) for layer in self.arch.layers):
            grids = [_grid(x, tower) for x in images.batches for _ in range(len(x))]
            positions = grid_positions(places_BT, grids) if grids else None
        told = contexts(self.arch, x_BTD, positions=positions)
        if not tower.both_ways:
            return told
        spans = {name: kind.attention.span for name, kind in self.arch.kinds.items()
                 if isinstance(kind.attention, Attention)}  # fmt: skip
        return {
            name: replace(context, bias=both_ways(places_BT, spans[name]), unordered=True)
            for name, context in told.items()
        }

    def _check(self, tokens_BT: Tensor, images: Images) -> None:
        spec, places = self.vision.spec, images.places
        problems = [x for batch in images.batches for x in _unread(batch, spec)]
        grids = [(len(x), *_grid(x, spec)) for x in images.batches]
        n_vectors = sum(n_images * n_rows * n_columns for n_images, n_rows, n_columns in grids)
        if places.dtype != torch.bool or places.shape != tokens_BT.shape:
            rule = f"is boolean and has the tokens' shape {tuple(tokens_BT.shape)}"
            problems.append(Problem("images.places", f"{places.dtype} {tuple(places.shape)}", rule))
        elif not problems and not places.is_meta and (n_places := int(places.sum())) != n_vectors:
            rule = f"are as many as the images' tokens, {n_vectors}"
            problems.append(Problem("images.places", n_places, rule))
        if problems:
            raise InputError(self.arch.name, problems)


def _unread(pixels: Tensor, spec: VisionTower) -> Iterator[Problem]:
    """Images that the tower does not take: with trained positions it takes one size alone."""
    *lead, height, width = pixels.shape
    if spec.positions:
        fits, sizes = (height, width) == (spec.image,) * 2, f"{spec.image} x {spec.image}"
    else:
        side = spec.patch * spec.projector.merge
        fits, sizes = not (height % side or width % side), f"multiples of {side} x {side}"
    if (
        lead[1:] not in ([spec.channels], [spec.channels, spec.frames])
        or not fits
        or not height * width
    ):
        rule = f"are {spec.channels} colours of {sizes} pixels each"
        yield Problem("images.pixels", tuple(pixels.shape), rule)


def _grid(pixels: Tensor, spec: VisionTower) -> tuple[int, int]:
    """In how many rows and columns an image's tokens stand."""
    n_rows, n_columns = (size // spec.patch // spec.projector.merge for size in pixels.shape[-2:])
    return n_rows, n_columns


def _in_frames(pixels: Tensor, spec: VisionTower) -> Tensor:
    """[I, C * frames, side, side]: a still is the same in every frame."""
    if pixels.dim() == 4:
        return pixels.repeat_interleave(spec.frames, dim=1)
    return pixels.flatten(1, 2)


def _in_sections(layer: Layer) -> bool:
    position = layer.attention.position
    return isinstance(position, Rope) and position.sections is not None


def grid_positions(places_BT: Tensor, grids: Sequence[tuple[int, int]]) -> Tensor:
    """[3, B, T]: where each token stands in time, row and column; images have these `grids`.

    An image's tokens stand in a grid that begins where the text before it ends, and the text goes
    on behind the longer side of it (Wang 2024, 2409.12191, section 2.1).

    >>> grid_positions(torch.tensor([[False, True, True, True, True, False]]), [(2, 2)])[:, 0]
    tensor([[0, 1, 1, 1, 1, 3],
            [0, 1, 1, 2, 2, 3],
            [0, 1, 2, 1, 2, 3]])
    """
    size_I2 = torch.tensor(grids, device=places_BT.device)
    end_I = size_I2.prod(dim=1).cumsum(0)
    nth_BT = (places_BT.flatten().cumsum(0) - 1).view_as(places_BT).clamp(min=0)
    image_BT = torch.searchsorted(end_I, nth_BT, right=True).clamp(max=len(grids) - 1)
    behind_BT = end_I[image_BT] - nth_BT - 1  # tokens of the same image that follow
    within_BT = size_I2.prod(dim=1)[image_BT] - 1 - behind_BT
    n_columns_BT, longer_BT = size_I2[image_BT, 1], size_I2.amax(dim=1)[image_BT]
    ahead_BT = torch.where(places_BT, (behind_BT == 0) * longer_BT, 1)
    start_BT = ahead_BT.cumsum(1) - ahead_BT
    row_BT, column_BT = within_BT // n_columns_BT, within_BT % n_columns_BT
    return start_BT + torch.stack((0 * row_BT, row_BT, column_BT)) * places_BT


def both_ways(places_BT: Tensor, span: Span) -> Tensor:
    """Which tokens see which, [B, 1, T, T]: earlier ones, and those of their own image.

    Tokens of images without text between them are of one (Gemma 3, 2503.19786, section 2.1). A
    window hides what is too far back, in images too.

    >>> both_ways(torch.tensor([[False, True, True, False]]), Full())[0, 0].int()
    tensor([[1, 0, 0, 0],
            [1, 1, 1, 0],
            [1, 1, 1, 0],
            [1, 1, 1, 1]], dtype=torch.int32)
    """
    first_BT = places_BT.clone()
    first_BT[:, 1:] &= ~places_BT[:, :-1]
    run_BT = torch.where(places_BT, first_BT.cumsum(1), 0)
    same_BTT = (run_BT[:, :, None] == run_BT[:, None, :]) & places_BT[:, None, :]
    position_T = torch.arange(places_BT.shape[1], device=places_BT.device)
    back_TT = position_T[:, None] - position_T
    seen_BTT = same_BTT | (back_TT >= 0)
    if isinstance(span, Window):
        seen_BTT = seen_BTT & (back_TT < span.window)
    return seen_BTT[:, None]


# --- what is refused --------------------------------------------------------------------


def vision_problems(arch: Arch, tower: VisionTower) -> Iterator[Problem]:
    """What of a decoder with a vision tower is not built, beside what no model has."""
    for field in ("position", "norm"):
        if (value := getattr(arch.embedding, field)) is not None:
            rule = "is None where there is a vision tower: images stand beside what is embedded"
            yield Problem(f"embedding.{field}", value.kind, rule)
    for layer in dict.fromkeys(tower.layers):
        yield from _tower_layer(f"vision.layers.{layer.name}", layer, tower)
    kinds = arch.kinds.values()
    turned = [x.attention.position for x in kinds if isinstance(x.attention.position, Rope)]
    if len({rope.sections is None for rope in turned}) > 1:
        rule = "is in all layers that turn, or in none: they read one text"
        yield Problem("layers.attention.position.sections", "in some", rule)
    if tower.both_ways:
        yield from _shown_both_ways(arch)


def _tower_layer(place: str, layer: Layer, tower: VisionTower) -> Iterator[Problem]:
    position, chunk = layer.attention.position, chunk_of(layer)
    if not isinstance(position, Rope2d | None):
        rule = "is rope_2d or None: an image's positions have two dimensions"
        yield Problem(f"{place}.attention.position", position.kind, rule)
    if tower.class_token and (isinstance(position, Rope2d) or chunk is not None):
        rule = "is false where patches are turned or see windows: it stands in no row or column"
        yield Problem("vision.class_token", True, rule)
    if chunk is not None and not _is_square(chunk, tower):
        rule = "is the square of a side that divides the image's patches, the same in all layers"
        yield Problem(f"{place}.attention.span.chunk", chunk, rule)
    if layer.cross is not None:
        yield Problem(f"{place}.cross", "Attention", "is None in a vision tower")


def _is_square(chunk: int, tower: VisionTower) -> bool:
    side, merge = window_side(tower) or 1, tower.projector.merge
    return side**2 == chunk and side % merge == 0 and tower.image // tower.patch % side == 0


def _shown_both_ways(arch: Arch) -> Iterator[Problem]:
    """What is told by position alone goes on; other ways to hide keys would hide an image's too."""
    for name, kind in arch.kinds.items():
        attention = kind.attention
        if not isinstance(attention, Attention):
            rule = "is attention where an image's tokens see each other"
            yield Problem(f"layers.{name}.attention", attention.kind, rule)
            continue
        if not isinstance(attention.span, Full | Window):
            rule = "is full or a window where an image's tokens see each other"
            yield Problem(f"layers.{name}.attention.span", attention.span.kind, rule)
        if not isinstance(attention.position, Rope | None):
            rule = "is rope or None where an image's tokens see each other"
            yield Problem(f"layers.{name}.attention.position", attention.position.kind, rule)
