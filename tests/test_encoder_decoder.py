"""The encoder-decoder against transformers' T5 with the same random weights, and its parts."""

from __future__ import annotations

import re
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from isoflop.arch import Arch, gpt, llama
from isoflop.arch.families import t5
from isoflop.arch.hf import from_hf
from isoflop.arch.spec import Learned, RelativeBias, Rope, Window, Wiring
from isoflop.check.agree import agree
from isoflop.errors import InputError
from isoflop.model import Decoder, EncoderDecoder, build, build_decoder
from isoflop.model.relative_bias import RelativeBiasModule, distance_buckets
from isoflop.train.data import ByteCorpus
from isoflop.train.loop import train
from isoflop.train.recipe import Recipe

transformers = pytest.importorskip("transformers", reason="transformers is the oracle")

V, D = 61, 32

# Theirs, in ours: both stacks have the same blocks under `block.I.layer.J`.
NAMES = {
    r"^shared": "embedding.tokens",
    r"^lm_head": "head",
    r"block\.0\.layer\.0\.SelfAttention\.relative_attention_bias": "relative_bias",
    r"block\.(\d+)\.layer\.": r"layers.\1.",
    r"^decoder\.": "",
    r"\.0\.SelfAttention\.(q|k|v)": r".attention.\1",
    r"\.0\.SelfAttention\.o": ".attention.out",
    r"\.0\.layer_norm": ".norm_attention",
    r"\.1\.EncDecAttention\.(q|k|v)": r".cross.\1",
    r"\.1\.EncDecAttention\.o": ".cross.out",
    r"\.(1|2)\.DenseReluDense\.wi(_1)?\.": ".feed_forward.up.",
    r"\.(1|2)\.DenseReluDense\.wi_0": ".feed_forward.gate",
    r"\.(1|2)\.DenseReluDense\.wo": ".feed_forward.down",
    r"final_layer_norm": "final_norm",
    r"^(layers\.\d+)\.1\.layer_norm": r"\1.norm_cross",
    r"\.(1|2)\.layer_norm": ".norm_feed_forward",
}

SIZES = {"vocab_size": V, "d_model": D, "d_kv": 6, "d_ff": 40, "num_layers": 2, "num_heads": 4}
V1_0 = SIZES | {"feed_forward_proj": "relu"}
V1_1 = SIZES | {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False,
                "scale_decoder_outputs": False}  # fmt: skip
#: 9 buckets: an odd half; 12 and 20: distances that run far beyond.
SHAPES = [
    V1_0 | {"num_decoder_layers": 3},
    V1_0 | {"relative_attention_num_buckets": 9, "relative_attention_max_distance": 12},
    V1_1,
    V1_1 | {"relative_attention_num_buckets": 16, "relative_attention_max_distance": 20},
]
PADDED = torch.tensor([[True] * 29, [True] * 17 + [False] * 12, [False] * 3 + [True] * 26])


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def pair(shape, dropout: float = 0.0) -> tuple:
    """Theirs with weights that all matter, and ours with the same."""
    torch.manual_seed(0)
    config = transformers.T5Config(**shape, dropout_rate=dropout)
    theirs = transformers.T5ForConditionalGeneration(config)
    arch = from_hf({"model_type": "t5", "dropout_rate": dropout} | shape, "t5")
    if not arch.head.tied:  # their class ties every T5 until it has loaded weights
        theirs.lm_head.weight = torch.nn.Parameter(torch.zeros(V, D))
    stream = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for weight in theirs.parameters():
            noise = torch.randn(weight.shape, generator=stream)
            weight.copy_(weight + noise * (0.15 if weight.dim() == 2 else 0.3))
    ours = build(arch)
    state = {}
    for name, weight in theirs.state_dict().items():
        for pattern, path in NAMES.items():
            name = re.sub(pattern, path, name)  # noqa: PLW2901 - rewritten step by step
        if "embed_tokens" not in name:  # the same tensor as `shared`
            state[name] = weight
    if arch.head.tied:
        state.pop("head.weight")
    ours.load_state_dict(state, strict=True)
    return theirs, ours


def tokens(length: int, seed: int) -> torch.Tensor:
    return torch.randint(1, V, (3, length), generator=torch.Generator().manual_seed(seed))


