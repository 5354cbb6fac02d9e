"""One layer: attention, feed-forward, and how they are wired."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from isoflop.arch.rules import Rules
from isoflop.arch.spec.attention import Attention, LatentAttention
from isoflop.arch.spec.feed_forward import FeedForward
from isoflop.arch.spec.norms import Norm

#: Far beyond any real model.
MAX_LAYERS = 10_000

#: What trees call the parts of a model that are no layers; a layer of that name would hide one.
NAMES_TAKEN = frozenset({
    "class_token", "embedding", "encoder", "final_norm", "head", "layer_going_backward", "loss",
    "output", "patches", "positions", "pre_norm", "projector", "tokens", "unread", "vision",
})  # fmt: skip


class Wiring(StrEnum):
    """Where a layer's norms stand.

    pre: x + f(norm(x)) · post: norm(x + f(x)) · output: x + norm(f(x)) (OLMo 2) ·
    sandwich: x + norm(f(norm(x))) (Gemma 2) · parallel: attention and feed-forward read
    one norm (GPT-J, PaLM) · parallel_two_norms: each reads its own (GPT-NeoX)
    """

    PRE = "pre"
    POST = "post"
    OUTPUT = "output"
    SANDWICH = "sandwich"
    PARALLEL = "parallel"
    PARALLEL_TWO_NORMS = "parallel_two_norms"


@dataclass(frozen=True, slots=True)
class Layer:
    """One layer: attention, feed-forward, their norm and how they are wired.

    `name` is the layer's place in every tree (`layer/attention/k`), so it is none of
    `NAMES_TAKEN`; layers of one name are equal. `cross` is attention to an encoder's output.
    """

    attention: Attention | LatentAttention
    feed_forward: FeedForward
    norm: Norm
    wiring: Wiring = Wiring.PRE
    cross: Attention | None = None
    residual_scale: float = 1.0
    dropout: float = 0.0
    name: str = "layer"

    def __post_init__(self) -> None:
        rules = Rules(self).identifier("name").share("dropout").one_of("wiring", tuple(Wiring))
        rules.real("residual_scale", above=0)
        taken = self.name in NAMES_TAKEN or str(self.name).startswith("relative_bias")
        rules.must("name", "is not what the model's own parts are called: relative_bias..., "
                   + ", ".join(sorted(NAMES_TAKEN)), not taken, f"say layer_{self.name}")  # fmt: skip
        rules.close()


def check_layers(rules: Rules, layers: tuple[Layer, ...]) -> None:
    """At least one layer, not absurdly many, and one name per kind."""
    rules.must("layers", f"has 1 to {MAX_LAYERS:,} layers", 1 <= len(layers) <= MAX_LAYERS,
               value=len(layers))  # fmt: skip
    seen: dict[str, Layer] = {}
    for layer in layers:
        if seen.setdefault(layer.name, layer) != layer:
            rules.must("layers.name", "names one kind of layer: unequal layers need two names",
                       False, value=layer.name)  # fmt: skip
            break
