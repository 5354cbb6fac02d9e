"""FLOPs by the papers' conventions, with recomputation, reading prompts and decoding."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from isoflop.arch import Arch, gpt, llama
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
def test_megatron_is_narayanans_equation_2(
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


def test_more_context_never_shrinks_a_decoding_step() -> None:
    sizes = [flops_decode(TINY, 1, context).value for context in range(1, 20)]
    assert sizes == sorted(sizes)
    assert sizes[1] - sizes[0] == 4 * 4 * 4 * 3  # 4 N H per key, 3 layers
