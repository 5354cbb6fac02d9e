"""A model that reads on: tokens in, logits of the token after each text out.

`Cached` keeps what it has read; `Recomputed` reads everything again, which is slower by a factor
that grows with the text and is what a cache is held against.

Letters: B batch · T new tokens · S source tokens · D d_model · V vocab_size.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Protocol, TypeAlias

import torch
from torch import Tensor

from isoflop.infer.cache import Advance, Cache, LayerMemory, slots_of
from isoflop.model import Decoder, EncoderDecoder, KeysValues
from isoflop.model.attention import Context, contexts, continued_contexts, span_of
from isoflop.model.relative_bias import stack_bias

Model: TypeAlias = Decoder | EncoderDecoder


@dataclass(frozen=True, slots=True)
class Encoded:
    """What an encoder made of a batch's sources, read once: each layer's keys and values."""

    layers: tuple[KeysValues, ...]
    mask: Tensor | None  # boolean [B, S], None where no source is padded

    @classmethod
    def of(cls, model: EncoderDecoder, sources: Sequence[Sequence[int]]) -> Encoded:
        source_BS = padded(sources, model.embedding.tokens.weight.device)
        lengths = torch.tensor([len(x) for x in sources], device=source_BS.device)
        mask = None
        if len(set(map(len, sources))) > 1:
            mask = torch.arange(source_BS.shape[1], device=source_BS.device) < lengths[:, None]
        made = model.keys_values(model.encode(source_BS, mask))
        return cls(tuple(KeysValues(_by_head(x.k_BSKH), _by_head(x.v_BSKH)) for x in made), mask)

    @property
    def bytes_kv_cache(self) -> int:
        both = (x for layer in self.layers for x in (layer.k_BSKH, layer.v_BSKH))
        return sum(x.numel() * x.element_size() for x in both)


def _by_head(x_BSKH: Tensor) -> Tensor:
    """The same, stored with each head's tokens side by side."""
    return x_BSKH.transpose(1, 2).contiguous().transpose(1, 2)


def padded(rows: Sequence[Sequence[int]], device: torch.device) -> Tensor:
    """[B, T]: rows of tokens, those that end early followed by token 0, which nothing reads."""
    longest = max(map(len, rows))
    return torch.tensor([[*row, *[0] * (longest - len(row))] for row in rows], device=device)


class Reader(Protocol):
    """Reads texts on, all of a batch at once."""

    bytes_kv_cache: int

    def read(self, tokens_BT: Tensor, counts: Sequence[int]) -> Tensor:
        """Logits [B, V] after the last of `counts[b]` new tokens of each text b."""


class Cached:
    """Reads new tokens alone: what earlier ones left is in a cache."""

    def __init__(
        self, model: Model, batch: int, n_tokens: int, encoded: Encoded | None = None
    ) -> None:
        """Room for `batch` texts of `n_tokens`."""
        weight = model.embedding.tokens.weight
        self.model, self.encoded = model, encoded
        self.cache = Cache(model.arch, batch, n_tokens, dtype=weight.dtype, device=weight.device)
        self.bytes_kv_cache = self.cache.bytes_kv_cache + (
            0 if encoded is None else encoded.bytes_kv_cache
        )

    def read(self, tokens_BT: Tensor, counts: Sequence[int]) -> Tensor:
        """As `Reader`."""
        return _read_out(self.model, self.hidden(tokens_BT, counts), counts)

    def hidden(self, tokens_BT: Tensor, counts: Sequence[int]) -> Tensor:
        """What the final norm leaves of every new token, [B, T, D]; padding's is nonsense."""
        model, cache = self.model, self.cache
        advance = cache.advance(counts, tokens_BT.shape[1])
        spans = {name: span_of(kind.attention) for name, kind in model.arch.kinds.items()}
        places = {
            name: advance.places(span, slots_of(span, cache.n_tokens))
            for name, span in spans.items()
        }
        position_BT = advance.positions()
        x_BTD = model.embedding(tokens_BT, position_BT)
        if advance.first:
            told = _contexts(model, x_BTD, position_BT)
        else:
            keys = {name: place.keys() for name, place in places.items()}
            told = continued_contexts(model.arch, x_BTD, position_BT, keys, model.relative_bias)
        each = [
            replace(told[layer.name], memory=LayerMemory(stores, places[layer.name]))
            for layer, stores in zip(model.arch.layers, cache.stores, strict=True)
        ]
        return _through(model, x_BTD, each, self.encoded)


class Recomputed:
    """Keeps the tokens alone, and reads all of them again at every step."""

    bytes_kv_cache = 0

    def __init__(
        self, model: Model, batch: int, n_tokens: int, encoded: Encoded | None = None
    ) -> None:
        device = model.embedding.tokens.weight.device
        self.model, self.encoded = model, encoded
        self.tokens = torch.zeros(batch, n_tokens, dtype=torch.int64, device=device)
        self.lengths = [0] * batch

    def read(self, tokens_BT: Tensor, counts: Sequence[int]) -> Tensor:
        """As `Reader`."""
        for row, (start, count) in enumerate(zip(self.lengths, counts, strict=True)):
            self.tokens[row, start : start + count] = tokens_BT[row, :count]
        self.lengths = [a + b for a, b in zip(self.lengths, counts, strict=True)]
        n_columns = max(self.lengths)
        advance = Advance.of([0] * len(counts), self.lengths, n_columns, self.tokens.device)
        position_BT = advance.positions()
        x_BTD = self.model.embedding(self.tokens[:, :n_columns], position_BT)
        told = _contexts(self.model, x_BTD, position_BT)
        each = [told[layer.name] for layer in self.model.arch.layers]
        return _read_out(self.model, _through(self.model, x_BTD, each, self.encoded), self.lengths)


def _contexts(model: Model, x_BTD: Tensor, position_BT: Tensor) -> Mapping[str, Context]:
    """Of texts read from their beginning: none sees the padding behind it."""
    bias = stack_bias(model.relative_bias, x_BTD.shape[1])
    return contexts(model.arch, x_BTD, bias, position_BT)


def _through(
    model: Model, x_BTD: Tensor, told: Sequence[Context], encoded: Encoded | None
) -> Tensor:
    if isinstance(model, EncoderDecoder):
        assert encoded is not None
        return model.through_layers(x_BTD, told, encoded.layers, encoded.mask)
    return model.through_layers(x_BTD, told)


def _read_out(model: Model, x_BTD: Tensor, counts: Sequence[int]) -> Tensor:
    """Logits [B, V] after each text's last token: the head is a large matrix, and works on no other."""
    last_B = torch.tensor(counts, device=x_BTD.device) - 1
    rows_B = torch.arange(len(counts), device=x_BTD.device)
    return model.read_out(x_BTD[rows_B, last_B])
