"""Windows, sinks, softcap, ALiBi, bias, packing, blocks, dropout: each backend, each gradient."""

from __future__ import annotations

import itertools
import weakref

import pytest
import torch
from hypothesis import given, settings
from torch.utils._python_dispatch import TorchDispatchMode

from attention_oracle import (
    CASES,
    assert_equal,
    by_loops,
    calls,
    cases,
    draw,
    oracle_and_ours,
    values_and_gradients,
)
from isoflop.attention import (
    BlockMask,
    Sinks,
    attention,
    blockwise,
    flash_attention,
    philox,
)
from isoflop.attention.arguments import read_options
from isoflop.attention.options import Dropout
from isoflop.errors import InputError

OURS = ("reference", "blockwise")


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def small_tiles(monkeypatch):
    """Tiles so small that few tokens make many."""
    monkeypatch.setattr(blockwise, "ROWS", 6)
    monkeypatch.setattr(blockwise, "WIDTH", 7)


# --- against the definition -----------------------------------------------------------------


@pytest.mark.parametrize("name", CASES)
@pytest.mark.usefixtures("small_tiles")
def test_a_feature_equals_its_definition_in_value_log_and_gradient(name):
    inputs = draw(2, 15, 19, 4, 2, 3, 5)
    options, learned = cases(4, 15, 19, 2)[name]
    oracle, ours = oracle_and_ours(options, learned)
    leaves = [*inputs, *learned.values()]
    expected = values_and_gradients(oracle, leaves)
    for backend in OURS:
        got = values_and_gradients(ours(attention, backend=backend), leaves)
        assert_equal(got, expected, 1e-11)


@settings(max_examples=60, deadline=None)
@given(calls())
def test_any_combination_equals_the_reference(call):
    inputs, options, learned = call
    _, ours = oracle_and_ours(options, learned)
    leaves = [*inputs, *learned.values()]
    expected = values_and_gradients(ours(attention, backend="reference"), leaves)

    def in_tiles(q, k, v, **asked):
        read = read_options(q, k, v, **asked)
        return blockwise.attend(q, k, v, read, (5, 9))

    got = values_and_gradients(ours(in_tiles), leaves)
    assert_equal(got, expected, 1e-10)


@settings(max_examples=12, deadline=None)
@given(calls(longest=7, d_most=4))
def test_the_reference_equals_the_definition(call):
    inputs, options, learned = call
    oracle, ours = oracle_and_ours(options, learned)
    leaves = [*inputs, *learned.values()]
    expected = values_and_gradients(oracle, leaves)
    assert_equal(
        values_and_gradients(ours(attention, backend="reference"), leaves), expected, 1e-10
    )


def test_where_no_key_is_seen_at_all_values_and_gradients_are_zero():
    inputs, hidden = draw(1, 3, 4, 2, 1, 3), torch.zeros(1, 1, 1, 1, dtype=torch.bool)
    oracle, ours = oracle_and_ours({"causal": False, "block_mask": BlockMask(hidden, 16)}, {})
    expected = values_and_gradients(oracle, inputs)
    for backend in OURS:
        got = values_and_gradients(ours(attention, backend=backend), inputs)
        assert_equal(got, expected, 0.0)


@pytest.mark.usefixtures("small_tiles")
def test_gradients_pass_gradcheck_with_everything_learned():
    inputs = [x.requires_grad_() for x in draw(1, 9, 10, 4, 2, 3)]
    sink = torch.randn(4, dtype=torch.float64, requires_grad=True)
    bias = torch.randn(1, 4, 9, 10, dtype=torch.float64, requires_grad=True)

    def call(q, k, v, sink, bias):
        options = {"causal": True, "window": 6, "softcap": 3.0, "return_lse": True}
        return attention(q, k, v, sinks=Sinks(2, sink), bias=bias, backend="blockwise", **options)

    assert torch.autograd.gradcheck(call, [*inputs, sink, bias])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("backend", OURS)
def test_half_precision_stays_within_its_precision(backend, dtype):
    inputs = draw(1, 20, 20, 4, 2, 16)
    options = {"causal": True, "window": 9, "softcap": 5.0}
    got = attention(*(x.to(dtype) for x in inputs), **options, backend=backend)
    assert got.dtype == dtype
    assert_equal([got], [by_loops(*inputs, **options)[0]], 3e-2)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("backend", OURS)
