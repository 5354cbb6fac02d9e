"""Memory: published formulas reproduced, and what must hold of every model and sharding."""

from __future__ import annotations

import csv
import itertools
import os
import runpy
from collections import defaultdict
from dataclasses import replace
from math import ceil, exp
from pathlib import Path
from typing import Any

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from isoflop.arch import Arch, Attention, Dense, Experts, gpt, llama
from isoflop.arch.spec import QkNorm, RmsNorm
from isoflop.arch.zoo import entry
from isoflop.check.published.memory import Result
from isoflop.count import (
    FORMATS,
    KERNELS,
    OPTIMIZERS,
    RECOMPUTES,
    TRAINING_STATES,
    Kernels,
    Precision,
    Recompute,
    Shards,
    Trained,
    Workload,
    bytes_kv_cache,
    bytes_saved,
    bytes_weights,
    memory_inference,
    memory_rank,
    memory_training,
    params,
)
from isoflop.count.memory_stack import ERROR_OF_MEMORY
from isoflop.count.stages import (
    layers_fullest,
    layers_fullest_pair,
    layers_of_ends,
    layers_of_stage,
)
from isoflop.errors import InputError, UnknownName
from isoflop.quantity import Basis, Interval, Node, number
from isoflop.quantity.expr import FUNCTIONS
from strategies import archs

GPT3 = gpt(
    "gpt3", d_model=12288, n_layers=96, n_heads=96, vocab_size=50257, max_seq_len=2048, dropout=0.1
)
TINY = llama(
    "tiny", d_model=16, n_layers=4, n_heads=4, n_kv_heads=2, d_ff=24, vocab_size=40, max_seq_len=64
)
STATE = TRAINING_STATES["bf16"]


def decoders() -> st.SearchStrategy[Arch]:
    """Any legal spec of the kinds that are described."""

    def plain(arch: Arch) -> Arch:
        layers = tuple(replace(layer, cross=None) for layer in arch.layers)
        return replace(arch, layers=layers, encoder=None, vision=None)

    return archs().map(plain)


works = st.builds(Workload.train, st.integers(1, 4), st.integers(1, 33))
kernels = st.sampled_from(sorted(KERNELS)).map(KERNELS.__getitem__)
recomputes = st.sampled_from(RECOMPUTES)


def agrees(root: Node) -> None:
    """Branches are the sum of their parts, and each printed formula gives its value again."""
    for path, node in root.walk():
        if node.children:
            assert node.size.value == sum(child.value for child in node.children), path
        names = {name: symbol.value for name, symbol in node.total.symbols().items()}
        again = eval(node.total.text, dict(FUNCTIONS), names)
        assert float(again) == pytest.approx(float(node.value), rel=1e-12), path


# --- weights ------------------------------------------------------------------------------


def test_int4_has_scales_and_leaves_ends_norms_and_biases_in_16_bits() -> None:
    small = gpt("small", d_model=256, n_layers=3, n_heads=4, vocab_size=1000, max_seq_len=128)
    matrices = 3 * 12 * 256**2
    other = params(small).value - matrices
    tree = bytes_weights(small, "int4")
    assert tree.value == matrices * 4 / 8 + matrices / 128 * 2 + other * 2
    assert tree.value - other * 2 == matrices * 4.125 / 8
    assert bytes_weights(small, "int4-zero").value - other * 2 == matrices * 4.25 / 8
    assert Basis.ASSUMED in tree.bases
    assert "stay in 16 bits" in tree.source


def test_a_vision_tower_and_its_projector_stay_in_16_bits() -> None:
    llava = entry("llava-1.5-7b").arch
    stored = bytes_weights(llava, "nf4")
    assert stored.find("vision").value == 2 * params(llava).find("vision").value
    assert stored.find("layer").value < params(llava).find("layer").value