def logits(theirs, ours: EncoderDecoder, mask: torch.Tensor | None) -> tuple:
    source, target = tokens(29, 1), tokens(23, 2)
    # Theirs takes a mask of ones for none given.
    their_mask = None if mask is None else mask.long()
    expected = theirs(source, attention_mask=their_mask, decoder_input_ids=target).logits
    return expected, ours(source, target, mask)


def assert_same(expected: torch.Tensor, got: torch.Tensor) -> None:
    reach = expected.max() - expected.min()
    assert reach > 1
    assert (got - expected).abs().max() <= 1e-5 * reach


@pytest.mark.parametrize("mask", [None, PADDED], ids=["whole", "padded"])
@pytest.mark.parametrize("shape", SHAPES)
def test_t5_gives_the_logits_and_gradients_of_transformers(shape, mask):
    theirs, ours = pair(shape)
    expected, got = logits(theirs.eval(), ours.eval(), mask)
    assert_same(expected, got)
    weights = torch.randn(expected.shape, generator=torch.Generator().manual_seed(3))
    slopes = []
    for model, out in ((theirs, expected), (ours, got)):
        first = model.encoder.relative_bias if model is ours else model.encoder.block[0].layer[
            0].SelfAttention.relative_attention_bias  # fmt: skip
        table = ours.embedding.tokens if model is ours else theirs.shared
        slopes.append(torch.autograd.grad((out * weights).sum(), (table.weight, first.weight)))
    for slope, our_slope in zip(*slopes, strict=True):
        assert (our_slope - slope).abs().max() <= 2e-5 * slope.abs().max()


@pytest.mark.parametrize("shape", [V1_0, V1_1])
def test_the_same_numbers_are_dropped_in_the_same_places_as_in_transformers(shape):
    """Both draw from PyTorch's generator: one place more or less and all that follow differ."""
    theirs, ours = pair(shape, dropout=0.3)
    torch.manual_seed(5)
    expected, _ = logits(theirs.train(), ours.eval(), PADDED)
    torch.manual_seed(5)
    _, got = logits(theirs.eval(), ours.train(), PADDED)
    assert_same(expected, got)


# --- the parts ------------------------------------------------------------------------------


@st.composite
def tables(draw: st.DrawFn) -> RelativeBias:
    both_ways = draw(st.booleans())
    n_buckets = draw(st.integers(4 if both_ways else 2, 80))
    exact = n_buckets // (4 if both_ways else 2)
    return RelativeBias(n_buckets, draw(st.integers(exact + 1, 400)), bidirectional=both_ways)


@settings(deadline=None)
@example(RelativeBias(10, 160))  # double precision puts distances 10, 20 and 80 elsewhere
@example(RelativeBias(9, 128))
@given(tables())
def test_buckets_are_those_of_transformers(spec: RelativeBias):
    theirs = transformers.models.t5.modeling_t5.T5Attention._relative_position_bucket
    distance = torch.arange(-1000, 1001)
    expected = theirs(distance, spec.bidirectional, spec.n_buckets, spec.max_distance)
    assert torch.equal(distance_buckets(distance, spec), expected)


@settings(deadline=None)
@given(tables())
def test_buckets_only_grow_with_distance_and_end_at_the_largest(spec: RelativeBias):
    back = distance_buckets(-torch.arange(2 * spec.max_distance), spec).tolist()
    assert back[0] == 0
    assert all(0 <= b - a <= spec.n_buckets for a, b in pairwise(back))
    each_way = spec.n_buckets // 2 if spec.bidirectional else spec.n_buckets
    assert back[-1] == back[spec.max_distance] == each_way - 1


def test_queries_that_continue_a_cache_have_the_last_rows_of_the_bias():
    table = RelativeBiasModule(RelativeBias(8, 20), n_heads=3)
    torch.nn.init.normal_(table.weight)
    assert torch.equal(table(2, 30), table(30, 30)[:, :, -2:])


def small(**fields) -> Arch:
    return t5("t", d_model=D, n_layers=2, n_heads=4, d_ff=40, d_head=6, vocab_size=V, **fields)


def lively(arch: Arch) -> EncoderDecoder:
    model = build(arch)
    assert isinstance(model, EncoderDecoder)
    stream = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(torch.randn(weight.shape, generator=stream) * 0.2)
    return model.eval()


