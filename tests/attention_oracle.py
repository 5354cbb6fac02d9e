"""Attention by its definition, one query of one head at a time, and how backends are compared.

Used by every test of attention; nothing of ours is in the oracle.
"""

from __future__ import annotations

import itertools
import math

import torch
from hypothesis import strategies as st

from isoflop.attention import BlockMask


def draw(batch, n_queries, n_keys, n_heads, n_kv_heads, d_head, d_value=None, seed=0):
    """Random queries, keys and values in float64."""
    stream = torch.Generator().manual_seed(seed)
    shapes = (
        (batch, n_queries, n_heads, d_head),
        (batch, n_keys, n_kv_heads, d_head),
        (batch, n_keys, n_kv_heads, d_value or d_head),
    )
    return [torch.randn(s, dtype=torch.float64, generator=stream) for s in shapes]


def by_loops(
    q,
    k,
    v,
    *,
    causal,
    window=None,
    scale=None,
    softcap=None,
    sink_tokens=0,
    sink_logits=None,
    alibi=None,
    bias=None,
    block_mask=None,
):
    """The output, and the log of each row's denominator: the definition, key by key."""
    batch, n_queries, n_heads, d_head = q.shape
    n_keys, n_kv_heads = k.shape[1], k.shape[2]
    scale = 1 / math.sqrt(d_head) if scale is None else scale
    whole = batch, n_heads, n_queries, n_keys
    bias = None if bias is None else bias.expand(whole)
    if block_mask is not None:
        seen, size = block_mask.seen, block_mask.size
        seen = seen.expand(batch, n_heads, *seen.shape[-2:])
    outs, logs = [], []
    for b, t, n in itertools.product(range(batch), range(n_queries), range(n_heads)):
        here, shared = n_keys - n_queries + t, n // (n_heads // n_kv_heads)
        keys, scores = [], []
        for s in range(n_keys):
            far = window is not None and s <= here - window and s >= sink_tokens
            if (causal and s > here) or far:
                continue
            if block_mask is not None and not seen[b, n, t // size, s // size]:
                continue
            if bias is not None and (
                bias[b, n, t, s] == (False if bias.dtype == torch.bool else -math.inf)
            ):
                continue
            score = (q[b, t, n] * k[b, s, shared]).sum() * scale
            score = score if softcap is None else torch.tanh(score / softcap) * softcap
            score = score if alibi is None else score - alibi[n] * abs(here - s)
            if bias is not None and bias.dtype != torch.bool:
                score = score + bias[b, n, t, s]
            keys.append(s)
            scores.append(score)
        total = sum((score.exp() for score in scores), q.new_zeros(()))
        if sink_logits is not None:
            total = total + sink_logits[n].exp()
        out = v.new_zeros(v.shape[-1])
        for s, score in zip(keys, scores, strict=True):
            out = out + score.exp() / total * v[b, s, shared]
        outs.append(out)
        logs.append(total.log())
    shape = batch, n_queries, n_heads
    return torch.stack(outs).view(*shape, -1), torch.stack(logs).view(shape)


def values_and_gradients(function, inputs, dtype=torch.float64):
    """The outputs, and the gradients of a fixed weighting of them; -inf has no weight."""
    leaves = [x.to(dtype).requires_grad_() for x in inputs]
    made = function(*leaves)
    outs = made if isinstance(made, tuple) else (made,)
    stream = torch.Generator().manual_seed(9)
    weights = [torch.randn(o.shape, dtype=torch.float64, generator=stream) for o in outs]
    finite = [o.masked_fill(o == -torch.inf, 0.0) for o in outs]
    loss = sum((o.double() * w).sum() for o, w in zip(finite, weights, strict=True))
    # Where no key is seen the definition uses no input: each then has a gradient of 0.
    unused = sum(0.0 * x.double().sum() for x in leaves)
    grads = torch.autograd.grad(loss + unused, leaves)
    return [*(o.detach() for o in outs), *grads]


def assert_equal(got, expected, bound):
    for g, e in zip(got, expected, strict=True):
        blind = e == -torch.inf
        assert ((g == -torch.inf) == blind).all()
        g, e = (x.double().masked_fill(blind, 0.0) for x in (g, e))  # noqa: PLW2901
        assert (g - e).abs().max() <= bound * max(1.0, float(e.abs().max()))


def oracle_and_ours(options, learned):
    """Two functions of the same leaves: q, k, v, then what `learned` names, in order."""

    def ours(attention, **more):
        def call(q, k, v, *rest):
            asked = {**options, **dict(zip(learned, rest, strict=True))}
            return attention(q, k, v, **asked, return_lse=True, **more)

        return call

    def oracle(q, k, v, *rest):
        asked = {**options, **dict(zip(learned, rest, strict=True))}
        sinks = asked.pop("sinks", None)
        if isinstance(sinks, torch.Tensor):
            asked["sink_logits"] = sinks
        elif sinks is not None:
            asked["sink_tokens"] = sinks
        return by_loops(q, k, v, **asked)

    return oracle, ours


def cases(n_heads, n_queries, n_keys, batch):
    """name -> (options, what of them has a gradient), for every feature on its own and some pairs."""
    stream = torch.Generator().manual_seed(5)

    def normal(*shape):
        return torch.randn(*shape, dtype=torch.float64, generator=stream)

    slopes = torch.tensor([2.0 ** -(i + 1) for i in range(n_heads)], dtype=torch.float64)
    hidden = torch.rand(batch, 1, n_queries, n_keys, generator=stream) > 0.4
    hidden[0, :, n_queries // 2] = False  # a query with nothing to see
    blocks = torch.rand(1, n_heads, -(-n_queries // 16), -(-n_keys // 16), generator=stream) > 0.4
    causal, whole = {"causal": True}, {"causal": False}
    return {
        "whole": (whole, {}),
        "causal": (causal, {}),
        "window": (causal | {"window": 5}, {}),
        "wide window": (causal | {"window": 19}, {}),
        "fixed sinks": (causal | {"window": 4, "sinks": 3}, {}),
        "learned sinks": (causal, {"sinks": normal(n_heads)}),
        "softcap": (causal | {"softcap": 2.0}, {}),
        "alibi": (causal | {"alibi": slopes}, {}),
        "alibi both ways": (whole | {"alibi": slopes}, {}),
        "bias": (whole, {"bias": normal(batch, n_heads, n_queries, n_keys)}),
        "bias of heads": (causal, {"bias": normal(n_heads, n_queries, n_keys)}),
        "bias of keys": (causal, {"bias": normal(1, 1, 1, n_keys)}),
        "boolean bias": (causal | {"bias": hidden}, {}),
        "block mask": (whole | {"block_mask": BlockMask(blocks, 16)}, {}),
        "causal block mask": (causal | {"block_mask": BlockMask(blocks[:, :1], 16)}, {}),
        "much at once": (
            causal | {"window": 9, "softcap": 3.0, "alibi": slopes, "scale": 0.4},
            {"sinks": normal(n_heads), "bias": normal(1, n_heads, n_queries, n_keys)},
        ),
    }


CASES = tuple(cases(2, 4, 4, 1))


@st.composite
def calls(draw_from, longest=24, d_most=9):
    """A random call: inputs, options, and what of them has a gradient."""
    groups, n_kv_heads = draw_from(st.integers(1, 4)), draw_from(st.integers(1, 2))
    n_heads, batch = groups * n_kv_heads, draw_from(st.integers(1, 2))
    n_queries, n_keys = (draw_from(st.integers(1, longest)) for _ in range(2))
    size, value = draw_from(st.integers(1, d_most)), draw_from(st.integers(1, d_most))
    seed = draw_from(st.integers(0, 99))
    inputs = draw(batch, n_queries, n_keys, n_heads, n_kv_heads, size, value, seed)
    stream = torch.Generator().manual_seed(seed)
    causal = draw_from(st.booleans())
    options = {"causal": causal, "scale": draw_from(st.none() | st.floats(0.05, 2.0))}
    options["softcap"] = draw_from(st.none() | st.floats(0.5, 5.0))
    if causal and draw_from(st.booleans()):
        options["window"] = draw_from(st.integers(1, longest))
        options["sinks"] = draw_from(st.none() | st.integers(1, 5))
    if draw_from(st.booleans()):
        options["alibi"] = torch.rand(n_heads, dtype=torch.float64, generator=stream)
    if draw_from(st.booleans()):
        blocks = 1, n_heads, -(-n_queries // 16), -(-n_keys // 16)
        options["block_mask"] = BlockMask(torch.rand(blocks, generator=stream) > 0.3, 16)
    learned = {}
    if "sinks" not in options and draw_from(st.booleans()):
        learned["sinks"] = torch.randn(n_heads, dtype=torch.float64, generator=stream)
    if draw_from(st.booleans()):
        shape = [n if draw_from(st.booleans()) else 1 for n in (batch, n_heads, n_queries, n_keys)]
        if draw_from(st.booleans()):
            options["bias"] = torch.rand(shape, generator=stream) > 0.3
        else:
            learned["bias"] = torch.randn(shape, dtype=torch.float64, generator=stream)
    return inputs, options, learned
