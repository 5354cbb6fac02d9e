"""The ends of a model, and what else may feed it: an encoder, a vision tower."""

from __future__ import annotations

from dataclasses import dataclass

from isoflop.arch.rules import Rules
from isoflop.arch.spec.layer import Layer, check_layers
from isoflop.arch.spec.norms import Norm
from isoflop.arch.spec.positions import Learned, Sinusoidal


@dataclass(frozen=True, slots=True)
class Embedding:
    """Tokens to vectors.

    `n_rows` is the number of rows stored, at least vocab_size: padding is explicit.
    `d_embed` other than d_model adds a projection. `scale` multiplies the vectors.
    """

    n_rows: int
    position: Learned | Sinusoidal | None = None
    norm: Norm | None = None
    d_embed: int | None = None
    scale: float = 1.0
    dropout: float = 0.0

    def __post_init__(self) -> None:
        rules = Rules(self).size("n_rows").share("dropout").real("scale", above=0)
        if self.d_embed is not None:
            rules.size("d_embed")
        rules.close()


@dataclass(frozen=True, slots=True)
class Head:
    """Vectors to logits. `tied` reuses the embedding's matrix.

    `scale` multiplies the logits, `softcap` c replaces a logit z by c tanh(z / c).
    """

    tied: bool = False
    bias: bool = False
    scale: float = 1.0
    softcap: float | None = None

    def __post_init__(self) -> None:
        rules = Rules(self).real("scale", above=0)
        if self.softcap is not None:
            rules.real("softcap", above=0)
        rules.close()


@dataclass(frozen=True, slots=True)
class Encoder:
    """The encoder of an encoder-decoder model; it shares the decoder's embedding."""

    layers: tuple[Layer, ...]
    final_norm: Norm | None
    max_seq_len: int

    def __post_init__(self) -> None:
        rules = Rules(self).size("max_seq_len")
        check_layers(rules, self.layers)
        rules.close()


@dataclass(frozen=True, slots=True)
class Projector:
    """From a vision tower's tokens to the decoder's: `n_maps` linear maps, a GELU between two.

    `merge` x `merge` patches make one token, `averaged` or else side by side in one vector.
    `norm` is over the tower's width, before the maps; `d_hidden` is the width between them,
    None the decoder's own.
    """

    n_maps: int = 2
    bias: bool = True
    norm: Norm | None = None
    merge: int = 1
    averaged: bool = False
    d_hidden: int | None = None

    def __post_init__(self) -> None:
        rules = Rules(self).size("n_maps").size("merge")
        if not rules.broken:
            rules.must("n_maps", "is at most 16", self.n_maps <= 16)
        if self.d_hidden is not None:
            rules.size("d_hidden")
        rules.close()


#: A value, not a call: a frozen default may be shared.
_PROJECTOR = Projector()


@dataclass(frozen=True, slots=True)
class VisionTower:
    """A vision transformer and the projector into the language model's width.

    Patches of `patch` x `patch` pixels and `channels` colours, in each of `frames`; `class_token`
    adds one trained token. `positions` are trained, one per token; without them the layers say
    where a patch stands. A layer whose attention is `Chunked` sees square windows of that many
    patches. The projector reads what
    the first `feature_layer` layers give; those behind and the final norm are then stored and
    never run (LLaVA). None: all layers and the final norm. `both_ways`: in the decoder, tokens
    of an image see the later ones of theirs too (Gemma 3).
    """

    d_model: int
    layers: tuple[Layer, ...]
    image: int
    patch: int
    channels: int = 3
    class_token: bool = True
    patch_bias: bool = False
    positions: bool = True
    pre_norm: Norm | None = None
    final_norm: Norm | None = None
    projector: Projector = _PROJECTOR
    feature_layer: int | None = None
    both_ways: bool = False
    frames: int = 1

    def __post_init__(self) -> None:
        rules = Rules(self).size("d_model").size("image").size("patch").size("channels")
        rules.size("frames")
        if not rules.broken:
            rules.divides("patch", "image")
        if not rules.broken:
            side = self.image // self.patch
            rules.must("projector.merge", f"divides the image's {side} patches a side",
                       side % self.projector.merge == 0)  # fmt: skip
        if self.feature_layer is not None:
            rules.size("feature_layer", least=0)
            if not rules.broken:
                rules.must("feature_layer", f"is at most the {len(self.layers)} layers",
                           self.feature_layer <= len(self.layers))  # fmt: skip
        check_layers(rules, self.layers)
        rules.close()

    @property
    def tokens_of_image(self) -> int:
        """How many tokens of an image the decoder reads."""
        return (self.image // self.patch // self.projector.merge) ** 2

    @property
    def n_run(self) -> int:
        """How many of the layers run."""
        return len(self.layers) if self.feature_layer is None else self.feature_layer
