"""The encoder-decoder (T5, Raffel 2020, 1910.10683): an encoder reads a source both ways, a
decoder writes a target one way and looks at what the encoder made of the source.

Parameter names are a contract, the same paths as in the count trees: those of a decoder, and
`encoder.relative_bias.weight`, `encoder.layers.0.attention.q.weight`, `encoder.final_norm.weight`,
`layers.0.norm_cross.weight`, `layers.0.cross.q.weight`, ...

Letters: B batch · S source tokens · T target tokens · D d_model · V vocab_size.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from isoflop.arch.spec import Arch, Encoder, Full, Layer, RelativeBias
from isoflop.errors import Fault, InputError, Problem
from isoflop.model.attention import Context, KeysValues
from isoflop.model.layer import SEQUENTIAL, SequentialLayer, Source, make_layer
from isoflop.model.loss import head_loss
from isoflop.model.parts import EmbeddingModule, HeadModule, make_norm
from isoflop.model.relative_bias import make_relative_bias, stack_bias


class EncoderModule(nn.Module):
    """Layers in which every token sees every other."""

    def __init__(self, spec: Encoder, d_model: int) -> None:
        super().__init__()
        self.relative_bias = make_relative_bias(spec.layers)
        self.layers = nn.ModuleList(make_layer(x, d_model, causal=False) for x in spec.layers)
        self.final_norm = make_norm(spec.final_norm, d_model)

    def forward(self, x_BSD: Tensor, mask_BS: Tensor | None = None) -> Tensor:
        context = Context(bias=stack_bias(self.relative_bias, x_BSD.shape[1], mask_BS))
        for layer in self.layers:
            x_BSD = layer(x_BSD, context)
        y_BSD: Tensor = self.final_norm(x_BSD)
        return y_BSD


class EncoderDecoder(nn.Module):
    """A language model that reads a source and writes a target; `build` makes one.

    The embedding's dropout is that of the input and of the output of both stacks (section 2.1).
    """

    def __init__(self, arch: Arch) -> None:
        super().__init__()
        if arch.encoder is None:
            raise Fault(f"{arch.name} has no encoder")
        self.arch = arch
        self.embedding = EmbeddingModule(arch)
        self.encoder = EncoderModule(arch.encoder, arch.d_model)
        self.relative_bias = make_relative_bias(arch.layers)
        self.layers = nn.ModuleList(make_layer(layer, arch.d_model) for layer in arch.layers)
        self.final_norm = make_norm(arch.final_norm, arch.d_model)
        self.head = HeadModule(arch.head, arch.embedding.n_rows, arch.d_model)

    def forward(
        self,
        source_BS: Tensor,
        target_BT: Tensor,
        source_mask: Tensor | None = None,
        *,
        targets_BT: Tensor | None = None,
    ) -> Tensor:
        """Logits [B, T, V] of the token after each of the target, or with targets their `loss`.

        `source_mask` [B, S] is true where a source has a token and false where it is padded.

        Raises:
            InputError: a mask that is not boolean or not of the source's shape.
        """
        memory_BSD = self.encode(source_BS, source_mask)
        x_BTD = self._read(target_BT, memory_BSD, source_mask)
        if targets_BT is None:
            return self.read_out(x_BTD)
        embedding_VD = self.embedding.tokens.weight
        return head_loss(self.head, x_BTD, embedding_VD, targets_BT, self.arch.vocab_size)

    def loss(
        self,
        source_BS: Tensor,
        tokens_BT: Tensor,
        targets_BT: Tensor,
        source_mask: Tensor | None = None,
    ) -> Tensor:
        """Mean cross entropy in nats of `targets_BT` after `tokens_BT`; -100 is left out."""
        loss: Tensor = self(source_BS, tokens_BT, source_mask, targets_BT=targets_BT)
        return loss

    def encode(self, source_BS: Tensor, source_mask: Tensor | None = None) -> Tensor:
        """What the encoder makes of a source, [B, S, D]."""
        self._check(source_BS, source_mask)
        return self._drop(self.encoder(self._embed(source_BS), source_mask))

    def keys_values(self, memory_BSD: Tensor) -> tuple[KeysValues, ...]:
        """Each layer's keys and values of an encoder's output, for `decode` to read again and again."""
        return tuple(
            layer.cross.keys_values(memory_BSD, Context()) for layer in self._decoder_layers()
        )

    def decode(
        self,
        target_BT: Tensor,
        memory: Tensor | Sequence[KeysValues],
        source_mask: Tensor | None = None,
    ) -> Tensor:
        """Logits [B, T, V], from what `encode` or `keys_values` gave; padded rows are cut off."""
        return self.read_out(self._read(target_BT, memory, source_mask))

    def _read(
        self,
        target_BT: Tensor,
        memory: Tensor | Sequence[KeysValues],
        source_mask: Tensor | None = None,
    ) -> Tensor:
        """What the final norm leaves of a whole target, [B, T, D]."""
        x_BTD = self._embed(target_BT)
        context = Context(bias=stack_bias(self.relative_bias, x_BTD.shape[1]))
        told = [context] * len(self.layers)
        return self.through_layers(x_BTD, told, memory, source_mask)

    def through_layers(
        self,
        x_BTD: Tensor,
        told: Sequence[Context],
        memory: Tensor | Sequence[KeysValues],
        source_mask: Tensor | None = None,
    ) -> Tensor:
        """What the decoder's final norm leaves, [B, T, D]; each layer is told its own context."""
        seen_B11S = None if source_mask is None else source_mask[:, None, None]
        for i, (context, layer) in enumerate(zip(told, self.layers, strict=True)):
            read = memory if isinstance(memory, Tensor) else memory[i]
            x_BTD = layer(x_BTD, context, Source(read, seen_B11S))
        return self._drop(self.final_norm(x_BTD))

    def read_out(self, x_BTD: Tensor) -> Tensor:
        """Logits [B, T, V] from what the final norm left; padded rows are cut off."""
        logits_BTV: Tensor = self.head(x_BTD, self.embedding.tokens.weight)
        return logits_BTV[..., : self.arch.vocab_size]

    def _embed(self, tokens_BT: Tensor) -> Tensor:
        positions_T = torch.arange(tokens_BT.shape[1], device=tokens_BT.device)
        x_BTD: Tensor = self.embedding(tokens_BT, positions_T)
        return x_BTD

    def _drop(self, x_BTD: Tensor) -> Tensor:
        return F.dropout(x_BTD, self.arch.embedding.dropout, self.training)

    def _decoder_layers(self) -> Iterator[SequentialLayer]:
        for layer in self.layers:
            assert isinstance(layer, SequentialLayer)
            yield layer

    def _check(self, source_BS: Tensor, mask: Tensor | None) -> None:
        if mask is None or (mask.dtype == torch.bool and mask.shape == source_BS.shape):
            return
        rule = f"is boolean (true: a token) and has the source's shape {tuple(source_BS.shape)}"
        problem = Problem("source_mask", f"{mask.dtype} {tuple(mask.shape)}", rule)
        raise InputError(self.arch.name, [problem])