def test_nf4_with_double_quantization_is_the_papers_4_127_bits() -> None:
    # 2305.14314, section 3: 0.5 bits of scales become 8/64 + 32/(64 * 256) = 0.127.
    assert FORMATS["nf4-dq"].bits_per_weight == pytest.approx(4.127, abs=5e-4)
    assert FORMATS["nf4"].bits_per_weight - FORMATS["nf4-dq"].bits_per_weight == pytest.approx(
        0.373, abs=5e-4
    )


ORDER = ["fp32", "bf16", "fp8", "nf4", "int4-zero", "nf4-dq", "int4"]


@given(st.integers(1, 8), st.integers(1, 4), st.integers(1, 8))
@settings(max_examples=20, deadline=None)
def test_lower_precision_never_adds_where_groups_are_full(heads: int, layers: int, ff: int) -> None:
    arch = llama("any", d_model=128 * heads, n_layers=layers, n_heads=heads, d_ff=128 * ff,
                 vocab_size=99, max_seq_len=8)  # fmt: skip
    sizes = [bytes_weights(arch, name).value for name in ORDER]
    assert sizes == sorted(sizes, reverse=True)
    assert bytes_weights(arch, "fp16").value == bytes_weights(arch, Precision.BF16).value


def test_an_unknown_format_is_named() -> None:
    with pytest.raises(UnknownName, match="did you mean int8 or int4"):
        bytes_weights(TINY, "int5")


# --- cache, activations, logits of inference ----------------------------------------------


@given(decoders(), st.integers(1, 3), st.integers(1, 99), st.integers(1, 40))
@settings(max_examples=40, deadline=None)
def test_pages_round_up_and_never_below_what_is_cached(
    arch: Arch, batch: int, tokens: int, page: int
) -> None:
    work = Workload.decode(batch, tokens)
    plain, paged = (bytes_kv_cache(arch, work, Precision.BF16, page=p) for p in (None, page))
    assert paged.value >= plain.value
    assert (
        paged.value
        <= plain.value
        + page * bytes_kv_cache(arch, Workload.decode(batch, 1), Precision.BF16).value
    )
    assert bytes_kv_cache(arch, work, Precision.BF16, page=1).value == plain.value
    agrees(paged)


def test_a_page_of_16_holds_17_tokens_in_two() -> None:
    per_token = 2 * 2 * 4 * 4 * 2  # K and V, kv heads, head size, layers, bytes
    assert (
        bytes_kv_cache(TINY, Workload.decode(3, 17), Precision.BF16, page=16).value
        == 3 * 32 * per_token
    )
    with pytest.raises(InputError, match="at least 1 token"):
        bytes_kv_cache(TINY, Workload.decode(1, 1), Precision.BF16, page=0)


def test_logits_of_all_positions_are_as_many_as_tokens() -> None:
    work = Workload.train(2, 10)
    last, every = (
        memory_inference(TINY, work, Precision.BF16, logits=which) for which in ("last", "all")
    )
    assert last.find("bytes_logits").value == 2 * 40 * 4
    assert every.find("bytes_logits").value == 2 * 10 * 40 * 4


def test_the_runtime_is_left_out_unless_asked_for_and_then_has_a_range() -> None:
    work = Workload.train(1, 8)
    assert memory_inference(TINY, work, Precision.BF16).interval is None
    tree = memory_inference(TINY, work, Precision.BF16, overhead=True)
    assert tree.interval is not None
    assert [s.name for s in tree.assumptions] == ["bytes_runtime"]


@given(decoders(), works, st.sampled_from(sorted(FORMATS)))
@settings(max_examples=40, deadline=None)
def test_inference_adds_up_and_more_tokens_never_shrink_it(
    arch: Arch, work: Workload, stored: str
) -> None:
    tree = memory_inference(arch, work, stored)
    agrees(tree)
    longer = Workload.train(work.batch, work.seq_len + 1)
    assert memory_inference(arch, longer, stored).value >= tree.value


