"""Which backend a call goes to, what each refuses, and libraries that are not here."""

from __future__ import annotations

import math
import sys
import types

import pytest
import torch

from attention_oracle import CASES, assert_equal, by_loops, cases, draw
from isoflop.attention import BlockMask, attention, choice, explain_dispatch, flash3, flex
from isoflop.attention.arguments import read_options
from isoflop.errors import InputError, UnknownName

# --- the choice -----------------------------------------------------------------------------


def explain(n=64, **options):
    x = torch.zeros(1, n, 4, 8)
    return explain_dispatch(x, x, x, **{"causal": True, **options})


def test_the_choice_follows_length_and_features():
    assert explain().backend == "sdpa"
    assert explain(n=2048).backend == "sdpa"
    assert explain(softcap=20.0).backend == "reference"
    assert explain(n=512, softcap=20.0).backend == "blockwise"
    assert explain(window=16).backend == "sdpa"
    assert explain(n=1024, window=16).backend == "blockwise"
    assert explain(n=1024, dropout_p=0.1).backend == "blockwise"
    assert "memory" in explain(n=1024, window=16).reason


def test_on_a_gpu_plain_calls_go_to_libraries_and_the_rest_to_our_kernels():
    plain = [backend for backend, _ in choice._preferred_on_gpu(fits=True)]
    assert plain[:3] == ["flash3", "sdpa", "triton"]
    assert [b for b, _ in choice._preferred_on_gpu(fits=False)] == ["triton", "flex", "blockwise"]


def test_every_refused_backend_has_its_reasons():
    refused = explain(softcap=20.0, return_lse=True).refused
    assert {r.backend for r in refused} == {"triangle", "sdpa", "flex", "flash3", "triton"}
    assert {r.what for r in refused if r.backend == "sdpa"} == {"softcap", "return_lse"}
    assert all(r.reason for r in refused)
    assert "not sdpa: softcap: " in str(explain(softcap=20.0))


@pytest.mark.parametrize(
    ("backend", "options", "field"),
    [
        ("sdpa", {"softcap": 20.0}, "softcap"),
        ("sdpa", {"sinks": torch.zeros(4)}, "sinks"),
        ("sdpa", {"return_lse": True}, "return_lse"),
        ("flex", {}, "device"),
        ("flash3", {"dropout_p": 0.1}, "dropout_p"),
        ("triton", {}, "device"),
    ],
)
def test_a_backend_that_cannot_says_what_and_who_can(backend, options, field):
    with pytest.raises(InputError, match="use backend") as caught:
        explain(backend=backend, **options)
    assert field in str(caught.value)
    assert backend in str(caught.value)


def test_an_unknown_backend_names_the_near_ones():
    with pytest.raises(UnknownName, match="did you mean sdpa"):
        explain(backend="sdp")


@pytest.mark.parametrize(
    ("options", "field"),
    [
        ({"sinks": 2}, "sinks"),
        ({"sinks": torch.zeros(3)}, "sinks"),
        ({"softcap": 0.0}, "softcap"),
        ({"alibi": torch.zeros(4, 1)}, "alibi"),
        ({"alibi": torch.zeros(4, requires_grad=True)}, "alibi"),
        ({"cu_seqlens": torch.tensor([0, 9])}, "cu_seqlens"),
        ({"cu_seqlens": torch.tensor([0, 40, 30, 64])}, "cu_seqlens"),
        ({"cu_seqlens": (torch.tensor([0, 64]), torch.tensor([0, 9, 64]))}, "cu_seqlens"),
        ({"block_mask": BlockMask(torch.ones(4, 4, dtype=torch.bool), 8)}, "block_mask.seen"),
        ({"block_mask": BlockMask(torch.ones(8, 8), 8)}, "block_mask.seen"),
        ({"block_mask": BlockMask(torch.ones(8, 8, dtype=torch.bool), 0)}, "block_mask.size"),
        ({"block_mask": torch.ones(8, 8, dtype=torch.bool)}, "block_mask"),
        ({"dropout_seed": -1}, "dropout_seed"),
        ({"dropout_seed": 2.5}, "dropout_seed"),
        ({"causal": None}, "causal"),
        ({"window": 2.5}, "window"),
        ({"window": True}, "window"),
        ({"window": 4, "sinks": 2.5}, "sinks"),
        ({"softcap": math.inf}, "softcap"),
        ({"scale": math.inf}, "scale"),
        ({"alibi": [0.5] * 4}, "alibi"),
        ({"bias": torch.zeros(64, 64, device="meta")}, "bias"),
        ({"cu_seqlens": [0, 64]}, "cu_seqlens"),
        ({"cu_seqlens": (torch.tensor([0, 64]),)}, "cu_seqlens"),
        ({"bias": torch.zeros(4, 4)}, "bias"),
    ],
)
def test_a_wrong_option_is_named(options, field):
    with pytest.raises(InputError) as caught:
        explain(**options)
    assert field in {problem.field for problem in caught.value.problems}


