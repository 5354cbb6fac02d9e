"""The description of blocks: sizes by hand, and properties of every spec."""

from __future__ import annotations

import os

import pytest
from hypothesis import HealthCheck, given, settings
from tests.strategies import archs

from isoflop.arch import Arch
from isoflop.arch.families import gopher, opt, t5
from isoflop.arch.spec import (
    Attention,
    Dense,
    Embedding,
    Encoder,
    Head,
    Layer,
    LayerNorm,
    Projector,
    QkNorm,
    RelativeBias,
    RmsNorm,
    VisionTower,
    Wiring,
)
from isoflop.count import (
    KERNELS,
    RECOMPUTES,
    TRAINING_STATES,
    Lora,
    Precision,
    Shards,
    Trained,
    Workload,
    bytes_kv_cache,
    bytes_saved,
    bytes_weights,
    finetune_memory,
    flops_forward,
    flops_prefill,
    flops_training,
    memory_inference,
    memory_rank,
    memory_training,
    params,
    tasks,
)
from isoflop.errors import InputError
from isoflop.hardware import parse_cluster
from isoflop.plan import plan_serve
from isoflop.quantity.expr import FUNCTIONS

EXAMPLES = int(os.environ.get("ISOFLOP_EXAMPLES", "1"))
QUIET = settings(max_examples=60 * EXAMPLES, deadline=None, suppress_health_check=list(HealthCheck))


def one(layer: Layer, **more: object) -> Arch:
    """A model of one layer, 8 wide, with a vocabulary of 10."""
    rest = {"embedding": Embedding(10), "head": Head(tied=True), "final_norm": None} | more
    return Arch("one", 8, 10, 32, layers=(layer,), **rest)  # type: ignore[arg-type]


@QUIET
@given(archs())
def test_every_formula_of_every_spec_reads_back_to_its_value(arch: Arch) -> None:
    work = Workload(2, 8, 8, source_len=5, images=3)
    for root in (params(arch), params(arch, active=True), flops_forward(arch, work),
                 memory_training(arch, work, TRAINING_STATES["bf16"])):  # fmt: skip
        for _, node in root.walk():
            read = eval(node.total.digits, dict(FUNCTIONS))  # in floats where experts divide
            assert read == pytest.approx(float(node.value), rel=1e-12)


@QUIET
@given(archs())
def test_a_symbol_has_one_value_in_a_tree(arch: Arch) -> None:
    values: dict[str, object] = {}
    for root in (params(arch), flops_forward(arch, Workload(2, 8, 8, source_len=5))):
        for _, node in root.walk():
            for symbol in _every_symbol(node):
                assert values.setdefault(symbol.name, symbol.given) == symbol.given


def _every_symbol(node):
    """All symbols of a formula: `symbols()` itself keeps one of each name."""
    stack = [node.total]
    while stack:
        part = stack.pop()
        if hasattr(part, "given"):
            yield part
        stack.extend(getattr(part, "args", ()))


@QUIET
@given(archs())
def test_every_spec_has_a_cost_that_is_not_negative(arch: Arch) -> None:
    for work in (Workload(2, 8, 8), Workload.decode(2, 8)):
        assert (
            sum((t.flops * t.times).value for t in tasks(arch, work))
            == flops_forward(arch, work).value
        )
        assert bytes_kv_cache(arch, work, Precision.BF16).value > 0
        assert memory_inference(arch, work, Precision.BF16).value > 0
    assert 0 < params(arch, active=True).value <= params(arch).value


def test_a_norm_per_head_has_weights_for_each() -> None:
    def counted(per: str) -> int:
        attention = Attention(4, 2, 6, qk_norm=QkNorm(LayerNorm(bias=False), per=per))  # type: ignore[arg-type]
        tree = params(one(Layer(attention, Dense(4), RmsNorm())))
        return int(
            tree.find("layer/attention/q_norm").value + tree.find("layer/attention/k_norm").value
        )

    assert [counted(per) for per in ("head", "each_head", "all_heads")] == [12, 36, 36]


def test_positions_of_transformer_xl_add_a_map_and_two_vectors_per_head() -> None:
    arch = gopher(
        "g", d_model=8, n_layers=3, n_heads=2, d_head=5, d_ff=9, vocab_size=11, max_seq_len=16
    )
    tree = params(arch)
    assert tree.find("layer/attention/distances").value == 8 * 10
    assert tree.find("layer/attention/distance_biases").value == 2 * 10
    flops = flops_forward(arch, Workload.train(3, 4))
    assert flops.find("layer/attention/distances").value == 2 * 4 * 8 * 10  # once, not per sequence
    assert flops.find("layer/attention/core").value == 6 * 3 * 2 * 4 * 4 * 5  # scores twice, values