# --- training state -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "per_param"),
    [
        ("fp32", 16),
        ("bf16", 16),
        ("bf16-fp32-grads", 18),
        ("fp16-fp32-main-grads", 20),
        ("bf16-pure", 8),
    ],
)
@pytest.mark.parametrize(("zero", "dp"), [(0, 4), (1, 4), (2, 4), (3, 4)])
def test_adams_recipes_take_their_published_bytes_per_parameter(
    name: str, per_param: int, zero: int, dp: int
) -> None:
    # Megatron-Core dist_optimizer.md: 18 -> 6 + 12/d, 20 -> 4 + 16/d, fp32 16 -> 8 + 8/d;
    # Rajbhandari 2020, figure 1: 16 -> 4 + 12/d, 2 + 14/d, 16/d.
    split = {"fp32": (8, 12, 16), "bf16": (12, 14, 16), "bf16-fp32-grads": (12, 16, 18),
             "fp16-fp32-main-grads": (16, 18, 20), "bf16-pure": (4, 6, 8)}  # fmt: skip
    over = 0 if zero == 0 else split[name][zero - 1]
    job = Trained(TINY, Workload.train(1, 8), TRAINING_STATES[name])
    rank = memory_rank(job, Shards(dp=dp, zero=zero))  # type: ignore[arg-type]
    held = sum(
        float(rank.find(f"bytes_{part}").value) for part in ("weights", "grads", "optimizer")
    )
    assert held == (per_param - over + over / dp) * params(TINY).value


def test_optimizers_keep_what_their_papers_say() -> None:
    vectors = (4 * 2 + 1) * 16  # RMSNorm weights
    matrices = params(TINY).value - vectors
    ends = 2 * 40 * 16
    # rows + columns of every matrix: q, k, v, out, gate, up, down; embedding and head
    factored = 4 * (32 + 24 + 24 + 32 + 40 + 40 + 40) + 2 * 56

    def state(name: str) -> float:
        recipe = replace(TRAINING_STATES["fp32"], optimizer=OPTIMIZERS[name])
        return float(
            memory_training(TINY, Workload.train(1, 4), recipe).find("bytes_optimizer").value
        )

    assert state("sgd") == 0
    assert state("sgd-momentum") == 4 * (matrices + vectors)
    assert state("adam") == 2 * state("adam-bf16") == 8 * (matrices + vectors)
    assert state("adafactor") == 4 * (factored + vectors)
    assert state("muon") == 4 * (matrices - ends) + 8 * (ends + vectors)
    assert state("adam-8bit") == state("adam"), "all weights of this model are below 4096 numbers"


def test_8_bit_adam_takes_two_bytes_and_a_scale_per_256() -> None:
    large = llama(
        "large", d_model=256, n_layers=1, n_heads=4, d_ff=512, vocab_size=512, max_seq_len=8
    )
    recipe = replace(TRAINING_STATES["bf16-pure"], optimizer=OPTIMIZERS["adam-8bit"])
    held = memory_training(large, Workload.train(1, 4), recipe).find("bytes_optimizer").value
    vectors = 3 * 256
    matrices = params(large).value - vectors
    assert held == 2 * (matrices + 4 * matrices / 256) + 8 * vectors


# --- activations ----------------------------------------------------------------------------


@given(
    st.integers(1, 4), st.integers(1, 64), st.integers(1, 12), st.integers(1, 16), st.integers(1, 5)
)
@settings(max_examples=60, deadline=None)
def test_activations_are_korthikantis_for_gpt_with_dropout(
    b: int, s: int, a: int, size: int, n: int
) -> None:
    # 2205.05198: equation 1, and table 2 for selective and full recomputation.
    h = a * size
    arch = gpt("g", d_model=h, n_layers=n, n_heads=a, vocab_size=9, max_seq_len=64, dropout=0.1)

    def layers(recompute: Recompute) -> float:
        tree = bytes_saved(
            arch, Workload.train(b, s), Precision.FP16, KERNELS["korthikanti"], recompute
        )
        return float(tree.find("layer").value)

    assert layers("none") == pytest.approx(n * s * b * h * (34 + 5 * a * s / h), rel=1e-12)
    assert layers("selective") == n * 34 * s * b * h
    assert layers("full") == n * 2 * s * b * h