def encoder_decoder_problems(arch: Arch, encoder: Encoder) -> Iterator[Problem]:
    """What of an encoder-decoder is not built, beside what no model has.

    Positions in the embedding are refused because the spec does not say which stack has them.
    """
    if arch.embedding.position is not None:
        rule = "is None where there is an encoder: relative_bias is built"
        yield Problem("embedding.position", arch.embedding.position.kind, rule)
    for place, layers in (("encoder.layers", encoder.layers), ("layers", arch.layers)):
        for layer in dict.fromkeys(layers):
            if not isinstance(position := layer.attention.position, RelativeBias | None):
                rule = "is relative_bias or None where there is an encoder"
                yield Problem(f"{place}.{layer.name}.attention.position", position.kind, rule)
    for layer in dict.fromkeys(arch.layers):
        yield from _cross_problems(f"layers.{layer.name}", layer)


def _cross_problems(place: str, layer: Layer) -> Iterator[Problem]:
    if layer.cross is None:
        yield Problem(f"{place}.cross", None, "is given in every layer, or there is no encoder")
        return
    if layer.cross.position is not None:
        yield Problem(f"{place}.cross.position", layer.cross.position.kind, "is None")
    if not isinstance(layer.cross.span, Full):
        yield Problem(f"{place}.cross.span", layer.cross.span.kind, "is full")
    if layer.wiring not in SEQUENTIAL:
        rule = f"is one of {', '.join(SEQUENTIAL)} where there is an encoder"
        yield Problem(f"{place}.wiring", layer.wiring, rule)
