"""The causal triangle some queries at a time: equal to the definition, and where it is taken."""

from __future__ import annotations

import pytest
import torch

from attention_oracle import assert_equal, by_loops, draw, values_and_gradients
from isoflop.attention import attention, explain_dispatch, triangle
from isoflop.errors import InputError


@pytest.fixture(autouse=True)
def few_queries(monkeypatch):
    monkeypatch.setattr(triangle, "QUERIES", 4)


def attend(*inputs, **options):
    return attention(*inputs, causal=True, backend="triangle", **options)


@pytest.mark.parametrize(("n_heads", "n_kv_heads"), [(1, 1), (4, 4), (4, 2), (4, 1)])
@pytest.mark.parametrize("n_tokens", [1, 3, 4, 11])
def test_values_and_gradients_are_those_of_the_definition(n_heads, n_kv_heads, n_tokens):
    inputs = draw(2, n_tokens, n_tokens, n_heads, n_kv_heads, 5)
    expected = values_and_gradients(lambda *x: by_loops(*x, causal=True)[0], inputs)
    for dtype, bound in ((torch.float64, 1e-12), (torch.float32, 2e-5)):
        assert_equal(values_and_gradients(attend, inputs, dtype), expected, bound)


def test_values_may_have_another_head_size_and_scores_another_scale():
    q, k, _ = draw(1, 6, 6, 2, 2, 3)
    v = torch.randn(1, 6, 2, 7, dtype=torch.float64)
    expected = values_and_gradients(
        lambda *x: attention(*x, causal=True, scale=0.3, backend="reference"), [q, k, v]
    )
    got = values_and_gradients(lambda *x: attend(*x, scale=0.3), [q, k, v])
    assert_equal(got, expected, 1e-12)


def test_in_bfloat16_it_errs_no_more_than_twice_pytorchs_kernel():
    inputs = [x.bfloat16() for x in draw(2, 40, 40, 4, 4, 16)]
    exact = values_and_gradients(lambda *x: by_loops(*x, causal=True)[0], inputs, torch.float64)

    def errors(backend):
        got = values_and_gradients(
            lambda *x: attention(*x, causal=True, backend=backend), inputs, torch.bfloat16
        )
        return [float((g - e).norm() / e.norm()) for g, e in zip(got, exact, strict=True)]

    for ours, fused in zip(errors("triangle"), errors("sdpa"), strict=True):
        assert ours < 2 * fused


def test_it_is_taken_for_short_texts_in_bfloat16_and_nothing_else():
    def taken(n_tokens, dtype=torch.bfloat16, n_keys=None, **options):
        q, k = (torch.zeros(1, n, 2, 8, dtype=dtype) for n in (n_tokens, n_keys or n_tokens))
        return explain_dispatch(q, k, k, **{"causal": True, **options}).backend

    assert taken(512) == "triangle"
    assert taken(256, window=256) == "triangle"
    others = [
        taken(513),
        taken(256, torch.float32),
        taken(256, n_keys=300),
        taken(256, causal=False),
        taken(256, window=16),
        taken(256, dropout_p=0.1),
        taken(256, bias=torch.zeros(256, 256)),
    ]
    assert "triangle" not in others


@pytest.mark.parametrize(("batch", "n_tokens"), [(0, 5), (2, 0)])
def test_nothing_to_read_gives_nothing(batch, n_tokens):
    q, k, v = (x.requires_grad_() for x in draw(batch, n_tokens, n_tokens, 4, 2, 8))
    out = attend(q, k, v)
    assert out.shape == q.shape
    out.sum().backward()
    assert k.grad.shape == k.shape


def test_other_shapes_are_refused_with_the_reason():
    q, k, v = draw(1, 3, 5, 2, 2, 4)
    with pytest.raises(InputError, match="triangle alone"):
        attend(q, k, v)
    with pytest.raises(InputError, match="triangle alone"):
        attend(q, k[:, :3], v[:, :3], softcap=2.0)