@pytest.mark.parametrize("tp", [1, 2, 8])
def test_tensor_and_sequence_parallelism_split_as_in_korthikantis_table_2(tp: int) -> None:
    s, h, a = 2048, 12288, 96

    def layer(recompute: Recompute, *, sequence_parallel: bool) -> float:
        job = Trained(GPT3, Workload.train(1, s), STATE, recompute, KERNELS["korthikanti"])
        rank = memory_rank(job, Shards(tp=tp, sequence_parallel=sequence_parallel))
        return float(rank.find("bytes_activations/layer").size.value) / (s * h)

    scores = 5 * a * s / h
    assert layer("none", sequence_parallel=False) == pytest.approx(10 + (24 + scores) / tp)
    assert layer("none", sequence_parallel=True) == pytest.approx((34 + scores) / tp)
    assert layer("selective", sequence_parallel=False) == pytest.approx(10 + 24 / tp)
    assert layer("selective", sequence_parallel=True) == pytest.approx(34 / tp)


def test_without_dropout_and_with_flash_two_masks_and_all_scores_are_gone() -> None:
    plain = replace(entry("gpt3-175b").arch)
    tree = bytes_saved(
        plain, Workload.train(1, 2048), Precision.BF16, replace(KERNELS["flash"], statistics=False)
    )
    assert tree.find("layer").size.value == 32 * 2048 * 12288


def test_a_llama_block_takes_35_and_43_with_unfused_norms() -> None:
    # Saved-tensor hooks on transformers' LlamaDecoderLayer with f = 2.75 h, kv = a/4, each storage
    # counted once: 12 + 4/4 + 8 * 2.75 = 35, and 8 more with RMSNorm in separate fp32 steps (4
    # bytes of each norm's input and 2 of its normalised input, for 2 of the input).
    arch = llama(
        "l",
        d_model=1024,
        n_layers=1,
        n_heads=16,
        n_kv_heads=4,
        d_ff=2816,
        vocab_size=9,
        max_seq_len=64,
    )
    for name, units in (("flash", 35), ("huggingface", 43)):
        rules = replace(KERNELS[name], statistics=False)
        tree = bytes_saved(arch, Workload.train(1, 64), Precision.BF16, rules)
        assert tree.find("layer").size.value == units * 64 * 1024


def test_a_real_llama_layer_keeps_what_its_kernels_are_said_to_keep() -> None:
    # Bytes of transformers' own layer, each storage once, weights and rotary tables apart.
    torch = pytest.importorskip("torch")
    llama_layers = pytest.importorskip("transformers.models.llama.modeling_llama")
    width, heads, kv, ff, tokens = 64, 4, 2, 96, 32
    config = llama_layers.LlamaConfig(
        hidden_size=width, num_attention_heads=heads, num_key_value_heads=kv, intermediate_size=ff,
        attn_implementation="sdpa")  # fmt: skip
    layer = llama_layers.LlamaDecoderLayer(config, 0).to(torch.bfloat16)
    stream = torch.randn(1, tokens, width, dtype=torch.bfloat16, requires_grad=True)
    tables = llama_layers.LlamaRotaryEmbedding(config)(stream, torch.arange(tokens)[None])
    known = {t.untyped_storage().data_ptr() for t in (*layer.parameters(), *tables)}
    kept: dict[int, object] = {}

    def keep(tensor: Any) -> Any:
        kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        layer(stream * 1.0, position_embeddings=tables)
    real = sum(t.untyped_storage().nbytes() for p, t in kept.items() if p not in known)  # type: ignore[attr-defined]
    arch = llama("l", d_model=width, n_layers=1, n_heads=heads, n_kv_heads=kv, d_ff=ff,
                 vocab_size=9, max_seq_len=tokens)  # fmt: skip
    tree = bytes_saved(arch, Workload.train(1, tokens), Precision.BF16, KERNELS["huggingface"])
    assert tree.find("layer").size.value == real


