"""What a CPU runs of attention (isoflop.attention): which kernel, and what that keeps.

PyTorch's fused kernel takes a triangle, a window, every key; with biases or values of another
width than keys every score stands in memory. A soft cap and sinks it has not: they run in ours,
all scores at once for short texts, tile by tile beyond. Milliseconds of forward and backward of 8
heads of 64, 512 tokens, one thread of a busy machine: fused 51, with a mask of a window 56, ALiBi
70, values of another width 73, trained biases 67, dropout 97 (its random numbers are a curve of
their own), a cap 95, sinks 71; up to 256 tokens cap and sinks differ by 8 %, so one curve is theirs.
"""

from __future__ import annotations

from isoflop.count.operators import Core

#: Up to so many pairs of a query and a key, ours hold every score; so does PyTorch's with biases
#: or dropout (isoflop.attention.choice).
FEWEST_SCORES, FEW_SCORES = 256 * 256, 512 * 512
#: Kernels that profiles of before did not time, and what was read in their place.
STANDS_IN = {
    "attention_scores": "attention",
    "attention_own": "attention",
    "dropout": None,
}


def attention_kernel(core: Core) -> str:
    """The calibrated kernel that is what runs, by its name."""
    if "softcap" in core.beside or "sinks" in core.beside:
        return "attention_own"
    fused = core.d_key.value == core.d_value.value and not core.beside
    return "attention" if fused else "attention_scores"


def scores_kept(core: Core) -> int:
    """Tensors of all pairs that wait for backward, in fp32.

    Held all at once: shares, their mask and what it leaves; ours the tanh of a cap and the logits
    of softmax and of its denominator too.
    """
    pairs, beside = core.queries.value * core.keys.value, core.beside
    if "softcap" in beside or "sinks" in beside:
        held = 3 + ("softcap" in beside) + 2 * ("dropout" in beside)
        return held if pairs <= FEWEST_SCORES else 0
    if beside:
        held = 3 if "dropout" in beside else 1
        return held if pairs <= FEW_SCORES else 0
    return int(core.d_key.value != core.d_value.value)
