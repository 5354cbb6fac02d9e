"""FLOPs by the papers' conventions, with recomputation, reading prompts and decoding."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from isoflop.arch import Arch, Attention, LatentAttention, gpt, llama
from isoflop.arch.spec import Chunked, Window
from isoflop.arch.zoo import entry
from isoflop.count import (
    FLOPS_CONVENTIONS,
    Workload,
    flops_decode,
    flops_forward,
    flops_prefill,
    flops_training,
    params,
)
from isoflop.quantity.expr import FUNCTIONS
from strategies import gpts, llamas

TINY = llama(
    "tiny", d_model=16, n_layers=3, n_heads=4, n_kv_heads=2, d_ff=24, vocab_size=40, max_seq_len=64
)


def by(name: str, arch: Arch, work: Workload) -> float:
    return float(FLOPS_CONVENTIONS[name].count(arch, work).value)


@given(st.integers(1, 6), st.integers(1, 8), st.integers(1, 9), st.integers(1, 64), st.integers(1, 5),
       st.integers(2, 99))  # fmt: skip
@settings(max_examples=50, deadline=None)
def test_megatron_is_narayanans_equation_3(
    layers: int, a: int, size: int, s: int, B: int, V: int
) -> None:
    h = a * size
    arch = gpt("g", d_model=h, n_layers=layers, n_heads=a, vocab_size=V, max_seq_len=64)
    work = Workload.train(B, s)
    scale = B * s * layers * h**2
    recomputed = 96 * scale * (1 + s / (6 * h) + V / (16 * layers * h))
    own = 72 * scale * (1 + s / (6 * h) + V / (12 * layers * h))
    assert by("megatron", arch, work) == pytest.approx(recomputed, rel=1e-12)
    assert by("megatron-model", arch, work) == pytest.approx(own, rel=1e-12)
    assert by("exact", arch, work) == by("megatron-model", arch, work)


def test_palm_is_6n_and_12_l_h_q_t_per_token() -> None:
    arch, T = entry("palm-540b").arch, 2048
    N = params(arch).value
    per_token = 6 * N + 12 * 118 * 48 * 256 * T  # 2204.02311, appendix B
    assert by("palm", arch, Workload.train(3, T)) == 3 * T * per_token


def test_6n_and_kaplan_differ_by_embedding_and_head() -> None:
    work = Workload.train(2, 8)
    N = params(TINY).value
    assert by("6n", TINY, work) == 16 * 6 * N
    assert by("kaplan", TINY, work) == 16 * 6 * (N - 2 * 40 * 16)  # the final norm is counted


def test_a_causal_mask_leaves_half_of_the_pairs_and_a_half_of_the_diagonal() -> None:
    work = Workload.train(1, 32)
    pairs = 3 * 3 * 4 * 4 * 4 * 32 * 32  # passes, layers, 2 products x 2, heads, head size, pairs
    assert by("exact", TINY, work) - by("exact-causal", TINY, work) == pairs * (1 - 33 / 64)


def test_every_convention_names_its_source_and_its_formula_reads_back() -> None:
    work = Workload.train(2, 16)
    for name, convention in FLOPS_CONVENTIONS.items():
        assert convention.source, name
        size = convention.count(TINY, work)
        names = {n: s.value for n, s in size.symbols().items()}
        assert eval(size.text, dict(FUNCTIONS), names) == size.value, name


@given(st.one_of(gpts(), llamas()), st.integers(1, 3), st.integers(1, 16))
@settings(max_examples=40, deadline=None)
def test_recomputing_costs_between_nothing_and_one_forward_pass(
    arch: Arch, batch: int, seq_len: int
) -> None:
    work = Workload.train(batch, seq_len)
    forward = flops_forward(arch, work)
    none, selective, full = (
        flops_training(arch, work, r).value for r in ("none", "selective", "full")
    )
    assert none == 3 * forward.value
    assert none <= selective <= full <= 4 * forward.value
    assert full - none == forward.value - forward.find("head").value
    cores = forward.find("layer/attention/core").value * forward.copies("layer/attention/core")
    assert selective - none == cores


@given(st.integers(1, 4), st.integers(2, 33))
@settings(max_examples=25, deadline=None)
def test_decoding_token_by_token_does_the_causal_work_of_a_prompt(batch: int, prompt: int) -> None:
    """One token at each context length; a prompt writes logits once, decoding each time."""
    steps = sum(flops_decode(TINY, batch, context).value for context in range(1, prompt + 1))
    whole = flops_prefill(TINY, batch, prompt, causal_skip=True)
    heads = whole.find("head").value
    assert whole.find("head").value == 2 * batch * 16 * 40
    assert steps - prompt * heads == whole.value - heads


def sees(span: Window | Chunked, query: int, key: int) -> bool:
    if isinstance(span, Window):
        return 0 <= query - key < span.window
    return key <= query and key // span.chunk == query // span.chunk


@given(
    st.one_of(st.builds(Window, st.integers(1, 40)), st.builds(Chunked, st.integers(1, 40))),
    st.integers(1, 30),
    st.integers(0, 30),
)
@settings(max_examples=60, deadline=None)
def test_a_causal_window_or_chunk_scores_the_pairs_counted_one_by_one(
    span: Window | Chunked, new: int, before: int
) -> None:
    attention = TINY.layers[0].attention
    assert isinstance(attention, Attention)
    layer = replace(TINY.layers[0], attention=replace(attention, span=span))
    arch = replace(TINY, layers=(layer,) * 3)
    S = before + new
    pairs = sum(sees(span, query, key) for query in range(before, S) for key in range(S))
    work = Workload(2, new, S, causal_skip=True)
    core = flops_forward(arch, work).find("layer/attention/core").value
    assert core == 2 * 4 * 4 * 4 * pairs  # batch, 2 products of 2 FLOPs, 4 heads of 4


LATENT = LatentAttention(
    n_heads=3, d_kv_latent=10, d_head_nope=5, d_head_rope=2, d_head_value=7, d_q_latent=6
)


def multiplied(*product: str, **sizes: int) -> int:
    """FLOPs of contractions over named axes, each in einsum's words."""
    return sum(2 * math.prod(sizes[a] for a in set(axes) - {" "}) for axes in product)


@given(st.integers(1, 4), st.integers(2, 40))
@settings(max_examples=25, deadline=None)
def test_decoding_meets_the_cached_latents_and_not_keys_that_nobody_keeps(
    batch: int, context: int
) -> None:
    """DeepSeek-V2, section 2.1.2: the maps out of the latent are absorbed."""
    arch = replace(TINY, layers=(replace(TINY.layers[0], attention=LATENT),))
    step = flops_decode(arch, batch, context)
    sizes = {"b": batch, "s": context, "n": 3, "c": 10, "d": 5, "r": 2, "v": 7}
    # Queries into the latent, scores over latents and rotated keys, sums of latents, values.
    absorbed = multiplied("b n d c", "b n s c", "b n s r", "b n s c", "b n c v", **sizes)
    found = step.find("layer/attention/kv_up").value + step.find("layer/attention/core").value
    assert found == absorbed


def test_more_context_never_shrinks_a_decoding_step() -> None:
    sizes = [flops_decode(TINY, 1, context).value for context in range(1, 20)]
    assert sizes == sorted(sizes)
    assert sizes[1] - sizes[0] == 4 * 4 * 4 * 3  # 4 N H per key, 3 layers