def test_logits_cost_ten_bytes_each_eager_four_in_place_and_none_fused() -> None:
    work = Workload.train(2, 8)
    kept = {
        name: bytes_saved(TINY, work, Precision.BF16, KERNELS[name])
        for name in ("eager", "flash", "fused")
    }
    held = [tree.find("loss").value for tree in kept.values()]
    assert held == [2 * 8 * 40 * 10, 2 * 8 * 40 * 4, 0]


def test_the_layer_made_again_shares_room_with_the_loss() -> None:
    tree = bytes_saved(TINY, Workload.train(1, 8), Precision.BF16, recompute="full")
    whole = bytes_saved(TINY, Workload.train(1, 8), Precision.BF16).find("layer").size.value
    assert tree.find("layer_going_backward").value == max(0, whole - tree.find("loss").value)


@given(decoders(), works, kernels)
@settings(max_examples=60, deadline=None)
def test_kept_tensors_add_up_recomputing_never_adds_and_tokens_never_shrink(
    arch: Arch, work: Workload, rules: Kernels
) -> None:
    trees = {r: bytes_saved(arch, work, Precision.BF16, rules, r) for r in RECOMPUTES}
    for tree in trees.values():
        agrees(tree)
    assert trees["selective"].value <= trees["none"].value
    longer = Workload.train(work.batch, work.seq_len + 1)
    for recompute, tree in trees.items():
        assert bytes_saved(arch, longer, Precision.BF16, rules, recompute).value >= tree.value
    assert bytes_saved(arch, work, Precision.FP32, rules).value >= trees["none"].value


# --- ranks ------------------------------------------------------------------------------------


def parts(tree: Node) -> dict[str, float]:
    return {child.name: float(child.value) for child in tree.children}


@given(decoders(), works, kernels, recomputes)
@settings(max_examples=40, deadline=None)
def test_one_rank_of_one_holds_what_the_whole_model_holds(
    arch: Arch, work: Workload, rules: Kernels, recompute: Recompute
) -> None:
    rank = memory_rank(Trained(arch, work, STATE, recompute, rules), Shards())
    whole = memory_training(arch, work, STATE, kernels=rules, recompute=recompute)
    agrees(rank)
    agrees(whole)
    assert parts(rank) == parts(whole)


shards = st.builds(
    Shards, tp=st.sampled_from([1, 2, 4]), pp=st.sampled_from([1, 2]), dp=st.sampled_from([2, 4]),
    cp=st.sampled_from([1, 2]), ep=st.sampled_from([1, 2]), zero=st.sampled_from([0, 1, 2, 3]),
    sequence_parallel=st.booleans(),
)  # fmt: skip


@given(st.integers(1, 4), st.integers(1, 3), st.booleans(), kernels, recomputes, shards,
       st.sampled_from(["tp", "dp", "cp", "ep", "zero", "sequence_parallel"]))  # fmt: skip
@settings(max_examples=80, deadline=None)
def test_sharding_never_adds_memory(
    heads: int, ff: int, moe: bool, rules: Kernels, recompute: Recompute, before: Shards, field: str
) -> None:
    """More of one way of sharding, all else equal, adds to no part of a rank."""
    arch = llama("s", d_model=8 * heads, n_layers=4, n_heads=8 * heads, n_kv_heads=2 * heads, d_head=2,
                 d_ff=8 * ff, vocab_size=33, max_seq_len=64)  # fmt: skip
    if moe:
        spec = Experts(4, 2, Dense(8 * ff, "silu", gated=True), shared=Dense(8, "silu", gated=True))
        arch = replace(arch, layers=(replace(arch.layers[0], feed_forward=spec),) * 4)
    value = getattr(before, field)
    assume(value is not True and not (field == "zero" and value == 3))
    grown = {"zero": value + 1, "sequence_parallel": True}.get(field, 2 * value)
    assume(not (field == "ep" and before.dp * before.cp % grown))
    after = replace(before, **{field: grown})
    job = Trained(arch, Workload.train(2, 16), STATE, recompute, rules)
    held, less = (parts(memory_rank(job, way, n_micro=4)) for way in (before, after))
    # Experts that one rank alone held are gathered once several share them.
    gathers = moe and before.zero == 3 and before.dp * before.cp == before.ep
    names = [name for name in held if not (gathers and name == "bytes_gathered")]
    assert all(less[name] <= held[name] * (1 + 1e-12) for name in names)