@pytest.mark.parametrize(
    ("x", "field"),
    [
        (torch.ones(1, 5, 2, 4, dtype=torch.int64), "q_BTNH"),
        (torch.ones(1, 5, 2, 4, dtype=torch.complex64), "q_BTNH"),
        (torch.ones(1, 5, 2, 0), "d_head"),
        (torch.ones(5, 2, 4), "q, k, v"),
        ([[1.0]], "q, k, v"),
    ],
)
def test_what_no_score_is_made_of_is_refused(x, field):
    with pytest.raises(InputError) as caught:
        attention(x, x, x, causal=True, backend="blockwise")
    assert field in {problem.field for problem in caught.value.problems}


def test_packing_needs_one_row():
    x = torch.zeros(2, 6, 1, 4)
    with pytest.raises(InputError, match="batch=2"):
        attention(x, x, x, causal=True, cu_seqlens=torch.tensor([0, 6]))


# --- libraries that are not here ------------------------------------------------------------


@pytest.mark.parametrize("name", [n for n in CASES if n not in ("learned sinks", "much at once")])
@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_flex_hides_and_adds_what_the_definition_does(name):
    """Its masks, on a CPU, where FlexAttention runs forward alone and keeps no log."""
    inputs = draw(2, 21, 26, 4, 2, 16)
    options, learned = cases(4, 21, 26, 2)[name]
    asked = {**options, **learned}
    expected = attention(*inputs, **asked, backend="reference")
    with torch.no_grad():
        read = read_options(*(x.float() for x in inputs), **asked)
        got, _ = flex.attend(*(x.float() for x in inputs), read)
    assert_equal([got], [expected], 1e-5)


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_flex_keeps_packed_sequences_apart():
    q, k, v = (x.float() for x in draw(1, 23, 26, 4, 2, 16))
    cu_seqlens = torch.tensor([0, 4, 5, 17, 23]), torch.tensor([0, 6, 7, 20, 26])
    options = {"causal": True, "window": 5, "cu_seqlens": cu_seqlens}
    expected = attention(q, k, v, **options, backend="reference")
    with torch.no_grad():
        got, _ = flex.attend(q, k, v, read_options(q, k, v, **options))
    assert_equal([got], [expected.double()], 1e-5)


def test_sinks_that_join_a_log_afterwards_take_their_share():
    q, k, v = draw(1, 6, 6, 2, 2, 4)
    sink = torch.randn(2, dtype=torch.float64)
    out, lse = attention(q, k, v, causal=True, return_lse=True, backend="reference")
    got = flex._with_sinks(out.transpose(1, 2), lse.transpose(1, 2), sink)
    expected = by_loops(q, k, v, causal=True, sink_logits=sink)
    assert_equal([x.transpose(1, 2) for x in got], expected, 1e-12)


@pytest.mark.parametrize("with_log", [False, True])
def test_flash3_is_asked_for_what_was_asked(monkeypatch, with_log):
    asked = {}

    def flash_attn_func(q, _k, _v, **options):
        asked.update(options)
        return (q, q[..., 0]) if with_log else q

    module = types.ModuleType(flash3.PACKAGE)
    module.flash_attn_func = flash_attn_func
    monkeypatch.setitem(sys.modules, flash3.PACKAGE, module)
    q = torch.ones(1, 6, 2, 16)
    out, _ = flash3.attend(q, q, q, read_options(q, q, q, causal=True, window=3, scale=0.5))
    assert out is q
    expected = {"softmax_scale": 0.5, "causal": True, "window_size": (2, 0), "softcap": 0.0}
    assert asked == expected
