"""The whole model."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar

from isoflop.arch.rules import Rules
from isoflop.arch.spec.attention import Attention, LatentAttention
from isoflop.arch.spec.ends import Embedding, Encoder, Head, VisionTower
from isoflop.arch.spec.layer import MAX_LAYERS, Layer, check_layers
from isoflop.arch.spec.norms import Norm
from isoflop.arch.spec.positions import Learned


@dataclass(frozen=True)
class Arch:
    """A language model, whole.

    Attributes:
        name: what it is called; free text of at most 128 printable characters.
        d_model: D, the width of the residual stream.
        vocab_size: V, the number of tokens that can be read and written.
        max_seq_len: the longest context it was made for.
        layers: one `Layer` per layer, first to last; equal layers share one name.

    Raises:
        InputError: any rule broken; all broken rules are listed.
    """

    name: str
    d_model: int
    vocab_size: int
    max_seq_len: int
    embedding: Embedding
    layers: tuple[Layer, ...]
    head: Head
    final_norm: Norm | None
    encoder: Encoder | None = None
    vision: VisionTower | None = None

    MAX_LAYERS: ClassVar[int] = MAX_LAYERS

    def __post_init__(self) -> None:
        rules = Rules(self, where=self.name if isinstance(self.name, str) else "spec")
        rules.text("name").size("d_model").size("vocab_size").size("max_seq_len")
        check_layers(rules, self.layers)
        if not rules.broken:
            rules.must("embedding.n_rows", f"is at least vocab_size={self.vocab_size}",
                       self.embedding.n_rows >= self.vocab_size)  # fmt: skip
            crossed = any(layer.cross for layer in self.layers)
            rules.must("layers.cross", "is set if and only if there is an encoder",
                       crossed == (self.encoder is not None))  # fmt: skip
            learned = self.embedding.position
            if isinstance(learned, Learned):
                rules.must("max_seq_len", f"is at most embedding.position.n_positions="
                           f"{learned.n_positions}", self.max_seq_len <= learned.n_positions)  # fmt: skip
        rules.close()

    def __str__(self) -> str:
        """Its sizes, in one line."""
        return (
            f"{self.name}: {self.n_layers} layers, d_model {self.d_model}, "
            f"vocabulary {self.vocab_size:,}, context {self.max_seq_len:,}"
        )

    @property
    def n_layers(self) -> int:
        return len(self.layers)

    @cached_property
    def kinds(self) -> dict[str, Layer]:
        """The distinct layers by name, in order of first appearance."""
        return {layer.name: layer for layer in self.layers}

    def times(self, name: str) -> int:
        """How many layers are of the kind `name`."""
        return sum(layer.name == name for layer in self.layers)

    def attentions(self) -> Iterator[Attention | LatentAttention]:
        """Each layer's self-attention, first to last."""
        return (layer.attention for layer in self.layers)
