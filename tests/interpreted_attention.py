"""Our Triton kernels in Triton's interpreter, on CPU tensors: run by test_attention_triton.py.

The interpreter has to be chosen before the kernels are imported, so this file is run in a
process of its own. It counts tiles, not FLOPs: about 10 ms each.
"""

from __future__ import annotations

import pytest
import torch
from hypothesis import HealthCheck, given, settings

from attention_oracle import (
    CASES,
    assert_equal,
    calls,
    cases,
    draw,
    oracle_and_ours,
    values_and_gradients,
)
from isoflop.attention import BlockMask, attention, explain_dispatch, philox
from isoflop.attention.kernels import launch

triton = pytest.importorskip("triton")
tl = triton.language

BOUND = 1e-5


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch):
    monkeypatch.setattr(launch, "_SMALL", 16)


def compare(inputs, options, learned=None, dtype=torch.float32, bound=BOUND):
    """Triton in `dtype` against the reference in float64: values, logs, gradients."""
    learned = learned or {}
    _, ours = oracle_and_ours(options, learned)
    leaves = [*inputs, *learned.values()]
    expected = values_and_gradients(ours(attention, backend="reference"), leaves)
    got = values_and_gradients(ours(attention, backend="triton"), leaves, dtype)
    assert_equal(got, expected, bound)


@pytest.mark.parametrize("name", CASES)
def test_a_feature_equals_the_reference(name):
    options, learned = cases(4, 21, 39, 1)[name]
    compare(draw(1, 21, 39, 4, 2, 20, 12), options, learned)


@settings(max_examples=30, deadline=None, suppress_health_check=list(HealthCheck))
@given(calls(longest=33, d_most=18))
def test_any_combination_equals_the_reference(call):
    compare(*call)


@pytest.mark.parametrize(
    ("n_queries", "n_keys", "options"),
    [
        (64, 64, {"causal": True}),
        (1, 64, {"causal": True, "window": 20, "sinks": 2}),
        (40, 20, {"causal": True}),
        (64, 64, {"causal": True, "window": 3, "sinks": 20}),
        (64, 64, {"causal": True, "window": 33}),
    ],
)
def test_every_phase_of_the_loops_is_walked(n_queries, n_keys, options):
    compare(draw(2, n_queries, n_keys, 1, 1, 16), options)


@pytest.mark.parametrize(("n_heads", "n_kv_heads", "d_head"), [(4, 1, 80), (6, 2, 96), (3, 3, 7)])
def test_heads_of_any_number_and_size(n_heads, n_kv_heads, d_head):
    compare(draw(1, 20, 20, n_heads, n_kv_heads, d_head), {"causal": True})


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float16, 3e-3), (torch.bfloat16, 2e-2)])
def test_half_precision_stays_within_its_precision(dtype, bound):
    learned = {"sinks": torch.randn(2, dtype=torch.float64)}
    options = {"causal": True, "window": 9, "softcap": 5.0}
    compare(draw(1, 36, 36, 2, 1, 16), options, learned, dtype, bound)


