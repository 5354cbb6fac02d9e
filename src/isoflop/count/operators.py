"""The kinds of work a model does, each with its FLOPs and the bytes it must move.

Sizes are per forward pass and per copy of the part. Only multiply-accumulates count as
FLOPs (two each), the field's convention; pointwise work is priced by its bytes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, TypeAlias

from isoflop.quantity import Expr, number

#: What may be done to scores: a soft cap, a trained logit per head that joins the softmax,
#: ALiBi's slopes, trained biases, scores of distances (Transformer-XL), dropout of probabilities.
BesideScores: TypeAlias = Literal["softcap", "sinks", "alibi", "bias", "distances", "dropout"]


@dataclass(frozen=True, slots=True)
class Matmul:
    """[rows, inner] x [inner, cols], the second factor a weight. 2 rows inner cols FLOPs.

    `input_fixed` says that the first depends on no weight, so that nobody asks its gradient.
    """

    rows: Expr
    inner: Expr
    cols: Expr
    bias: bool = False
    input_fixed: bool = False

    @property
    def flops(self) -> Expr:
        return 2 * self.rows * self.inner * self.cols

    @property
    def elements_weight(self) -> Expr:
        return self.inner * self.cols

    @property
    def elements_moved(self) -> Expr:
        """Activations read and written, weights apart."""
        return self.rows * (self.inner + self.cols)


@dataclass(frozen=True, slots=True)
class Core:
    """softmax(q k^T) v for `heads` query heads over `kv_heads` key-value heads.

    `seen` keys are scored per query, `keys` exist. Two products:
    2 B N T S (d_key + d_value) FLOPs. `beside` is what else is done to scores, which not every
    fused kernel can.
    """

    batch: Expr
    heads: Expr
    kv_heads: Expr
    queries: Expr
    seen: Expr
    keys: Expr
    d_key: Expr
    d_value: Expr
    beside: tuple[BesideScores, ...] = ()

    @property
    def flops(self) -> Expr:
        pairs = self.batch * self.heads * self.queries * self.seen
        if self.d_key == self.d_value:
            return 4 * pairs * self.d_key
        return 2 * pairs * (self.d_key + self.d_value)

    @property
    def elements_weight(self) -> Expr:
        return number(0)

    @property
    def elements_moved(self) -> Expr:
        """Queries in, output out, keys and values in: scores stay on the chip (flash)."""
        width = self.d_key + self.d_value
        return self.batch * (self.queries * self.heads + self.keys * self.kv_heads) * width


@dataclass(frozen=True, slots=True)
class Pointwise:
    """Work that is limited by the elements it reads and writes: norms, activations, adds.

    `kind` names the kernel; `rows` is set where the work reduces along rows.
    """

    kind: str
    reads: Expr
    writes: Expr
    rows: Expr | None = None

    @property
    def flops(self) -> Expr:
        return number(0)

    @property
    def elements_weight(self) -> Expr:
        return number(0)

    @property
    def elements_moved(self) -> Expr:
        return self.reads + self.writes


@dataclass(frozen=True, slots=True)
class Gather:
    """`rows` rows of `width` picked from a table of `table` rows."""

    rows: Expr
    width: Expr
    table: Expr

    @property
    def flops(self) -> Expr:
        return number(0)

    @property
    def elements_weight(self) -> Expr:
        return self.rows * self.width

    @property
    def elements_moved(self) -> Expr:
        return self.rows * self.width


@dataclass(frozen=True, slots=True)
class Loss:
    """Cross entropy over `rows` distributions of `classes`."""

    rows: Expr
    classes: Expr

    @property
    def flops(self) -> Expr:
        return number(0)

    @property
    def elements_weight(self) -> Expr:
        return number(0)

    @property
    def elements_moved(self) -> Expr:
        return 2 * self.rows * self.classes


Operator: TypeAlias = Matmul | Core | Pointwise | Gather | Loss