def test_ranks_of_a_split_model_hold_it_once() -> None:
    """Stages and ZeRO-3 ranks add up to the model; tensor ranks too, but for the norms."""
    total = 2 * params(TINY).value
    job = Trained(TINY, Workload.train(1, 8), STATE)
    stages = [memory_rank(job, Shards(pp=4), stage=s).find("bytes_weights").value for s in range(4)]
    assert sum(stages) == total
    assert memory_rank(job, Shards(dp=8, zero=3)).find("bytes_weights").value * 8 == total
    norms = 2 * 16 * 9
    assert memory_rank(job, Shards(tp=2)).find("bytes_weights").value * 2 == total + norms


def test_experts_are_dealt_out_and_shared_state_is_not_split_twice() -> None:
    expert = Dense(8, "silu", gated=True)
    arch = replace(TINY, layers=(replace(TINY.layers[0], feed_forward=Experts(8, 2, expert)),) * 4)
    job = Trained(arch, Workload.train(1, 8), STATE)
    whole, dealt = (
        memory_rank(job, Shards(dp=8, ep=ep)).find("bytes_weights").value for ep in (1, 4)
    )
    experts = 4 * 8 * 3 * 16 * 8 * 2  # layers, experts, matrices of 16 x 8, bytes
    assert whole - dealt == experts * 3 / 4
    # ZeRO over 8 copies: experts have 2 copies after being dealt over 4, the same 8 ranks in all.
    split = memory_rank(job, Shards(dp=8, ep=4, zero=3)).find("bytes_weights").value
    assert split == whole / 8


def test_interleaving_holds_korthikantis_extra_share_on_the_first_stage() -> None:
    # Section 4.2.3: L (1 + (p - 1) / (p v)) layers' activations.
    arch = gpt("p", d_model=16, n_layers=24, n_heads=2, vocab_size=9, max_seq_len=64)
    job = Trained(arch, Workload.train(1, 8), STATE)

    def first(virtual: int) -> float:
        tree = memory_rank(job, Shards(pp=4, virtual=virtual), n_micro=99)
        return float(tree.find("bytes_activations/layer").value)

    assert first(3) / first(1) == pytest.approx(1 + 3 / (4 * 3))


@pytest.mark.parametrize(("pp", "virtual"), [(2, 1), (4, 1), (2, 2), (3, 3), (4, 2)])
def test_embeddings_wait_on_the_first_stage_as_often_as_its_order_of_work_says(
    pp: int, virtual: int
) -> None:
    """Chunks go by rounds of pp micro-batches; each later forward waits for one backward."""
    n_micro = 4 * pp
    rounds = range(0, n_micro, pp)
    forwards = [(c, r + i) for r in rounds for c in range(virtual) for i in range(pp)]
    backwards = [(c, r + i) for r in rounds for c in reversed(range(virtual)) for i in range(pp)]
    warm = 2 * (pp - 1) + (virtual - 1) * pp if virtual > 1 else pp - 1
    begun = most = 0
    for step, (chunk, _) in enumerate(forwards):
        begun += chunk == 0
        most = max(most, begun)
        if step >= warm:
            begun -= backwards[step - warm][0] == 0
    arch = gpt("p", d_model=16, n_layers=24, n_heads=2, vocab_size=9, max_seq_len=64, dropout=0.1)
    job = Trained(arch, Workload.train(1, 8), STATE)
    tree = memory_rank(job, Shards(pp=pp, virtual=virtual), n_micro=n_micro)
    embedding = tree.find("bytes_activations/embedding").value
    assert embedding == most * (8 * 8 + 8 * 16)  # token ids, and a mask of one byte


