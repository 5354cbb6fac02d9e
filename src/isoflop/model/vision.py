"""A decoder that reads images: a vision transformer over patches (Radford 2021, 2103.00020,
section 2.4), and a projector whose vectors stand in the place of tokens (LLaVA, Liu 2023,
2304.08485, section 4.1).

Parameter names are a contract, the same paths as in the count trees: those of a decoder, and
`vision.patches.weight`, `vision.class_token.weight`, `vision.positions.weight`,
`vision.layers.0.attention.q.weight`, `vision.projector.linear_1.weight`, ...

Letters: I images · C colours · P patches · S tokens of an image · W width of the tower ·
B batch · T tokens · D d_model · V vocab_size.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from isoflop.arch.spec import Arch, Learned, Projector, VisionTower
from isoflop.errors import Fault, InputError, Problem
from isoflop.model.attention import Context
from isoflop.model.decoder import Decoder
from isoflop.model.layer import make_layer
from isoflop.model.parts import LearnedPositions, Linear, make_norm


@dataclass(frozen=True, slots=True)
class Images:
    """Images, and where their tokens stand among those of the text.

    `pixels` are [I, C, side, side]; `places` [B, T] is true at each token of an image. Images
    fill them in order, sequence after sequence.
    """

    pixels: Tensor
    places: Tensor

    @classmethod
    def at(cls, token: int, tokens_BT: Tensor, pixels: Tensor) -> Images:
        """Images in the place of every `token`, a number that the tokenizer keeps for them."""
        return cls(pixels, tokens_BT == token)


class ClassToken(nn.Module):
    """A trained vector that goes through the tower before the patches."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(width))

    def forward(self, x_IPW: Tensor) -> Tensor:
        return torch.cat((self.weight.expand(len(x_IPW), 1, -1), x_IPW), dim=1)


class ProjectorModule(nn.Module):
    """From the tower's width to the decoder's: linear maps, a GELU between two."""

    def __init__(self, spec: Projector, width: int, d_model: int) -> None:
        super().__init__()
        self.norm = make_norm(spec.norm, width)
        hidden = d_model if spec.d_hidden is None else spec.d_hidden
        widths = [width, *[hidden] * (spec.n_maps - 1), d_model]
        for i in range(spec.n_maps):
            if i:
                self.add_module(f"activation_{i}", nn.GELU())
            self.add_module(f"linear_{i + 1}", Linear(widths[i], widths[i + 1], spec.bias))

    def forward(self, x_IPW: Tensor) -> Tensor:
        for step in self.children():
            x_IPW = step(x_IPW)
        return x_IPW


class VisionModule(nn.Module):
    """Patches to tokens, layers in which each sees all, and the projector.

    Layers behind the one that the projector reads are stored, as published weights have them.
    """

    def __init__(self, spec: VisionTower, d_model: int) -> None:
        super().__init__()
        self.spec = spec
        width, n_patches = spec.d_model, (spec.image // spec.patch) ** 2
        self.patches = Linear(spec.channels * spec.patch**2, width, spec.patch_bias)
        self.class_token = ClassToken(width) if spec.class_token else nn.Identity()
        table = Learned(n_patches + spec.class_token)
        self.positions = LearnedPositions(table, width) if spec.positions else None
        self.pre_norm = make_norm(spec.pre_norm, width)
        self.layers = nn.ModuleList(make_layer(x, width, causal=False) for x in spec.layers)
        self.final_norm = make_norm(spec.final_norm, width)
        self.projector = ProjectorModule(spec.projector, width, d_model)

    def forward(self, pixels: Tensor) -> Tensor:
        """[I, P, D], the patches row by row."""
        pixels_IPX = F.unfold(pixels, self.spec.patch, stride=self.spec.patch).mT
        x_ISW: Tensor = self.class_token(self.patches(pixels_IPX))
        if self.positions is not None:
            x_ISW = x_ISW + self.positions(torch.arange(x_ISW.shape[1], device=x_ISW.device))
        x_ISW = self.pre_norm(x_ISW)
        for layer in self.layers[: self.spec.n_run]:
            x_ISW = layer(x_ISW, Context())
        if self.spec.feature_layer is None:
            x_ISW = self.final_norm(x_ISW)
        y_IPD: Tensor = self.projector(x_ISW[:, 1:] if self.spec.class_token else x_ISW)
        return y_IPD


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
        x_BTD = self._embed(tokens_BT)
        if images is not None:
            self._check(tokens_BT, images)
            vectors_IPD = self.vision(images.pixels).to(x_BTD.dtype)
            x_BTD = x_BTD.masked_scatter(images.places[..., None], vectors_IPD)
        return self.logits(x_BTD) if targets_BT is None else self.loss_of(x_BTD, targets_BT)

    def loss(self, tokens_BT: Tensor, targets_BT: Tensor, images: Images | None = None) -> Tensor:
        """Mean cross entropy in nats per token; a target of -100 is left out of the mean."""
        loss: Tensor = self(tokens_BT, images, targets_BT=targets_BT)
        return loss

    def _check(self, tokens_BT: Tensor, images: Images) -> None:
        spec, places, problems = self.vision.spec, images.places, []
        shape = (len(images.pixels), spec.channels, spec.image, spec.image)
        if tuple(images.pixels.shape) != shape:
            rule = f"are {spec.channels} colours of {spec.image} x {spec.image} pixels each"
            problems.append(Problem("images.pixels", tuple(images.pixels.shape), rule))
        n_vectors = len(images.pixels) * (spec.image // spec.patch) ** 2
        if places.dtype != torch.bool or places.shape != tokens_BT.shape:
            rule = f"is boolean and has the tokens' shape {tuple(tokens_BT.shape)}"
            problems.append(Problem("images.places", f"{places.dtype} {tuple(places.shape)}", rule))
        elif not places.is_meta and (n_places := int(places.sum())) != n_vectors:
            rule = f"are as many as the images' tokens, {n_vectors}"
            problems.append(Problem("images.places", n_places, rule))
        if problems:
            raise InputError(self.arch.name, problems)


def vision_problems(arch: Arch, tower: VisionTower) -> Iterator[Problem]:
    """What of a decoder with a vision tower is not built, beside what no model has."""
    for field in ("position", "norm"):
        if (value := getattr(arch.embedding, field)) is not None:
            rule = "is None where there is a vision tower: images stand beside what is embedded"
            yield Problem(f"embedding.{field}", value.kind, rule)
    if tower.projector.merge != 1:
        rule = "is 1: models that merge patches rotate them or show them to each other"
        yield Problem("vision.projector.merge", tower.projector.merge, rule)
    for layer in dict.fromkeys(tower.layers):
        place, position = f"vision.layers.{layer.name}", layer.attention.position
        if position is not None:
            rule = "is None: positions of two dimensions are trained ones alone"
            yield Problem(f"{place}.attention.position", position.kind, rule)
        if layer.cross is not None:
            yield Problem(f"{place}.cross", "Attention", "is None in a vision tower")