@pytest.mark.parametrize(
    ("wiring", "names"),
    [
        (Wiring.PRE, "norm_attention attention norm_cross cross norm_feed_forward feed_forward"),
        (Wiring.POST, "attention norm_attention cross norm_cross feed_forward norm_feed_forward"),
        (
            Wiring.OUTPUT,
            "attention norm_attention_out cross norm_cross_out feed_forward norm_feed_forward_out",
        ),
        (Wiring.PARALLEL, "norm attention cross feed_forward"),
    ],
)
def test_a_crossed_layer_has_a_third_block_and_its_norm(wiring: Wiring, names: str) -> None:
    plain = Attention(2, 2, 4)
    layer = Layer(plain, Dense(4), RmsNorm(), wiring, cross=plain)
    encoder = Encoder((Layer(plain, Dense(4), RmsNorm()),), None, 16)
    paths = [t.path for t in tasks(one(layer, encoder=encoder), Workload(1, 4, 4))]
    order = dict.fromkeys(path.split("/")[1] for path in paths if path.startswith("layer/"))
    assert " ".join(order) == f"{names} residual"


def test_a_shared_bias_is_counted_once_and_an_unshared_one_in_each_layer() -> None:
    def counted(*, shared: bool) -> int:
        attention = Attention(2, 2, 4, RelativeBias(8, shared=shared))
        layer = Layer(attention, Dense(4), RmsNorm())
        arch = Arch("b", 8, 10, 32, Embedding(10), (layer,) * 5, Head(tied=True), None)
        bare = Layer(Attention(2, 2, 4), Dense(4), RmsNorm())
        without = Arch("b", 8, 10, 32, Embedding(10), (bare,) * 5, Head(tied=True), None)
        return int(params(arch).value - params(without).value)

    assert counted(shared=True) == 16
    assert counted(shared=False) == 5 * 16


def test_a_tied_head_behind_a_narrow_embedding_projects_back() -> None:
    arch = opt(
        "o", d_model=8, n_layers=1, n_heads=2, d_ff=9, vocab_size=10, max_seq_len=16, d_embed=3
    )
    tree = params(arch)
    assert tree.find("embedding/project").value == tree.find("head/project").value == 3 * 8
    flops = flops_forward(arch, Workload.train(1, 4))
    assert flops.find("head/logits").value == 2 * 4 * 3 * 10


def test_a_vision_tower_by_hand() -> None:
    inner = Layer(Attention(2, 2, 3, bias_qkv=True), Dense(7), LayerNorm())
    tower = VisionTower(6, (inner, inner), image=8, patch=4, channels=3, patch_bias=True,
                        pre_norm=LayerNorm(), final_norm=None, projector=Projector(3, bias=False))  # fmt: skip
    tree = params(one(Layer(Attention(2, 2, 4), Dense(4), RmsNorm()), vision=tower)).find("vision")
    assert tree.find("patches").value == 4 * 4 * 3 * 6 + 6
    assert tree.find("class_token").value == 6
    assert tree.find("positions").value == 5 * 6  # 4 patches and the class token
    assert tree.find("projector").value == 6 * 8 + 2 * 8 * 8
    assert tree.find("layer").value == 2 * (4 * 36 + 3 * 6 + 2 * 6 * 7 + 2 * 12)


@pytest.mark.parametrize(("averaged", "width", "normed"), [(False, 4 * 6, 16), (True, 6, 4)])
def test_merged_patches_go_through_the_projector_together(
    averaged: bool, width: int, normed: int
) -> None:
    inner = Layer(Attention(2, 2, 3), Dense(7), LayerNorm())
    projector = Projector(2, norm=RmsNorm(), merge=2, averaged=averaged, d_hidden=5)
    tower = VisionTower(6, (inner,), image=16, patch=4, class_token=False, positions=False,
                        projector=projector)  # fmt: skip
    arch = one(Layer(Attention(2, 2, 4), Dense(4), RmsNorm()), vision=tower)
    tree = params(arch).find("vision")
    assert "positions" not in {child.name for child in tree.children}
    assert tree.find("projector").value == 6 + (width * 5 + 5) + (5 * 8 + 8)
    flops = flops_forward(arch, Workload.train(1, 8)).find("vision/projector")
    assert flops.value == 2 * 4 * (width * 5 + 5 * 8)  # 16 patches are 4 tokens
    saved = bytes_saved(arch, Workload.train(1, 8), Precision.FP32).find("vision/projector/norm")
    assert saved.value == 4 * normed * (6 + 1)  # its input and a number a row


def test_decoding_leaves_the_encoder_and_its_keys_alone() -> None:
    arch = t5("t", d_model=8, n_layers=2, n_heads=2, d_ff=9, d_head=4, vocab_size=10)
    paths = {t.path for t in tasks(arch, Workload.decode(1, 6)) if t.flops.value}
    assert not any(path.startswith("encoder") for path in paths)
    assert "layer/cross/core" in paths
    assert "layer/cross/k" not in paths


# --- towers in the folds that were made for decoders ----------------------------------------


def small_t5(n_layers: int = 2, dropout: float = 0.0) -> Arch:
    return t5("t", d_model=8, n_layers=n_layers, n_heads=2, d_ff=9, d_head=4, vocab_size=10,
              dropout=dropout)  # fmt: skip


