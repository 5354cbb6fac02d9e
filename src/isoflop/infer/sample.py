"""From logits to tokens: pure functions, each on the logits of a batch.

What is ruled out gets minus infinity. A row's draw depends on its own logits, seed and place in
the text alone, so a text is the same in any batch.

Letters: B batch · V vocab_size.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from isoflop.arch.rules import Rules


@dataclass(frozen=True, slots=True)
class Sampling:
    """How the next token is chosen. Temperature 0 takes the likeliest; None leaves a rule out.

    The order is that of transformers: repetition penalty, temperature, top-k, top-p, min-p.

    Raises:
        InputError: a number that its rule cannot have; all are listed.
    """

    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    repetition_penalty: float = 1.0

    def __post_init__(self) -> None:
        rules = Rules(self).real("temperature", least=0).real("repetition_penalty", above=0)
        if self.top_k is not None:
            rules.size("top_k")
        for field in ("top_p", "min_p"):
            share = getattr(self, field)
            if share is not None:
                rules.real(field, above=0)
                if not rules.broken:
                    rules.must(field, "is at most 1", share <= 1)
        for field in ("top_k", "top_p", "min_p"):
            drawn = getattr(self, field) is None or self.temperature != 0
            rules.must(field, "is None at temperature 0, which draws nothing", drawn)
        rules.close()


#: A value, not a call: a frozen default may be shared.
GREEDY = Sampling(temperature=0.0)


def choose(
    logits_BV: Tensor, sampling: Sampling, uniform_B: Tensor, written_BV: Tensor | None = None
) -> Tensor:
    """The next token of each row, [B].

    Args:
        uniform_B: a number from 0 up to, not including, 1 per row: the draw.
        written_BV: true where a token has been read or written; the repetition penalty's.

    >>> logits = torch.tensor([[0.0, 3.0, 2.0]])
    >>> choose(logits, GREEDY, torch.tensor([0.9])).item()
    1
    >>> choose(logits, Sampling(top_k=2), torch.tensor([0.9])).item()
    2
    """
    if written_BV is not None and sampling.repetition_penalty != 1.0:
        logits_BV = penalize(logits_BV.double(), written_BV, sampling.repetition_penalty)
    if sampling.temperature == 0.0:
        return logits_BV.argmax(-1)
    # From the highest down, so that no temperature makes a score infinite.
    logits_BV = logits_BV.double()
    logits_BV = (logits_BV - logits_BV.amax(-1, keepdim=True)) / sampling.temperature
    if sampling.top_k is not None:
        logits_BV = keep_top_k(logits_BV, sampling.top_k)
    if sampling.top_p is not None:
        logits_BV = keep_top_p(logits_BV, sampling.top_p)
    if sampling.min_p is not None:
        logits_BV = keep_min_p(logits_BV, sampling.min_p)
    return draw(logits_BV, uniform_B)


def penalize(logits_BV: Tensor, written_BV: Tensor, penalty: float) -> Tensor:
    """Scores of tokens already there divided by `penalty`, or multiplied where they are negative.

    CTRL (Keskar 2019, 1909.05858, section 4.1), whose scores are positive; the rest is
    transformers'.

    >>> penalize(torch.tensor([[4.0, -4.0, 1.0]]), torch.tensor([[True, True, False]]), 2.0)
    tensor([[ 2., -8.,  1.]])
    """
    punished_BV = torch.where(logits_BV > 0, logits_BV / penalty, logits_BV * penalty)
    finite_BV = punished_BV.nan_to_num()  # the least penalties leave no room for scores
    return torch.where(written_BV, finite_BV, logits_BV)


def keep_top_k(logits_BV: Tensor, k: int) -> Tensor:
    """The k highest (Fan 2018, 1805.04833), and all that equal the lowest of them."""
    k = min(k, logits_BV.shape[-1])
    lowest_B1 = logits_BV.topk(k).values[:, -1:]
    return logits_BV.masked_fill(logits_BV < lowest_B1, -torch.inf)


def keep_top_p(logits_BV: Tensor, p: float) -> Tensor:
    """The fewest likeliest tokens that have probability p together (Holtzman 2019, 1904.09751)."""
    ordered = logits_BV.sort(descending=True, stable=True)
    probability_BV = ordered.values.softmax(-1)
    before_BV = probability_BV.cumsum(-1) - probability_BV
    beyond_BV = before_BV >= p
    beyond_BV[:, 0] = False  # rounding never leaves a row empty
    out_BV = torch.zeros_like(beyond_BV).scatter(-1, ordered.indices, beyond_BV)
    return logits_BV.masked_fill(out_BV, -torch.inf)


def keep_min_p(logits_BV: Tensor, p: float) -> Tensor:
    """The tokens at least p times as likely as the likeliest (Nguyen 2024, 2407.01082)."""
    probability_BV = logits_BV.softmax(-1)
    unlikely_BV = probability_BV < p * probability_BV.amax(-1, keepdim=True)
    return logits_BV.masked_fill(unlikely_BV, -torch.inf)


def draw(logits_BV: Tensor, uniform_B: Tensor) -> Tensor:
    """The token on which a number from 0 to 1 falls when each has its probability's share, [B].

    >>> draw(torch.tensor([[0.5, 0.25, 0.25]] * 3).log(), torch.tensor([0.49, 0.51, 0.76])).tolist()
    [0, 1, 2]
    """
    reached_BV = logits_BV.double().softmax(-1).cumsum(-1)
    place_B1 = (uniform_B.double() * reached_BV[:, -1])[:, None]
    return torch.searchsorted(reached_BV, place_B1, right=True)[:, 0]


def uniforms(seeds: Sequence[int], n: int) -> Tensor:
    """[n, B] numbers from 0 to 1: the draws of n tokens of each row, from its own seed.

    The first of them are the same whatever n is.
    """
    drawn = [
        torch.rand(n, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
        for seed in seeds
    ]
    return torch.stack(drawn, dim=1)
