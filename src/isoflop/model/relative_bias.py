"""T5's positions (Raffel 2020, 1910.10683, section 2.1): a trained number per head and bucket of
distances, added to the scores. A stack's layers share one table, so it is read once a pass.

Letters: B batch · T query tokens · S key tokens · N heads.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from isoflop.arch.spec import Attention, Layer, RelativeBias
from isoflop.errors import Problem


def distance_buckets(distance: Tensor, spec: RelativeBias) -> Tensor:
    """The bucket of each distance, key less query.

    Half of the buckets are for one distance each, the others grow logarithmically up to
    `max_distance`; all beyond share the last. Both ways each direction has half of the
    buckets; otherwise later keys, which a causal mask hides, share the bucket of distance 0.

    >>> spec = RelativeBias(n_buckets=8, max_distance=20)
    >>> distance_buckets(-torch.arange(12), spec).tolist()
    [0, 1, 2, 3, 4, 4, 5, 5, 5, 6, 6, 6]
    """
    n_buckets, first = spec.n_buckets, torch.zeros_like(distance)
    if spec.bidirectional:
        n_buckets //= 2
        first, distance = (distance > 0) * n_buckets, -distance.abs()
    back = (-distance).clamp_min(0)
    exact = n_buckets // 2
    # Single precision and this order of operations, which are those of transformers, decide the
    # bucket where the logarithm is a whole number: distance 20 of (10 buckets, 160) for one.
    share = torch.log(back.clamp_min(1).float() / exact) / math.log(spec.max_distance / exact)
    far = exact + (share * (n_buckets - exact)).long()
    return first + torch.where(back < exact, back, far.clamp_max(n_buckets - 1))


class RelativeBiasModule(nn.Module):
    """The table of a stack, and the biases of its scores."""

    def __init__(self, spec: RelativeBias, n_heads: int) -> None:
        super().__init__()
        self.spec = spec
        self.weight = nn.Parameter(torch.empty(spec.n_buckets, n_heads))

    def forward(self, n_queries: int, n_keys: int) -> Tensor:
        """[1, N, T, S]; the last query stands at the last key."""
        key_S = torch.arange(n_keys, device=self.weight.device)
        query_T1 = key_S[n_keys - n_queries :, None]
        return self.of((key_S - query_T1)[None])

    def of(self, distance_BTS: Tensor) -> Tensor:
        """[B, N, T, S], of distances, key less query."""
        bias_BTSN = F.embedding(distance_buckets(distance_BTS, self.spec), self.weight)
        return bias_BTSN.permute(0, 3, 1, 2)


def make_relative_bias(layers: Sequence[Layer]) -> RelativeBiasModule | None:
    """The one table that a stack's layers share; None where they have other positions."""
    match layers[0].attention:
        case Attention(position=RelativeBias() as spec, n_heads=n_heads):
            return RelativeBiasModule(spec, n_heads)
    return None


def stack_bias(
    table: RelativeBiasModule | None, n_tokens: int, mask_BS: Tensor | None = None
) -> Tensor | None:
    """What self-attention takes beside its tokens: distances' biases, -inf where padding stands.

    Boolean (true: seen) without a table; None where there is neither.
    """
    bias_1NSS = None if table is None else table(n_tokens, n_tokens)
    if mask_BS is None:
        return bias_1NSS
    seen_B11S = mask_BS[:, None, None]
    return seen_B11S if bias_1NSS is None else bias_1NSS.masked_fill(~seen_B11S, -torch.inf)


def relative_bias_problems(
    place: str, layers: Sequence[Layer], *, both_ways: bool
) -> Iterator[Problem]:
    """What keeps a stack, whose tokens see later ones where `both_ways`, from having one table."""
    blocks = [layer.attention for layer in layers]
    told = {
        (block.position, block.n_heads)
        for block in blocks
        if isinstance(block, Attention) and isinstance(block.position, RelativeBias)
    }
    without = [block for block in blocks if not isinstance(block.position, RelativeBias)]
    if len(told) > 1 or (told and without):
        rule = "is the same relative_bias, over as many heads, in all layers of a stack or in none"
        kinds = sorted({block.position.kind if block.position else "None" for block in blocks})
        yield Problem(f"{place}.attention.position", ", ".join(kinds), rule)
    for position, _ in told:
        if isinstance(position, RelativeBias):
            yield from _table_problems(f"{place}.attention.position", position, both_ways)


def _table_problems(place: str, spec: RelativeBias, both_ways: bool) -> Iterator[Problem]:
    if not spec.shared:
        yield Problem(f"{place}.shared", spec.shared, "is True: a stack has one table")
    if spec.bidirectional != both_ways:
        rule = f"is {both_ways}: later tokens are {'seen' if both_ways else 'hidden'} here"
        yield Problem(f"{place}.bidirectional", spec.bidirectional, rule)
    exact = spec.n_buckets // (4 if spec.bidirectional else 2)
    if exact < 1:
        rule = "is at least 4 both ways, 2 one way: some buckets are for one distance"
        yield Problem(f"{place}.n_buckets", spec.n_buckets, rule)
    elif spec.max_distance <= exact:
        rule = f"exceeds {exact}, the distances with a bucket each"
        yield Problem(f"{place}.max_distance", spec.max_distance, rule)