def with_vision() -> Arch:
    inner = Layer(Attention(2, 2, 3), Dense(7), LayerNorm())
    tower = VisionTower(6, (inner,), image=8, patch=4)
    return one(Layer(Attention(2, 2, 4), Dense(4), RmsNorm()), vision=tower)


TOWERS = [(small_t5(), "arch.encoder"), (with_vision(), "arch.vision")]


@QUIET
@given(archs())
def test_one_rank_of_one_holds_what_the_whole_model_holds_whatever_feeds_it(arch: Arch) -> None:
    work, state = Workload(2, 8, 8, source_len=5, images=3), TRAINING_STATES["bf16"]
    for policy in RECOMPUTES:
        rank = memory_rank(Trained(arch, work, state, policy), Shards())
        assert rank.value == memory_training(arch, work, state, recompute=policy).value


def test_an_encoder_run_again_keeps_the_inputs_of_its_layers() -> None:
    work = Workload(3, 5, 5, source_len=7)
    kept = bytes_saved(small_t5(), work, Precision.BF16, recompute="full")
    assert kept.find("encoder/layer").size.value == 3 * 7 * 8 * 2
    assert kept.find("layer").size.value == 3 * 5 * 8 * 2
    once, again = (flops_training(small_t5(), work, policy).value for policy in ("none", "full"))
    assert again - once == once / 3 - 2 * 3 * 5 * 8 * 10  # all of forward but the head


def test_an_encoder_drops_what_it_reads_and_cross_attention_its_scores() -> None:
    work = Workload(3, 5, 5, source_len=7)
    plain, dropping = (bytes_saved(small_t5(dropout=p), work, Precision.BF16) for p in (0.0, 0.1))
    grown = dropping.find("encoder/tokens").value - plain.find("encoder/tokens").value
    assert grown == 3 * 7 * 8  # a byte for each
    grown = dropping.find("encoder/output").value - plain.find("encoder/output").value
    assert grown == 3 * 7 * 8
    assert dropping.find("output").value == 3 * 5 * 8
    assert dropping.find("layer/residual").value == 3 * 3 * 5 * 8  # after each of three blocks
    eager = bytes_saved(small_t5(), work, Precision.BF16, KERNELS["eager"])
    pairs = eager.find("layer/cross/core").value - plain.find("layer/cross/core").value
    assert pairs == 3 * 2 * 5 * 7 * 2  # every query with every token that the encoder read


def test_the_cache_of_what_an_encoder_read_is_paged_too() -> None:
    work = Workload(1, 1, 6, source_len=7)
    plain, paged = (bytes_kv_cache(small_t5(), work, Precision.BF16, page=p) for p in (None, 4))
    assert [n.value for n in plain.children] == [2 * 6 * 16 * 2, 2 * 7 * 16 * 2]
    assert [n.value for n in paged.children] == [2 * 8 * 16 * 2, 2 * 8 * 16 * 2]


def test_quantisers_leave_tables_and_norms_of_two_axes_in_16_bits() -> None:
    assert bytes_weights(small_t5(), "int8").find("relative_bias").value == 32 * 2 * 2
    attention = Attention(4, 2, 6, qk_norm=QkNorm(LayerNorm(bias=False), per="each_head"))
    tree = bytes_weights(one(Layer(attention, Dense(4), RmsNorm())), "int8")
    assert tree.find("layer/attention/q_norm").value == 4 * 6 * 2
    assert tree.find("layer/attention/q").value == 8 * 24


def test_a_prompts_logits_are_those_of_its_last_position_also_in_a_narrow_head() -> None:
    arch = opt(
        "o", d_model=8, n_layers=1, n_heads=2, d_ff=9, vocab_size=10, max_seq_len=16, d_embed=3
    )
    assert flops_prefill(arch, 2, 7).find("head").value == 2 * 2 * (8 * 3 + 3 * 10)


def test_every_stage_of_a_pipeline_holds_the_bias_that_layers_share() -> None:
    layer = Layer(Attention(2, 2, 4, RelativeBias(8)), Dense(4), RmsNorm())
    arch = Arch("b", 8, 10, 32, Embedding(10), (layer,) * 4, Head(tied=True), None)
    job = Trained(arch, Workload.train(1, 4), TRAINING_STATES["bf16"])
    for stage in (0, 1):
        rank = memory_rank(job, Shards(pp=2), stage=stage)
        assert rank.find("bytes_weights/relative_bias").value == 8 * 2 * 2


@pytest.mark.parametrize(("arch", "field"), TOWERS)
def test_what_can_only_speak_of_decoders_refuses_towers_by_their_field(
    arch: Arch, field: str
) -> None:
    work, state = Workload.train(1, 8), TRAINING_STATES["bf16"]
    cluster = parse_cluster("8xh100-sxm")
    asked = (
        lambda: plan_serve(arch, cluster, input_tokens=4, output_tokens=4),
        lambda: memory_rank(Trained(arch, work, state), Shards(tp=2)),
        lambda: finetune_memory(arch, work, Lora(2), state),
    )
    for ask in asked:
        with pytest.raises(InputError) as caught:
            ask()
        assert field in {problem.field for problem in caught.value.problems}