def test_key_norms_of_each_head_split_as_key_heads_do() -> None:
    attention = replace(TINY.layers[0].attention, qk_norm=QkNorm(RmsNorm(), "each_head"))
    assert isinstance(attention, Attention)
    normed = replace(TINY, layers=(replace(TINY.layers[0], attention=attention),) * 4)
    extra = [
        memory_rank(Trained(arch, Workload.train(1, 8), STATE), Shards(tp=4)).find("bytes_weights").value
        for arch in (TINY, normed)
    ]  # fmt: skip
    # Of four query heads one on each rank; of two key heads one, too.
    assert extra[1] - extra[0] == 4 * (4 + 4) * 2


def test_context_parallelism_cuts_every_sequence() -> None:
    job = Trained(TINY, Workload.train(1, 16), STATE)
    one, two = (memory_rank(job, Shards(cp=cp)).find("bytes_activations").value for cp in (1, 2))
    assert one == 2 * two


@pytest.mark.parametrize(
    ("bad", "rule"),
    [({"tp": 0}, "at least 1"), ({"zero": 4}, "0, 1, 2 or 3"), ({"ep": 3}, "divide dp")],
)
def test_impossible_sharding_is_refused(bad: dict[str, int], rule: str) -> None:
    with pytest.raises(InputError, match=rule):
        Shards(**bad)  # type: ignore[arg-type]


def test_a_pipeline_has_a_layer_for_every_chunk_and_the_stage() -> None:
    job = Trained(TINY, Workload.train(1, 8), STATE)
    with pytest.raises(InputError, match="at most n_layers=4"):
        memory_rank(job, Shards(pp=5))
    with pytest.raises(InputError, match=r"pp \* virtual=6: must be at most n_layers=4"):
        memory_rank(job, Shards(pp=3, virtual=2))
    with pytest.raises(InputError, match="between 0 and pp - 1 = 1"):
        memory_rank(job, Shards(pp=2), stage=2)