@pytest.mark.parametrize("size", [16, 32])
def test_blocks_that_a_group_of_heads_does_not_share(size):
    stream = torch.Generator().manual_seed(1)
    n = -(-60 // size)
    mask = BlockMask(torch.rand(2, 4, n, n, generator=stream) > 0.5, size)
    compare(draw(2, 60, 60, 4, 2, 16), {"causal": True, "block_mask": mask})


@pytest.mark.parametrize(
    "more", [{}, {"window": 4}, {"softcap": 2.0, "dropout_p": 0.3, "dropout_seed": 3}]
)
def test_packed_sequences_with_an_empty_one(more):
    bounds = torch.tensor([0, 5, 5, 38, 50]), torch.tensor([0, 9, 9, 30, 50])
    stream = torch.Generator().manual_seed(2)
    learned = {"bias": torch.randn(4, 2, 33, 21, generator=stream, dtype=torch.float64)}
    options = {"causal": True, "cu_seqlens": bounds, **more}
    compare(draw(1, 50, 50, 2, 1, 16), options, learned)


@pytest.mark.parametrize("seed", [0, 7, (1 << 40) + 7])
def test_dropout_drops_what_the_reference_drops(seed):
    q = torch.zeros(2, 40, 2, 16)
    unit = torch.eye(40)[None, :, None].expand(2, -1, 2, -1)
    options = {"causal": False, "dropout_p": 0.3, "dropout_seed": seed}
    expected = attention(q, q, unit, **options, backend="reference")
    got = attention(q, q, unit, **options, backend="triton")
    assert torch.equal(got == 0, expected == 0)
    compare(draw(1, 33, 33, 2, 1, 16), options)


def test_philox_is_tritons_own():
    @triton.jit
    def words(out, seed, rounds: tl.constexpr):
        at = tl.arange(0, 16)
        made = tl.philox(seed, at, at * 3, at + 7, at * 0, rounds)
        for i in tl.static_range(4):
            tl.store(out + i * 16 + at, made[i].to(tl.int64))

    out = torch.zeros(4, 16, dtype=torch.int64)
    words[(1,)](out, (1 << 40) + 9, philox.ROUNDS)
    at = torch.arange(16)
    expected = philox.philox((at, at * 3, at + 7, at * 0), (1 << 40) + 9)
    assert torch.equal(out & 0xFFFFFFFF, torch.stack(expected))


def test_equal_calls_give_equal_bits():
    inputs = draw(1, 40, 40, 4, 2, 16)
    options = {"causal": True, "dropout_p": 0.1, "dropout_seed": 3, "backend": "triton"}

    def once():
        return values_and_gradients(lambda *x: attention(*x, **options), inputs, torch.float32)

    assert all(torch.equal(a, b) for a, b in zip(once(), once(), strict=True))


def test_gradients_and_inputs_of_any_strides():
    q, k, v = (
        x.float().transpose(1, 2).contiguous().transpose(1, 2) for x in draw(1, 20, 20, 2, 2, 16)
    )
    leaves = [x.requires_grad_() for x in (q, k, v)]
    for backend in ("triton", "reference"):
        attention(*leaves, causal=True, backend=backend).sum().backward()
    # Both ran: the gradients are twice the reference's.
    twice = [x.grad.clone() / 2 for x in leaves]
    again = torch.autograd.grad(attention(*leaves, causal=True, backend="reference").sum(), leaves)
    assert_equal(twice, [g.double() for g in again], BOUND)


def test_tiles_that_nothing_sees_are_not_read():
    """A value that is not a number spoils every row whose tile reads it, hidden or not."""
    q, k, v = (x.float() for x in draw(1, 64, 64, 1, 1, 16))
    seen = torch.ones(4, 4, dtype=torch.bool)
    seen[:, 2] = False
    v[:, 32:48] = torch.nan
    out = attention(q, k, v, causal=False, block_mask=BlockMask(seen, 16), backend="triton")
    assert out.isfinite().all()
    out = attention(q, k, v, causal=True, window=8, backend="triton")
    assert out[:, :32].isfinite().all()
    assert out[:, 48 + 16 :].isfinite().all()
    assert not out[:, 32:48].isfinite().any()


def test_here_the_kernels_can_be_asked_for_and_say_what_they_cannot():
    x = torch.zeros(1, 8, 2, 16)
    assert explain_dispatch(x, x, x, causal=True, backend="triton").backend == "triton"
    wide, exact = torch.zeros(1, 8, 1, 512), torch.zeros(1, 8, 1, 16, dtype=torch.float64)
    odd = BlockMask(torch.ones(1, 1, dtype=torch.bool), 24)
    for y, options, what in (
        (wide, {}, "head size"),
        (exact, {}, "float64"),
        (x, {"block_mask": odd}, "block_mask"),
    ):
        refused = explain_dispatch(y, y, y, causal=True, **options).refused
        assert what in {r.what for r in refused if r.backend == "triton"}
