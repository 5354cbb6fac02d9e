"""Counts against numbers that others published, and identities that must hold."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from isoflop.arch import (
    Arch,
    Dense,
    Experts,
    LatentAttention,
    Layer,
    gpt,
    llama,
    palm,
    read_spec,
    zoo,
)
from isoflop.arch.spec import Attention, BlockSparse, Embedding, Head, RmsNorm, Rope, Window
from isoflop.count import (
    TRAINING_STATES,
    Precision,
    Workload,
    bytes_kv_cache,
    flops_6n,
    flops_forward,
    memory_inference,
    memory_training,
    params,
    tasks,
)
from isoflop.errors import InputError
from isoflop.quantity.expr import FUNCTIONS

GPT3 = gpt("gpt3-175b", d_model=12288, n_layers=96, n_heads=96, vocab_size=50257, max_seq_len=2048)
LLAMA3_8B = llama("llama-3-8b", d_model=4096, n_layers=32, n_heads=32, n_kv_heads=8, d_ff=14336,
                  vocab_size=128256, max_seq_len=8192, theta=500000.0)  # fmt: skip
PALM = palm("palm-540b", d_model=18432, n_layers=118, n_heads=48, d_head=256, d_ff=73728,
            vocab_size=256000, max_seq_len=2048)  # fmt: skip


def test_known_models_have_their_known_counts() -> None:
    assert params(GPT3).value == 174_604_259_328
    assert params(LLAMA3_8B).value == 8_030_261_248
    assert params(PALM).value == pytest.approx(540.356e9, rel=1e-6)


def deepseek_v3() -> Arch:
    """DeepSeek-V3 (2412.19437, section 4.2), without its prediction head."""
    attention = LatentAttention(
        128, d_kv_latent=512, d_head_nope=128, d_head_rope=64, d_head_value=128, d_q_latent=1536
    )
    dense = Layer(attention, Dense(18432, "silu", gated=True), RmsNorm(), name="dense")
    expert = Dense(2048, "silu", gated=True)
    moe = replace(dense, feed_forward=Experts(256, 8, expert, shared=expert), name="moe")
    return Arch(
        "deepseek-v3",
        7168,
        129280,
        4096,
        Embedding(129280),
        (dense,) * 3 + (moe,) * 58,
        Head(),
        RmsNorm(),
    )


def test_latent_attention_and_experts_count_deepseek_v3() -> None:
    assert params(deepseek_v3()).value == 671_026_404_352
    cache = bytes_kv_cache(deepseek_v3(), Workload.decode(1, 1), Precision.BF16)
    assert cache.value == (512 + 64) * 61 * 2  # latent and rotated key, 61 layers, 2 bytes


def test_experts_count_mixtral() -> None:
    attention = Attention(32, 8, 128, Rope(1e6))
    layer = Layer(attention, Experts(8, 2, Dense(14336, "silu", gated=True)), RmsNorm())
    arch = Arch("mixtral", 4096, 32000, 32768, Embedding(32000), (layer,) * 32, Head(), RmsNorm())
    assert params(arch).value == 46_702_792_704
    assert params(arch, active=True).value == 12_879_925_248


def test_flops_of_a_layer_by_hand() -> None:
    tiny = llama(
        "tiny",
        d_model=8,
        n_layers=3,
        n_heads=2,
        n_kv_heads=1,
        d_ff=16,
        vocab_size=32,
        max_seq_len=4,
    )
    tree = flops_forward(tiny, Workload.train(batch=5, seq_len=4))
    tokens = 20
    assert tree.find("layer/attention/q").value == 2 * tokens * 8 * 8
    assert tree.find("layer/attention/k").value == 2 * tokens * 8 * 4  # one kv head of 4
    assert tree.find("layer/attention/core").value == 2 * 2 * 5 * 2 * 4 * 4 * 4  # two products
    assert tree.find("layer/feed_forward/gate").value == 2 * tokens * 8 * 16
    assert tree.find("layer").value == 3 * sum(c.value for c in tree.find("layer").children)
    assert tree.find("head").value == 2 * tokens * 8 * 32


def test_skipping_masked_pairs_halves_the_scores() -> None:
    full = flops_forward(GPT3, Workload.train(1, 2048)).find("layer/attention/core").value
    skip = (
        flops_forward(GPT3, Workload.train(1, 2048, causal_skip=True))
        .find("layer/attention/core")
        .value
    )
    assert skip / full == pytest.approx(2049 / 4096)


def test_matmul_flops_are_two_per_weight_and_token() -> None:
    """2 (N - embeddings) per token for the untied model: every other weight multiplies once."""
    tree = flops_forward(LLAMA3_8B, Workload.train(1, 16))
    scores = tree.find("layer/attention/core").value * 32
    weights = params(LLAMA3_8B)
    norms = 4096 * (2 * 32 + 1)
    multiplying = weights.value - weights.find("embedding").value - norms
    assert tree.value - scores == 2 * 16 * multiplying


def test_six_n_of_gpt3_is_the_published_compute() -> None:
    assert float(flops_6n(GPT3, 300 * 10**9).value) == pytest.approx(3.14e23, rel=0.002)


def test_the_cache_shrinks_by_the_share_of_kv_heads() -> None:
    wide = replace_kv(LLAMA3_8B, 32)
    work = Workload.decode(4, 8192)
    assert (
        bytes_kv_cache(LLAMA3_8B, work, Precision.BF16).value * 4
        == bytes_kv_cache(wide, work, Precision.BF16).value
    )


def replace_kv(arch: Arch, n_kv_heads: int) -> Arch:
    layers = tuple(
        replace(x, attention=replace(x.attention, n_kv_heads=n_kv_heads))
        for x in arch.layers  # type: ignore[call-arg]
    )
    return replace(arch, layers=layers)


def test_a_windowed_layer_caches_its_window_only() -> None:
    local = replace(
        LLAMA3_8B.layers[0], attention=Attention(32, 8, 128, Rope(), Window(1024)), name="local"
    )
    mixed = replace(LLAMA3_8B, layers=(local, replace(LLAMA3_8B.layers[0], name="full")) * 16)
    per_token = 2 * 8 * 128 * 2 * 16
    assert bytes_kv_cache(mixed, Workload.decode(1, 8192), Precision.BF16).value == per_token * (
        1024 + 8192
    )


def test_memory_of_gpt3_in_half_precision_is_350_gb() -> None:
    tree = memory_inference(GPT3, Workload.train(1, 2048), Precision.FP16)
    assert tree.find("bytes_weights").value == 2 * 174_604_259_328
    assert tree.find("bytes_kv_cache").value == pytest.approx(9.66e9, rel=1e-3)
    assert tree.value == sum(child.value for child in tree.children)


def test_mixed_precision_adam_takes_sixteen_bytes_per_parameter() -> None:
    tree = memory_training(GPT3, Workload.train(1, 2048), TRAINING_STATES["bf16"])
    state = sum(tree.find(n).value for n in ("bytes_weights", "bytes_grads", "bytes_optimizer"))
    assert state == 16 * params(GPT3).value


SHAPES = st.builds(
    lambda heads, kv, size, layers, ff, vocab, tied: llama(
        "random", d_model=heads * size, n_layers=layers, n_heads=heads * kv, n_kv_heads=kv, d_head=size,
        d_ff=ff, vocab_size=vocab, max_seq_len=64, tied=tied),
    st.integers(1, 8), st.integers(1, 8), st.integers(1, 8).map(lambda x: 2 * x), st.integers(1, 9),
    st.integers(1, 99), st.integers(2, 99), st.booleans(),
)  # fmt: skip


@given(SHAPES)
@settings(max_examples=50)
def test_every_formula_of_every_tree_reads_back_to_its_value(arch: Arch) -> None:
    work = Workload.train(2, 8)
    trees = [
        params(arch),
        flops_forward(arch, work),
        memory_training(arch, work, TRAINING_STATES["fp32"]),
    ]
    for root in trees:
        for _, node in root.walk():
            assert eval(node.total.digits, dict(FUNCTIONS)) == node.value


@given(SHAPES)
@settings(max_examples=30)
def test_the_operator_list_does_the_flops_of_the_tree(arch: Arch) -> None:
    work = Workload.train(2, 8)
    listed = sum((t.flops * t.times).value for t in tasks(arch, work))
    assert listed == flops_forward(arch, work).value


def test_impossible_work_is_refused_with_every_problem() -> None:
    with pytest.raises(InputError) as caught:
        Workload(0, -1, 4)
    assert {p.field for p in caught.value.problems} == {"batch", "seq_len"}
    with pytest.raises(InputError, match="sees itself"):
        Workload(1, 8, 4)


# --- GPT-3's banded layers ------------------------------------------------------------------

DOCS = Path(__file__).parent.parent / "docs"


def test_the_documented_band_of_gpt3_changes_scores_and_cache_and_nothing_else() -> None:
    banded = read_spec(DOCS / "gpt3-banded.toml")
    assert [layer.name for layer in banded.layers[:4]] == ["dense", "banded"] * 2
    assert params(banded).value == params(GPT3).value == 174_604_259_328
    work = Workload.train(3, 2048)
    # Of 96 layers 48 score 256 of 2,048 keys; a product with the keys and one with the values.
    fewer = 48 * 2 * 2 * 3 * 2048 * (2048 - 256) * 12288
    assert flops_forward(GPT3, work).value - flops_forward(banded, work).value == fewer
    kept = 2 * 2 * 3 * 12288 * (48 * 2048 + 48 * 256)  # bytes, k and v, sequences, width, tokens
    assert bytes_kv_cache(banded, work, Precision.BF16).value == kept


def test_the_page_of_sparse_attention_shows_the_file_and_the_zoo_points_to_it() -> None:
    page = (DOCS / "sparse-attention.md").read_text(encoding="utf-8")
    assert (DOCS / "gpt3-banded.toml").read_text(encoding="utf-8") in page
    for name in zoo.names():
        if name.startswith("gpt3-"):
            assert "docs/sparse-attention.md" in zoo.entry(name).note


@pytest.mark.parametrize(("stride", "kept"), [(0, 256), (8, 2048)])
def test_blocks_without_a_stride_are_a_band_and_cached_as_one(stride: int, kept: int) -> None:
    """With a stride, any earlier key may be asked for again; with none, two blocks of 128."""

    def blocks(layer: Layer) -> Layer:
        span = BlockSparse(128, n_local=2, stride=stride)
        assert isinstance(layer.attention, Attention)
        return replace(layer, attention=replace(layer.attention, span=span))

    sparse = replace(GPT3, layers=tuple(map(blocks, GPT3.layers)))
    work = Workload.train(1, 2048)
    cache = bytes_kv_cache(sparse, work, Precision.BF16)
    assert cache.value == 2 * 2 * 96 * 12288 * kept
    scores = flops_forward(sparse, work).find("layer/attention/core").value
    assert scores == 4 * 2048 * (256 + (2048 // 8 if stride else 0)) * 12288
