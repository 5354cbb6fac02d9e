"""Learning rates that published laws give for a run. A plan chooses none of them."""

from __future__ import annotations

from dataclasses import dataclass

from isoflop.arch.spec import Experts
from isoflop.count import flops_forward, params
from isoflop.count.flops import BACKWARD
from isoflop.plan.training.work import Work

#: What is neither a layer nor between them: laws of size leave it out.
ENDS = ("embedding", "head")


@dataclass(frozen=True, slots=True)
class Suggested:
    """A peak learning rate of AdamW, and where it is from."""

    learning_rate: float
    by: str


def suggested(work: Work) -> tuple[Suggested, ...]:
    """What laws of dense decoders give; none for other models, of which they did not see any.

    Both were fitted with AdamW (beta 0.9 and 0.95, weight decay 0.1) at the batch that trains
    best, on runs far smaller than most plans.

    >>> from isoflop.arch import gpt
    >>> small = gpt("gpt2", d_model=768, n_layers=12, n_heads=12, vocab_size=50257, max_seq_len=1024)
    >>> [f"{s.learning_rate:.1e} {s.by}" for s in suggested(Work(small, 10**10, 1024))]
    ['1.4e-03 DeepSeek LLM, 2401.02954, equation 1', '4.7e-03 Step Law, 2503.04715, equation 1']
    """
    arch = work.arch
    towers = arch.encoder is not None or arch.vision is not None
    if towers or any(isinstance(layer.feed_forward, Experts) for layer in arch.layers):
        return ()
    return (
        Suggested(of_compute(_flops_of_layers(work)), "DeepSeek LLM, 2401.02954, equation 1"),
        Suggested(of_size_and_tokens(_params_of_layers(work), work.tokens),
                  "Step Law, 2503.04715, equation 1"),
    )  # fmt: skip


def of_compute(flops: float) -> float:
    """DeepSeek LLM (2401.02954), equation 1: 0.3118 C^-0.125, C without the vocabulary's FLOPs."""
    return float(0.3118 * flops**-0.1250)


def of_size_and_tokens(n_params: float, tokens: float) -> float:
    """Step Law (Li 2025, 2503.04715), equation 1: 1.79 N^-0.713 D^0.307, N without embeddings."""
    return float(1.79 * n_params**-0.713 * tokens**0.307)


def _params_of_layers(work: Work) -> int:
    return int(sum(c.value for c in params(work.arch).children if c.name not in ENDS))


def _flops_of_layers(work: Work) -> float:
    """Forward and backward, over all tokens and all scores, as the law's M D."""
    forward = flops_forward(work.arch, work.batch(1)).children
    per_sequence = sum(float(child.value) for child in forward if child.name not in ENDS)
    return (1 + BACKWARD) * per_sequence / work.seq_len * work.tokens