def test_softmax_is_in_float32_at_least(backend, dtype):
    inputs = [x.to(dtype) for x in draw(1, 40, 40, 2, 2, 16)]
    _, exact = attention(*(x.double() for x in inputs), causal=True, return_lse=True)
    _, lse = attention(*inputs, causal=True, return_lse=True, backend=backend)
    assert lse.dtype == torch.float32
    assert (lse - exact).abs().max() < 1e-5


@pytest.mark.parametrize("backend", OURS)
def test_blocks_over_no_keys_leave_every_query_blind(backend):
    q, k, v = draw(2, 5, 0, 2, 1, 4)
    mask = BlockMask(torch.ones(3, 0, dtype=torch.bool), 2)
    assert not attention(q, k, v, causal=False, block_mask=mask, backend=backend).any()


def test_tiles_keep_float32_scores_under_autocast():
    q, k, v = (x.float() for x in draw(1, 30, 30, 2, 2, 16))
    alone = attention(q, k, v, causal=True, backend="blockwise")
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(attention(q, k, v, causal=True, backend="blockwise"), alone)


@pytest.mark.parametrize("options", [{"causal": True}, {"causal": True, "window": 3}])
@pytest.mark.parametrize("backend", OURS)
def test_blind_queries_give_zeros_a_log_of_minus_infinity_and_no_gradient(backend, options):
    inputs = draw(1, 5, 2, 2, 1, 4)
    hidden = torch.ones(5, 2, dtype=torch.bool)
    hidden[4] = False
    out, lse, *grads = values_and_gradients(
        lambda *x: attention(*x, **options, bias=hidden, return_lse=True, backend=backend), inputs
    )
    blind = [0, 1, 2, 4]
    assert (out[:, blind] == 0).all()
    assert (lse[:, blind] == -torch.inf).all()
    assert (grads[0][:, blind] == 0).all()
    assert all(g.isfinite().all() for g in grads)


def test_inputs_and_strides_are_left_alone():
    q, k, v = (x.transpose(1, 2).contiguous().transpose(1, 2) for x in draw(1, 9, 9, 1, 1, 4))
    before = [x.clone() for x in (q, k, v)]
    leaves = [x.requires_grad_() for x in (q, k, v)]
    out = attention(*leaves, causal=True, scale=3.0, backend="blockwise")
    out.sum().backward()  # a gradient of one number, expanded
    assert all(torch.equal(x.detach(), y) for x, y in zip(leaves, before, strict=True))


# --- properties -----------------------------------------------------------------------------


def test_equal_calls_give_equal_bits():
    inputs = [x.float() for x in draw(2, 600, 600, 4, 2, 16)]

    def once():
        call = {"causal": True, "dropout_p": 0.1, "dropout_seed": 3, "backend": "blockwise"}
        return values_and_gradients(lambda *x: attention(*x, **call), inputs, torch.float32)

    assert all(torch.equal(a, b) for a, b in zip(once(), once(), strict=True))


@pytest.mark.parametrize("backend", OURS)
def test_logs_join_what_was_computed_over_stretches_of_keys(backend):
    q, k, v = draw(1, 6, 20, 2, 1, 4)

    def joined(q, k, v):
        parts = [
            attention(q, k[:, s], v[:, s], causal=False, return_lse=True, backend=backend)
            for s in (slice(0, 7), slice(7, 20))
        ]
        shares = torch.stack([lse for _, lse in parts]).softmax(0)
        return sum(out * share[..., None] for (out, _), share in zip(parts, shares, strict=True))

    expected = values_and_gradients(lambda *x: by_loops(*x, causal=False)[0], [q, k, v])
    assert_equal(values_and_gradients(joined, [q, k, v]), expected, 1e-12)


def test_a_sink_of_minus_infinity_is_none_and_a_large_one_takes_all():
    q, k, v = draw(1, 8, 8, 2, 2, 4)
    plain = attention(q, k, v, causal=True)
    none = torch.full((2,), -1e30, dtype=torch.float64)
    assert_equal([attention(q, k, v, causal=True, sinks=none, backend="blockwise")], [plain], 1e-12)
    all_of_it = torch.full((2,), 1e4, dtype=torch.float64)
    assert attention(q, k, v, causal=True, sinks=all_of_it).abs().max() < 1e-12


