"""Key-value caches: what decoding keeps of the tokens before, allocated once.

A layer that sees all keeps every token; one with a window, chunks or local blocks keeps a ring of
as many as it can see; latent attention keeps the latent and the rotated key all heads share.
Texts of a batch may be of different lengths: each has its own positions, a token's slot is its
position modulo the ring, and padding is never kept.

Letters: B batch · T new tokens · S slots that are read · C slots of a layer · K heads that are
kept · H their width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from isoflop.arch.spec import (
    Arch,
    Attention,
    BlockSparse,
    Chunked,
    Full,
    LatentAttention,
    Span,
    Window,
)
from isoflop.model.attention import Keys, span_of


def slots_of(span: Span, n_tokens: int) -> int:
    """How many tokens of a text of `n_tokens` a layer has to keep.

    >>> slots_of(Window(4), 100), slots_of(BlockSparse(block=8, n_local=2), 100), slots_of(Full(), 100)
    (4, 16, 100)
    """
    match span:
        case Window(window=n) | Chunked(chunk=n):
            return min(n, n_tokens)
        case BlockSparse(block=block, n_local=n_local, stride=0):
            return min(block * n_local, n_tokens)
    return n_tokens  # with a stride, which keys a later query needs depends on where it stands


def widths_of(spec: Attention | LatentAttention) -> tuple[tuple[int, int], ...]:
    """Heads and width of each thing kept per token: keys and values, or both in one latent."""
    if isinstance(spec, LatentAttention):
        return ((1, spec.d_kv_latent + spec.d_head_rope),)
    return ((spec.n_kv_heads, spec.d_head),) * 2


class Cache:
    """The slots of every layer, and how many tokens of each text have been read."""

    def __init__(
        self,
        arch: Arch,
        batch: int,
        n_tokens: int,
        *,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> None:
        """Room for `batch` texts of at most `n_tokens`."""
        self.arch = arch
        self.n_tokens = n_tokens
        self.lengths = [0] * batch
        # Heads before slots: a head's keys lie side by side, and are read at full speed.
        self.stores = tuple(
            tuple(
                torch.zeros(
                    batch, heads, slots_of(span_of(x), n_tokens), width, dtype=dtype, device=device
                )
                for heads, width in widths_of(x)
            )
            for x in arch.attentions()
        )

    @property
    def bytes_kv_cache(self) -> int:
        return sum(x.numel() * x.element_size() for stores in self.stores for x in stores)

    def advance(self, n_new: Sequence[int], n_columns: int) -> Advance:
        """Where so many new tokens of each text go, padded to `n_columns`; they count as read."""
        device = self.stores[0][0].device
        advance = Advance.of(self.lengths, n_new, n_columns, device)
        self.lengths = [a + b for a, b in zip(self.lengths, n_new, strict=True)]
        return advance


@dataclass(frozen=True, slots=True)
class Advance:
    """New tokens in a batch of texts: how many have been read of each, and come now.

    Where all texts are alike one row stands for them.
    """

    starts: tuple[int, ...]
    counts: tuple[int, ...]
    batch: int
    n_columns: int
    device: torch.device

    @classmethod
    def of(
        cls, starts: Sequence[int], counts: Sequence[int], n_columns: int, device: torch.device
    ) -> Advance:
        batch = len(starts)
        if len(set(zip(starts, counts, strict=True))) == 1:
            starts, counts = starts[:1], counts[:1]
        return cls(tuple(starts), tuple(counts), batch, n_columns, device)

    @property
    def first(self) -> bool:
        """Whether nothing has been read before."""
        return not any(self.starts)

    @property
    def alike(self) -> bool:
        """Whether texts are as long as each other, and none is padded."""
        return len(self.starts) == 1 and self.counts[0] == self.n_columns

    @property
    def longest(self) -> int:
        """Tokens of the longest text, the new ones among them."""
        return max(a + b for a, b in zip(self.starts, self.counts, strict=True))

    def positions(self) -> Tensor:
        """[B, T], or [1, T] for all texts; padding stands where its text's last token does."""
        starts_B1, counts_B1 = self.bounds()
        return starts_B1 + torch.minimum(self.columns(), counts_B1 - 1)

    def bounds(self) -> tuple[Tensor, Tensor]:
        """Starts and counts, each [B, 1] or [1, 1]."""
        both = torch.tensor((self.starts, self.counts), device=self.device)[..., None]
        return both[0], both[1]

    def columns(self) -> Tensor:
        """[T]"""
        return torch.arange(self.n_columns, device=self.device)

    def places(self, span: Span, n_slots: int) -> Places:
        """What layers with such a span and so many slots do with these tokens."""
        joined = self.longest > n_slots and self.n_columns > 1 and not self.first
        n_read = min(n_slots, max(self.starts) if joined else self.longest)
        at = self.starts[0] % n_slots
        in_a_run = self.alike and at + self.n_columns <= n_slots
        into = slice(at, at + self.n_columns) if in_a_run else self._scattered(n_slots)
        return Places(self, span, n_slots, n_read, joined, into)

    def _scattered(self, n_slots: int) -> Scattered:
        """Of each text the latest tokens that have room."""
        starts_B1, counts_B1 = (x.expand(self.batch, 1) for x in self.bounds())
        position_BT = starts_B1 + self.columns()
        if self.n_columns == 1:  # asking a GPU which are kept would make it wait
            rows = torch.arange(self.batch, device=self.device)
            return Scattered(rows, torch.zeros_like(rows), position_BT[:, 0] % n_slots)
        latest_BT = self.columns() >= counts_B1 - n_slots
        rows, tokens = (latest_BT & (self.columns() < counts_B1)).nonzero(as_tuple=True)
        return Scattered(rows, tokens, position_BT[rows, tokens] % n_slots)