@given(st.integers(1, 200), st.integers(1, 40), st.integers(1, 5))
def test_every_layer_is_on_one_stage_and_chunks_differ_by_one(
    n_layers: int, pp: int, virtual: int
) -> None:
    assume(pp * virtual <= n_layers)
    stages = [layers_of_stage(n_layers, pp, stage, virtual) for stage in range(pp)]
    assert sorted(i for stage in stages for i in stage) == list(range(n_layers))
    assert max(map(len, stages)) - min(map(len, stages)) <= virtual
    # A chunk is a run of layers; chunk c is the (c // pp)-th run of stage c % pp.
    runs = sorted(run for stage in stages for run in _runs(stage))
    assert len(runs) <= pp * virtual
    assert max(map(len, stages)) <= virtual * -(-n_layers // (pp * virtual))


@given(st.integers(1, 200), st.integers(1, 40), st.integers(1, 5))
def test_formulas_of_the_fullest_stage_and_the_ends_are_the_layers_that_stages_have(
    n_layers: int, pp: int, virtual: int
) -> None:
    assume(pp * virtual <= n_layers)
    sizes = [len(layers_of_stage(n_layers, pp, stage, virtual)) for stage in range(pp)]
    ends = layers_of_ends(n_layers, number(pp), number(virtual))
    assert layers_fullest(n_layers, number(pp)).value == max(sizes)
    assert [end.value for end in ends] == [sizes[0], sizes[-1]]
    if virtual == 1 and pp % 2 == 0:
        pairs = [a + b for a, b in zip(sizes, reversed(sizes), strict=True)]
        assert layers_fullest_pair(n_layers, number(pp)).value == max(pairs)


def _runs(layers: tuple[int, ...]) -> list[tuple[int, ...]]:
    breaks = [i for i in range(1, len(layers)) if layers[i] != layers[i - 1] + 1]
    return [layers[a:b] for a, b in itertools.pairwise([0, *breaks, len(layers)])]


@pytest.mark.parametrize(
    ("n_layers", "pp", "expected"),
    [(126, 16, [7, *[8] * 14, 7]),  # Llama 3 405B (2407.21783, section 3.3.2)
     (70, 12, [5, *[6] * 10, 5]),  # BLOOM 176B: embedding and head count as a layer each
     (61, 16, [3, *[4] * 13, 3, 3]), (96, 5, [19, 19, 20, 19, 19]), (96, 8, [12] * 8)],
)  # fmt: skip
def test_stages_that_do_not_divide_are_short_at_the_ends(
    n_layers: int, pp: int, expected: list[int]
) -> None:
    assert [len(layers_of_stage(n_layers, pp, stage)) for stage in range(pp)] == expected


def test_uneven_stages_hold_the_model_once() -> None:
    arch = llama("odd", d_model=16, n_layers=7, n_heads=4, d_ff=24, vocab_size=40, max_seq_len=64)
    job = Trained(arch, Workload.train(1, 8), STATE)
    for pp, virtual in ((3, 1), (2, 3), (7, 1)):
        held = [memory_rank(job, Shards(pp=pp, virtual=virtual), stage=s).find("bytes_weights").value
                for s in range(pp)]  # fmt: skip
        assert sum(held) == 2 * params(arch).value


def test_zero_3_makes_two_layers_whole_and_one_gradient() -> None:
    job = Trained(TINY, Workload.train(1, 8), STATE)
    rank = memory_rank(job, Shards(dp=8, zero=3))
    layer = 2 * 16 * 16 + 2 * 16 * 8 + 3 * 16 * 24 + 2 * 16
    assert rank.find("bytes_gathered").value == max(layer, 40 * 16) * (2 * 2 + 2)
    assert not any(
        c.name == "bytes_gathered" for c in memory_rank(job, Shards(dp=8, zero=2)).children
    )


def test_experts_that_no_other_rank_shares_are_not_gathered() -> None:
    experts = Experts(8, 2, Dense(64, "silu", gated=True))
    arch = replace(TINY, layers=(replace(TINY.layers[0], feed_forward=experts),) * 4)
    job = Trained(arch, Workload.train(1, 8), STATE)
    dealt, shared = (
        memory_rank(job, Shards(dp=8, ep=ep, zero=3)).find("bytes_gathered").value for ep in (8, 4)
    )
    rest = 2 * 16 * 16 + 2 * 16 * 8 + 2 * 16 + 16 * 8  # attention, norms, router
    assert dealt == rest * (2 * 2 + 2)
    assert shared == (rest + 2 * 3 * 16 * 64) * (2 * 2 + 2)


# --- the validation page ------------------------------------------------------------------------

ROOT = Path(__file__).parent.parent
SHARED = Path(os.environ.get("ISOFLOP_SHARED", ROOT.parent / "shared" / "data"))


def assert_ranges_hold(script: dict[str, Any], found: list[Result]) -> None:
    """The shipped spread is the one of all sources; ranges hold about what they promise."""
    families: dict[str, list[Result]] = defaultdict(list)
    for r in found:
        if r.in_range is not None:
            families[r.family].append(r)
    wide = script["spread"](list(families.values()))
    assert ERROR_OF_MEMORY.spread == Interval(round(exp(-wide), 3), round(exp(wide), 3))
    held = [r.in_range for rows in families.values() for r in rows]
    assert 0.85 <= sum(held) / len(held) <= 0.95


def test_the_validation_page_is_what_the_script_writes_and_formulas_agree() -> None:
    path = SHARED / "published" / "memory.csv"
    if not path.exists():
        pytest.skip("the shared table of published memory is not here")
    script = runpy.run_path(str(ROOT / "benchmarks" / "memory_published.py"))
    with path.open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert script["page"](rows) == (ROOT / "docs" / "memory-validation.md").read_text(
        encoding="utf-8"
    )
    found = [r for r in script["results"](rows) if not isinstance(r, tuple)]
    assert_ranges_hold(script, found)
    formulas = [abs(r.error) for r in found if r.kind == "formula"]
    assert len(formulas) == 16
    assert max(formulas) < 0.021  # the paper's state leaves out embeddings
    assert sum(formulas) / 16 < 0.005
    assert ceil(len(found) / len(rows) * 100) > 80
