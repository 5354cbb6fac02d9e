"""What a model is asked to do: how many sequences, tokens and keys, at which precision."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from isoflop.errors import InputError, Problem
from isoflop.quantity import Expr, Symbol, number


class Precision(StrEnum):
    """How a number is stored, and how many bytes that takes."""

    FP32 = "fp32"
    BF16 = "bf16"
    FP16 = "fp16"
    FP8 = "fp8"
    INT8 = "int8"
    INT4 = "int4"

    @property
    def bytes_each(self) -> Expr:
        """Bytes per stored number; int4 packs two in a byte, scales come on top.

        >>> Precision.BF16.bytes_each.digits
        '2'
        """
        bits = {"fp32": 32, "bf16": 16, "fp16": 16, "fp8": 8, "int8": 8, "int4": 4}[self.value]
        size = Symbol(f"bytes_{self.value}", bits // 8 or 1, meaning=f"bytes of one {self.value}")
        return size if bits >= 8 else size / 2


@dataclass(frozen=True, slots=True)
class Workload:
    """`batch` sequences of `seq_len` query tokens that see `context` keys each.

    Training and prefill have context = seq_len; decoding one token has seq_len = 1 and
    context the tokens held in the cache. `causal_skip` counts only the query-key pairs
    that a causal mask leaves; otherwise every pair is counted, as a kernel without
    skipping computes it and as PyTorch's FLOP counter counts it.

    `source_len` is what an encoder reads (None: as many tokens as there are keys), `images`
    how many a vision tower sees per sequence; their tokens are part of `seq_len`. Models
    without an encoder or a tower heed neither.

    >>> Workload.train(batch=8, seq_len=2048).tokens.value
    16384
    """

    batch: int
    seq_len: int
    context: int
    causal_skip: bool = False
    source_len: int | None = None
    images: int = 1

    def __post_init__(self) -> None:
        bad = [
            Problem(field, value, "is a whole number from 1 (images: 0) to 1e12")
            for field in ("batch", "seq_len", "context", "source_len", "images")
            if field != "source_len" or self.source_len is not None
            if not isinstance(value := getattr(self, field), int)
            or isinstance(value, bool)
            or not (field != "images") <= value <= 10**12
        ]
        if not bad and self.context < self.seq_len:
            rule = f"is at least seq_len={self.seq_len}: a query sees itself"
            bad = [Problem("context", self.context, rule)]
        if bad:
            raise InputError("workload", bad)

    @classmethod
    def train(cls, batch: int, seq_len: int, *, causal_skip: bool = False) -> Workload:
        """A training or prefill pass over whole sequences."""
        return cls(batch, seq_len, seq_len, causal_skip)

    @classmethod
    def decode(cls, batch: int, context: int) -> Workload:
        """One new token per sequence, `context` tokens seen, itself included."""
        return cls(batch, 1, context)

    @property
    def B(self) -> Symbol:  # noqa: N802 - the alphabet's letter
        return Symbol("batch", self.batch, meaning="sequences at once")

    @property
    def T(self) -> Symbol:  # noqa: N802
        return Symbol("seq_len", self.seq_len, meaning="query tokens per sequence")

    @property
    def S(self) -> Symbol:  # noqa: N802
        """Keys per query; the symbol of the queries themselves where the two are one."""
        if self.context == self.seq_len:
            return self.T
        return Symbol("context", self.context, meaning="keys per query")

    @property
    def whole(self) -> bool:
        """Whether whole sequences are read, not tokens against a cache."""
        return self.context == self.seq_len

    @property
    def source(self) -> Expr:
        """Tokens per sequence that an encoder reads."""
        if self.source_len is None:
            return self.S
        return Symbol("source_len", self.source_len, meaning="tokens that the encoder reads")

    @property
    def images_read(self) -> Expr:
        """Images per sequence that go through the vision tower in this pass."""
        if not self.whole:
            return number(0)
        return Symbol("images", self.images, meaning="images per sequence")

    @property
    def tokens(self) -> Expr:
        """Query tokens in all."""
        return self.B * self.T