@dataclass(frozen=True, slots=True)
class Scattered:
    """Row and column of each new token that is kept, and the slot that takes it."""

    rows: Tensor
    columns: Tensor
    slots: Tensor


@dataclass(frozen=True, slots=True)
class Places:
    """Which slots new tokens take in the layers of one kind, and what is read then.

    Read are the new tokens alone where nothing was before; the first `n_read` slots, once written;
    or (`joined`), where a ring would lose what the first of several new tokens still see, the
    slots as they were, and the new tokens.
    """

    advance: Advance
    span: Span
    n_slots: int
    n_read: int
    joined: bool
    into: slice | Scattered

    def keys(self) -> Keys:
        """Where stands what is read."""
        starts_B1, counts_B1 = self.advance.bounds()
        last_B1 = starts_B1 - 1 if self.joined else starts_B1 + counts_B1 - 1
        slots = torch.arange(self.n_read, device=self.advance.device)
        # The latest position of the text that falls on the slot; below 0 where there is none.
        position_BS = last_B1 - (last_B1 - slots) % self.n_slots
        if self.joined:
            # Padding stands behind its text, where no query of it looks.
            new_BT = starts_B1 + self.advance.columns()
            position_BS = torch.cat((position_BS, new_BT), dim=1)
        one = self.advance.alike and self.advance.n_columns == 1
        return Keys(position_BS, all_seen=one and isinstance(self.span, Full | Window))

    def write(self, store_BKCH: Tensor, new_BTKH: Tensor) -> None:
        """Put what new tokens made into their slots."""
        if isinstance(self.into, slice):
            store_BKCH[:, :, self.into] = new_BTKH.transpose(1, 2)
        else:
            rows, columns = self.into.rows, self.into.columns
            store_BKCH[rows, :, self.into.slots] = new_BTKH[rows, columns]

    def read(self, store_BKCH: Tensor) -> Tensor:
        """[B, S, K, H], a view."""
        return store_BKCH[:, :, : self.n_read].transpose(1, 2)


@dataclass(frozen=True, slots=True)
class LayerMemory:
    """One layer's slots, and what this pass does with them."""

    stores: tuple[Tensor, ...]  # each [B, K, C, H]
    places: Places

    def extend(self, *new: Tensor) -> tuple[Tensor, ...]:
        """Keep new tokens' [B, T, K, H], and give what is to be read, [B, S, K, H]."""
        places, pairs = self.places, list(zip(self.stores, new, strict=True))
        if places.joined:
            joined = tuple(torch.cat((places.read(store), x), dim=1) for store, x in pairs)
        for store, x in pairs:
            places.write(store, x)
        if places.advance.first:
            return new
        return joined if places.joined else tuple(map(places.read, self.stores))