@pytest.mark.parametrize("backend", [*OURS, "sdpa"])
@pytest.mark.parametrize(
    "options", [{"causal": True}, {"causal": True, "window": 3}, {"causal": False}]
)
def test_packed_sequences_equal_separate_calls(backend, options):
    q, k, v = draw(1, 23, 26, 4, 2, 5)
    bounds = [0, 4, 5, 17, 23], [0, 6, 7, 20, 26]
    cu_seqlens = tuple(torch.tensor(b) for b in bounds)
    whole = values_and_gradients(
        lambda *x: attention(*x, **options, cu_seqlens=cu_seqlens, backend=backend), [q, k, v]
    )

    def each(q, k, v):
        runs = [[slice(*pair) for pair in itertools.pairwise(b)] for b in bounds]
        return torch.cat(
            [by_loops(q[:, t], k[:, s], v[:, s], **options)[0] for t, s in zip(*runs, strict=True)],
            1,
        )

    assert_equal(whole, values_and_gradients(each, [q, k, v]), 1e-12)


@pytest.mark.parametrize("backend", OURS)
def test_a_packed_call_is_its_padded_batch_with_bias_blocks_and_dropout(backend):
    lengths, n_heads = [20, 0, 7, 33], 2
    q, k, v = draw(4, 33, 33, n_heads, 1, 4)
    bias = torch.randn(4, n_heads, 33, 33, dtype=torch.float64)
    blocks = BlockMask(torch.rand(4, 1, 3, 3) > 0.3, 16)
    options = {"causal": True, "dropout_p": 0.3, "dropout_seed": 11, "backend": backend}
    padded = attention(q, k, v, bias=bias, block_mask=blocks, return_lse=True, **options)
    rows = [torch.cat([x[i : i + 1, :n] for i, n in enumerate(lengths)], 1) for x in (q, k, v)]
    cu_seqlens = torch.tensor([0, 20, 20, 27, 60])
    packed = attention(
        *rows, bias=bias, block_mask=blocks, cu_seqlens=cu_seqlens, return_lse=True, **options
    )
    for whole, part in zip(padded, packed, strict=True):
        cut = torch.cat([whole[i : i + 1, :n] for i, n in enumerate(lengths)], 1)
        assert_equal([part], [cut], 1e-12)


class PeakBytes(TorchDispatchMode):
    """The most bytes of tensors made under it that were alive at once."""

    def __init__(self):
        super().__init__()
        self.now = self.peak = 0
        self.known = set()

    def __torch_dispatch__(self, function, kinds, args=(), kwargs=None):
        made = function(*args, **(kwargs or {}))
        for x in made if isinstance(made, list | tuple) else [made]:
            if isinstance(x, torch.Tensor):
                self.see(x.untyped_storage())
        return made

    def see(self, storage):
        place, size = storage.data_ptr(), storage.nbytes()
        if size and place not in self.known:
            self.known.add(place)
            self.now += size
            self.peak = max(self.peak, self.now)
            weakref.finalize(storage, self.gone, place, size)

    def gone(self, place, size):
        self.known.discard(place)
        self.now -= size


def peak_bytes(n, backend, **options):
    q, k, v = (torch.randn(1, n, 2, 8, requires_grad=True) for _ in range(3))
    with PeakBytes() as bytes_alive:
        attention(q, k, v, causal=True, backend=backend, **options).sum().backward()
    return bytes_alive.peak


@pytest.mark.parametrize("options", [{}, {"window": 300}, {"sinks": torch.zeros(2)}])
def test_memory_grows_with_tokens_not_with_their_pairs(options):
    peaks = [peak_bytes(n, "blockwise", **options) for n in (1024, 2048, 4096)]
    assert peaks[2] - peaks[1] <= 2.1 * (peaks[1] - peaks[0])
    assert peaks[2] < 4096**2  # not even one byte for each pair of one head


def test_the_memory_test_can_fail():
    peaks = [peak_bytes(n, "reference") for n in (512, 1024, 2048)]
    assert peaks[2] - peaks[1] > 3.5 * (peaks[1] - peaks[0])


def test_tiles_that_nothing_sees_are_skipped(monkeypatch):
    visited = []
    product = blockwise._Tiles.product
    monkeypatch.setattr(
        blockwise._Tiles,
        "product",
        lambda self, a, b, i: visited.append(1) or product(self, a, b, i),
    )
    q, k, v = (x.float() for x in draw(1, 128, 128, 1, 1, 4))

    def tiles(**options):
        visited.clear()
        blockwise.attend(q, k, v, read_options(q, k, v, **options), (16, 16))
        return len(visited)

    assert tiles(causal=False) == 64
    assert tiles(causal=True) == 36
    assert tiles(causal=True, window=16) == 15
    assert tiles(causal=True, window=16, sinks=4) == 22  # one more where the window has left key 0
    assert tiles(causal=False, block_mask=BlockMask(torch.eye(8, dtype=torch.bool), 16)) == 8