def test_keys_and_values_of_a_source_are_computed_once_for_all_that_is_written():
    model, source, target = lively(small()), tokens(11, 1), tokens(7, 2)
    mask = torch.ones(3, 11, dtype=torch.bool)
    mask[1, 5:] = False
    memory = model.encode(source, mask)
    held = model.keys_values(memory)
    assert [tuple(kv.k_BSKH.shape) for kv in held] == [(3, 11, 4, 6)] * 2
    expected = model(source, target, mask)
    assert torch.equal(model.decode(target, memory, mask), expected)
    assert torch.allclose(model.decode(target, held, mask), expected, atol=1e-6)


def test_what_stands_in_padding_changes_nothing():
    model, source, target = lively(small()), tokens(11, 1), tokens(7, 2)
    mask = torch.ones(3, 11, dtype=torch.bool)
    mask[:, 8:] = False
    expected = model(source[:, :8], target)
    assert torch.allclose(model(source, target, mask), expected, atol=1e-5)
    other = torch.where(mask, source, (source + 1) % V)
    assert torch.allclose(model(other, target, mask), expected, atol=1e-5)


def test_the_encoder_sees_later_tokens_and_the_decoder_does_not():
    model, source, target = lively(small()), tokens(11, 1), tokens(7, 2)
    later = source.clone()
    later[:, -1] = (later[:, -1] + 1) % V
    assert not torch.equal(model.encode(source)[:, 0], model.encode(later)[:, 0])
    changed = target.clone()
    changed[:, -1] = (changed[:, -1] + 1) % V
    ours, theirs = model(source, target), model(source, changed)
    assert torch.equal(ours[:, :-1], theirs[:, :-1])
    assert not torch.equal(ours[:, -1], theirs[:, -1])


def test_the_loss_is_the_mean_over_targets_that_count():
    model, source, target = lively(small()), tokens(11, 1), tokens(7, 2)
    wanted = tokens(7, 3)
    wanted[:, 4:] = -100
    shares = model(source, target).log_softmax(-1).gather(-1, wanted.clamp_min(0)[..., None])
    expected = -shares[:, :4].mean()
    assert torch.allclose(model.loss(source, target, wanted), expected)


def test_maps_that_write_to_a_stream_start_smaller_by_the_blocks_that_do():
    model = build(t5("t", d_model=128, n_layers=8, n_heads=4, d_ff=256, d_head=32, vocab_size=99,
                     n_decoder_layers=3))  # fmt: skip
    deviations = {name: weight.std() for name, weight in model.named_parameters()}
    writers = ("attention.out.weight", "cross.out.weight", "feed_forward.down.weight")
    for name, deviation in deviations.items():
        if name.endswith(writers):
            blocks = 2 * 8 if name.startswith("encoder") else 3 * 3
            assert abs(deviation / (0.02 * blocks**-0.5) - 1) < 0.03, name
        elif name.endswith((".q.weight", ".up.weight", "tokens.weight")):
            assert abs(deviation / 0.02 - 1) < 0.03, name


@pytest.mark.parametrize("fields", [{}, {"gated": True, "tied": False, "n_decoder_layers": 1}])
def test_counts_and_module_agree_by_path(fields):
    rows = agree(small(**fields))
    assert not [row for row in rows if not row.agrees]
    paths = {row.path for row in rows}
    assert {"params/encoder/relative_bias", "params/relative_bias", "params/layer/norm_cross",
            "flops/encoder/layer/attention/core", "flops/layer/cross/core",
            "flops/layer/cross/k"} <= paths  # fmt: skip


# --- a decoder alone with T5's positions ----------------------------------------------------


def test_a_decoder_alone_may_have_relative_biases_too():
    arch = llama("l", d_model=D, n_layers=2, n_heads=4, d_ff=40, vocab_size=V, max_seq_len=64)
    attention = replace(arch.layers[0].attention, position=RelativeBias(8, 20))
    arch = replace(arch, layers=(replace(arch.layers[0], attention=attention),) * 2)
    model, target = build_decoder(arch).eval(), tokens(30, 1)
    assert not [row for row in agree(arch) if not row.agrees]
    before = model(target)
    with torch.no_grad():
        model.relative_bias.weight += 3.0  # the same for all keys: shares stay what they are
    assert torch.allclose(model(target), before, atol=1e-5)
    with torch.no_grad():
        model.relative_bias.weight[0] += 3.0
    assert not torch.allclose(model(target), before, atol=1e-3)


