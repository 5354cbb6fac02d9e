"""Every attention backend against loops over single queries, in float64, gradients too."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from attention_oracle import assert_equal, by_loops, draw, values_and_gradients
from isoflop.attention import attention, multi_head_attention
from isoflop.errors import InputError

BACKENDS = ("reference", "blockwise", "sdpa", "auto")


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize(("n_heads", "n_kv_heads"), [(1, 1), (4, 4), (4, 2), (6, 2), (4, 1)])
@pytest.mark.parametrize(("n_queries", "n_keys"), [(6, 6), (1, 7), (3, 7), (5, 3)])
@pytest.mark.parametrize(
    ("causal", "window"), [(False, None), (True, None), (True, 1), (True, 3), (True, 99)]
)
def test_every_backend_equals_the_definition_in_value_and_gradient(
    n_heads, n_kv_heads, n_queries, n_keys, causal, window
):
    inputs = draw(2, n_queries, n_keys, n_heads, n_kv_heads, 5)
    options = {"causal": causal, "window": window}
    expected = values_and_gradients(lambda *x: by_loops(*x, **options)[0], inputs)
    for backend in BACKENDS:
        for dtype, bound in ((torch.float64, 1e-12), (torch.float32, 2e-5)):
            got = values_and_gradients(
                lambda *x, b=backend: attention(*x, **options, backend=b), inputs, dtype
            )
            assert_equal(got, expected, bound)


@pytest.mark.parametrize("backend", BACKENDS)
def test_gradients_pass_gradcheck(backend):
    inputs = [x.requires_grad_() for x in draw(1, 3, 4, 4, 2, 3)]
    assert torch.autograd.gradcheck(
        lambda *x: attention(*x, causal=True, window=2, backend=backend), inputs
    )


@pytest.mark.parametrize("backend", BACKENDS)
def test_scores_past_float16_are_numbers(backend):
    q, k, v = (torch.full((1, 8, 2, 64), 200.0, dtype=torch.float16) for _ in range(3))
    assert (attention(q, k, v, causal=True, backend=backend) == 200).all()


@pytest.mark.parametrize("shape", [(), (1,), (7,), (6, 1)])
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_mask_may_have_fewer_axes(backend, shape):
    q, k, v = draw(2, 6, 7, 2, 2, 4)
    mask = torch.linspace(-1.0, 1.0, 42, dtype=torch.float64)[: math.prod(shape)].view(shape)
    got = attention(q, k, v, causal=False, bias=mask, backend=backend)
    assert_equal([got], [by_loops(q, k, v, causal=False, bias=mask.expand(2, 2, 6, 7))[0]], 1e-12)


@pytest.mark.parametrize("backend", BACKENDS)
def test_bfloat16_stays_within_its_precision(backend):
    inputs = draw(2, 9, 9, 4, 2, 16)
    got = attention(*(x.bfloat16() for x in inputs), causal=True, backend=backend)
    assert got.dtype == torch.bfloat16
    assert_equal([got], [by_loops(*inputs, causal=True)[0]], 3e-2)


@pytest.mark.parametrize("backend", BACKENDS)
def test_queries_that_see_no_key_give_zeros_and_finite_gradients(backend):
    inputs = draw(1, 5, 2, 2, 1, 4)
    out, *grads = values_and_gradients(
        lambda *x: attention(*x, causal=True, backend=backend), inputs
    )
    assert (out[:, :3] == 0).all()
    assert (grads[0][:, :3] == 0).all()
    assert all(g.isfinite().all() for g in grads)


@pytest.mark.parametrize("kind", ["bool", "float"])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_mask_hides_keys_and_joins_the_causal_triangle(backend, causal, kind):
    q, k, v = draw(2, 5, 5, 4, 2, 3)
    mask = torch.rand(2, 1, 5, 5, generator=torch.Generator().manual_seed(3)) > 0.4
    mask[0, :, 2] = False  # a query with nothing to see
    given_mask = mask if kind == "bool" else torch.zeros(mask.shape).double()
    if kind == "float":
        given_mask = given_mask.masked_fill(~mask, -math.inf)
    got = attention(q, k, v, causal=causal, bias=given_mask, backend=backend)
    seen = mask.tril() if causal else mask
    for b, t in itertools.product(range(2), range(5)):
        keys = seen[b, 0, t].nonzero()[:, 0]
        if len(keys):
            alone = by_loops(q[b, t][None, None], k[b, keys][None], v[b, keys][None], causal=False)[
                0
            ]
        else:
            alone = torch.zeros(1, 1, 4, 3, dtype=torch.float64)
        assert_equal([got[b, t]], [alone[0, 0]], 1e-12)


@pytest.mark.parametrize("backend", ["reference", "sdpa"])
def test_an_added_mask_is_added_to_the_scaled_scores(backend):
    q, k, v = draw(1, 3, 4, 2, 2, 5)
    bias = torch.randn(1, 2, 3, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    scores = torch.einsum("btnh,bsnh->bnts", q, k) * 0.7 + bias
    expected = torch.einsum("bnts,bsnh->btnh", scores.softmax(-1), v)
    assert_equal(
        [attention(q, k, v, causal=False, bias=bias, scale=0.7, backend=backend)], [expected], 1e-12
    )


@pytest.mark.parametrize("backend", BACKENDS)
def test_continuing_a_cache_equals_attending_at_once(backend):
    q, k, v = draw(2, 8, 8, 4, 2, 4)
    options = {"causal": True, "window": 5, "backend": backend}
    whole = attention(q, k, v, **options)
    parts = [attention(q[:, :5], k[:, :5], v[:, :5], **options)]
    parts += [
        attention(q[:, t : t + 1], k[:, : t + 1], v[:, : t + 1], **options) for t in range(5, 8)
    ]
    assert_equal([torch.cat(parts, 1)], [whole], 1e-12)


@pytest.mark.parametrize("backend", BACKENDS)
def test_sharing_heads_equals_repeating_them(backend):
    q, k, v = draw(2, 6, 6, 6, 2, 4)
    grouped = attention(q, k, v, causal=True, backend=backend)
    repeated = [x.repeat_interleave(3, dim=2) for x in (k, v)]
    assert_equal([grouped], [attention(q, *repeated, causal=True, backend=backend)], 1e-12)
    one = attention(q, k[:, :, :1], v[:, :, :1], causal=True, backend=backend)
    spread = [x[:, :, :1].expand(-1, -1, 6, -1) for x in (k, v)]
    assert_equal([one], [attention(q, *spread, causal=True, backend=backend)], 1e-12)


@pytest.mark.parametrize("backend", BACKENDS)
def test_dropout_drops_its_share_of_weights_and_keeps_the_mean(backend):
    q = torch.zeros(1, 400, 1, 4)
    values = torch.ones(1, 400, 1, 4)
    torch.manual_seed(0)
    out = attention(q, q, values, causal=False, dropout_p=0.25, backend=backend)[..., 0]
    # Each output is a mean of 400 draws of 4/3 or 0: deviation 0.029, of the mean 0.0014.
    assert 0.01 < out.std() < 0.05
    assert abs(out.mean() - 1) < 0.01


def test_every_wrong_option_is_listed_at_once():
    q, k, v = draw(1, 3, 3, 4, 3, 2)
    with pytest.raises(InputError) as caught:
        attention(q, k, v[:, :2], causal=False, window=0, scale=-1.0, dropout_p=1.5)
    fields = {problem.field for problem in caught.value.problems}
    assert fields == {"n_kv_heads", "v_BSKH", "window", "scale", "dropout_p"}
    with pytest.raises(InputError, match="k_BSKH"):
        attention(q, k[..., :1], v, causal=True)
    with pytest.raises(InputError, match="four axes"):
        attention(q[0], k, v, causal=True)


# --- multi_head_attention -------------------------------------------------------------------


def test_multi_head_attention_equals_pytorchs_module():
    torch.manual_seed(0)
    theirs = torch.nn.MultiheadAttention(12, 3, batch_first=True, dtype=torch.float64)
    query = torch.randn(2, 4, 12, dtype=torch.float64)
    key, value = torch.randn(2, 2, 6, 12, dtype=torch.float64)
    mask = torch.rand(4, 6) > 0.3
    expected, _ = theirs(query, key, value, attn_mask=~mask, need_weights=False)
    weights = theirs.in_proj_weight.chunk(3)
    projected = [x @ w.T for x, w in zip((query, key, value), weights, strict=True)]
    got = multi_head_attention(*projected, num_heads=3, mask=mask)
    assert_equal([theirs.out_proj(got).detach()], [expected.detach()], 1e-12)


def test_multi_head_attention_groups_heads_and_takes_another_key_length():
    q, k, v = draw(2, 3, 5, 6, 2, 4, 3)
    got = multi_head_attention(
        q.flatten(-2), k.flatten(-2), v.flatten(-2), 6, num_kv_heads=2, causal=True, scale=0.3
    )
    assert_equal([got], [by_loops(q, k, v, causal=True, scale=0.3)[0].flatten(-2)], 1e-12)


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"num_heads": 5}, "query width"),
        ({"num_heads": 0}, "num_heads"),
        ({"num_heads": True}, "num_heads"),
        ({"num_kv_heads": 4}, "num_kv_heads"),
        ({"num_kv_heads": 2.0}, "num_kv_heads"),
        ({"query": torch.ones(4, 12)}, "query"),
        ({"query": [[1.0]]}, "query"),
        ({"key": torch.ones(2, 5, 6)}, "key"),
        ({"key": torch.ones(3, 4, 12)}, "key"),
        ({"value": torch.ones(2, 3, 12)}, "value"),
        ({"mask": torch.ones(2, 4, 4, dtype=torch.bool)}, "mask"),
        ({"mask": torch.ones(3, 4, dtype=torch.bool)}, "mask"),
        ({"mask": torch.ones(4, 4, dtype=torch.int64)}, "mask"),
        ({"dropout_p": 1.0}, "dropout_p"),
        ({"dropout_p": -0.1}, "dropout_p"),
        ({"scale": 0.0}, "scale"),
    ],
)
def test_multi_head_attention_names_the_wrong_argument(change, field):
    x = torch.ones(2, 4, 12)
    arguments = {"query": x, "key": x, "value": x, "num_heads": 6, **change}
    if change == {"num_kv_heads": 4}:
        arguments["query"] = torch.ones(2, 4, 18)
    with pytest.raises(InputError) as caught:
        multi_head_attention(**arguments)
    assert field in {problem.field for problem in caught.value.problems}