# --- dropout --------------------------------------------------------------------------------


def weights_left(backend, n=40, **options):
    """The weights themselves: values are unit vectors."""
    q = torch.zeros(2, n, 2, 4, dtype=torch.float64)
    unit = torch.eye(n, dtype=torch.float64)[None, :, None].expand(2, -1, 2, -1)
    return attention(q, q, unit, causal=False, backend=backend, **options)


@pytest.mark.usefixtures("small_tiles")
def test_a_seed_drops_the_same_weights_on_every_backend_and_tile():
    options = {"dropout_p": 0.3, "dropout_seed": (1 << 40) + 5}
    expected = weights_left("reference", **options)
    assert_equal([weights_left("blockwise", **options)], [expected], 1e-12)
    assert 0.28 < (expected == 0).double().mean() < 0.32
    assert not torch.equal(expected, weights_left("reference", dropout_p=0.3, dropout_seed=6))
    assert not torch.equal(expected[0], expected[1])
    assert not torch.equal(expected[:, :, 0], expected[:, :, 1])
    with pytest.raises(InputError, match="dropout_seed"):
        weights_left("sdpa", **options)


@pytest.mark.parametrize("backend", OURS)
def test_without_a_seed_pytorchs_generator_decides(backend):
    torch.manual_seed(4)
    first = weights_left(backend, dropout_p=0.5)
    assert not torch.equal(first, weights_left(backend, dropout_p=0.5))
    torch.manual_seed(4)
    assert torch.equal(first, weights_left(backend, dropout_p=0.5))


def test_dropouts_gradient_flows_through_the_weights_that_were_kept():
    inputs = [x.requires_grad_() for x in draw(1, 7, 9, 2, 1, 3)]
    options = {"causal": True, "dropout_p": 0.4, "dropout_seed": 1, "backend": "blockwise"}
    assert torch.autograd.gradcheck(lambda *x: attention(*x, **options), inputs)


@pytest.mark.parametrize(
    ("counter", "seed", "rounds", "expected"),
    [  # Random123 1.14, tests/kat_vectors
        (0x00000000, 0x0000000000000000, 7, "5f6fb709 0d893f64 4f121f81 4f730a48"),
        (0xFFFFFFFF, 0xFFFFFFFFFFFFFFFF, 7, "5207ddc2 45165e59 4d8ee751 8c52f662"),
        (0xFFFFFFFF, 0xFFFFFFFFFFFFFFFF, 10, "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    ],
)
def test_philox_gives_its_authors_numbers(counter, seed, rounds, expected):
    words = philox.philox((torch.tensor([counter]),) * 4, seed, rounds)
    assert " ".join(f"{int(w):08x}" for w in words) == expected


def test_any_run_of_keys_is_a_cut_of_the_whole():
    place = torch.zeros(1, 1, dtype=torch.int64), torch.ones(1, 1, dtype=torch.int64)
    query = torch.arange(5)[:, None]
    whole = philox.kept(Dropout(0.5, 9), *place, query, 0, 30)
    for first, last in ((0, 3), (2, 9), (7, 8), (13, 30)):
        part = philox.kept(Dropout(0.5, 9), *place, query, first, last)
        assert torch.equal(part, whole[..., first:last])


# --- flash_attention ------------------------------------------------------------------------


@pytest.mark.parametrize("block_size", [1, 5, 16, 128])
@pytest.mark.parametrize("options", [{}, {"causal": True}, {"causal": True, "window": 4}])
def test_flash_attention_equals_the_definition_at_any_block_size(block_size, options):
    inputs = draw(1, 17, 17, 2, 1, 3)
    expected = values_and_gradients(lambda *x: by_loops(*x, **{"causal": False, **options}), inputs)
    got = values_and_gradients(
        lambda *x: flash_attention(*x, block_size, **options, return_lse=True), inputs
    )
    assert_equal(got, expected, 1e-12)


def test_flash_attention_names_a_wrong_block():
    x = torch.ones(1, 4, 1, 4)
    with pytest.raises(InputError, match="block_size=0"):
        flash_attention(x, x, x, 0)