# --- what is refused ------------------------------------------------------------------------


def refused(arch: Arch) -> dict[str, str]:
    with pytest.raises(InputError) as caught:
        build(arch)
    return {problem.field: problem.rule for problem in caught.value.problems}


def with_attention(arch: Arch, **fields) -> Arch:
    layer = replace(arch.layers[0], attention=replace(arch.layers[0].attention, **fields))
    return replace(arch, layers=(layer,) * 2)


def with_cross(arch: Arch, **fields) -> Arch:
    layer = arch.layers[0]
    assert layer.cross is not None
    return replace(arch, layers=(replace(layer, cross=replace(layer.cross, **fields)),) * 2)


def test_positions_that_cannot_be_followed_are_refused_by_field():
    arch = small()
    assert arch.encoder is not None
    fields = refused(with_attention(arch, position=Rope()))
    assert set(fields) == {"layers.layer.attention.position"}
    place = "layers.attention.position"
    for position, field in [
        (RelativeBias(shared=False), f"{place}.shared"),
        (RelativeBias(bidirectional=True), f"{place}.bidirectional"),
        (RelativeBias(1, 128), f"{place}.n_buckets"),
        (RelativeBias(32, 16), f"{place}.max_distance"),
    ]:
        assert set(refused(with_attention(arch, position=position))) == {field}
    mixed = (arch.layers[0], replace(with_attention(arch, position=None).layers[0], name="b"))
    assert set(refused(replace(arch, layers=mixed))) == {place}
    learned = replace(arch.embedding, position=Learned(512))
    assert set(refused(replace(arch, embedding=learned))) == {"embedding.position"}
    encoder = replace(arch.encoder, layers=(with_attention(arch, span=Window(3)).layers[0],))
    encoder = replace(encoder, layers=tuple(replace(x, cross=None) for x in encoder.layers))
    fields = refused(replace(arch, encoder=encoder))
    assert set(fields) == {
        "encoder.layers.layer.attention.span", "encoder.layers.attention.position.bidirectional",
    }  # fmt: skip


def test_cross_attention_that_cannot_be_followed_is_refused_by_field():
    arch = small()
    assert set(refused(with_cross(arch, position=RelativeBias()))) == {
        "layers.layer.cross.position"
    }
    assert set(refused(with_cross(arch, span=Window(3)))) == {"layers.layer.cross.span"}
    layer = replace(arch.layers[0], wiring=Wiring.PARALLEL)
    assert set(refused(replace(arch, layers=(layer,)))) == {"layers.layer.wiring"}
    some = (arch.layers[0], replace(arch.layers[0], cross=None, name="b"))
    assert set(refused(replace(arch, layers=some))) == {"layers.b.cross"}


@pytest.mark.parametrize(
    "mask", [torch.ones(3, 11), torch.ones(3, 10, dtype=torch.bool)], ids=["floating", "shorter"]
)
def test_a_mask_that_is_none_is_refused(mask):
    with pytest.raises(InputError, match="source_mask"):
        build(small())(tokens(11, 1), tokens(7, 2), mask)


def test_training_takes_decoders_alone(tmp_path):
    arch = t5("t", d_model=8, n_layers=1, n_heads=2, d_ff=9, d_head=4, vocab_size=256)
    with pytest.raises(InputError, match="name a decoder alone"):
        build_decoder(arch)
    recipe = Recipe(seq_len=8, batch_size=2, steps=1, learning_rate=1e-3)
    corpus = ByteCorpus.from_documents("words", [b"a text that is long enough " * 40] * 20)
    with pytest.raises(InputError, match="name a decoder alone"):
        train(recipe, arch, corpus, tmp_path / "run")
    assert not (tmp_path / "run").exists()
    assert isinstance(build_decoder(gpt("g", d_model=8, n_layers=1, n_heads=2, vocab_size=9,
                                        max_seq_len=8)), Decoder)  # fmt: skip
