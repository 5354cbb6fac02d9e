"""Decoders that read images: LLaVA's kind against transformers' with the same random weights, all
kinds against the counts. test_vision_weights.py holds them all against transformers.
"""

from __future__ import annotations

import re
from dataclasses import replace

import pytest
import torch

from isoflop.arch import Arch, Attention, Dense, Layer, llama
from isoflop.arch.families import clip, gemma3, in_sections, qwen2, qwen_vision, siglip
from isoflop.arch.hf import from_hf
from isoflop.arch.spec import (
    Alibi,
    Chunked,
    LayerNorm,
    Learned,
    Projector,
    RelativeBias,
    RmsNorm,
    Rope,
    Rope2d,
    VisionTower,
    Window,
)
from isoflop.check.agree import agree
from isoflop.count import Precision, Workload, flops_forward, params
from isoflop.count.memory import bytes_saved
from isoflop.errors import InputError
from isoflop.model import Decoder, Images, VisionDecoder, build, build_decoder
from isoflop.model.vision import both_ways
from isoflop.model.vision_tower import Grid

transformers = pytest.importorskip("transformers", reason="transformers is the oracle")

V, D, IMAGE = 61, 32, 60  # the number that stands for a token of an image

NAMES = {
    r"^model\.vision_tower\.(vision_model\.)?": "vision.",
    r"embeddings\.class_embedding": "class_token.weight",
    r"embeddings\.patch_embedding": "patches",
    r"embeddings\.position_embedding": "positions",
    r"pre_layrnorm": "pre_norm",
    r"post_layernorm": "final_norm",
    r"vision\.encoder\.layers": "vision.layers",
    r"layer_norm1": "norm_attention",
    r"layer_norm2": "norm_feed_forward",
    r"mlp\.fc1": "feed_forward.up",
    r"mlp\.fc2": "feed_forward.down",
    r"^model\.multi_modal_projector": "vision.projector",
    r"^model\.language_model\.embed_tokens": "embedding.tokens",
    r"^model\.language_model\.norm": "final_norm",
    r"^model\.language_model\.": "",
    r"^lm_head": "head",
    r"self_attn\.(q|k|v)_proj": r"attention.\1",
    r"self_attn\.(o|out)_proj": "attention.out",
    r"mlp\.(gate|up|down)_proj": r"feed_forward.\1",
    r"input_layernorm": "norm_attention",
    r"post_attention_layernorm": "norm_feed_forward",
}
CLIP = {"model_type": "clip_vision_model", "hidden_size": 24, "num_hidden_layers": 4,
        "num_attention_heads": 3, "intermediate_size": 50, "image_size": 12, "patch_size": 4}  # fmt: skip
TEXT = {"model_type": "llama", "vocab_size": V, "hidden_size": D, "intermediate_size": 40,
        "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
        "max_position_embeddings": 64}  # fmt: skip
LLAVA = {"vision_config": CLIP, "text_config": TEXT, "image_token_index": IMAGE}
SHAPES = [
    LLAVA,  # the last layer but one, as LLaVA 1.5
    LLAVA | {"vision_feature_layer": -1, "multimodal_projector_bias": False},
    LLAVA | {"vision_feature_layer": 1,
             "vision_config": CLIP | {"num_channels": 1, "image_size": 8, "hidden_act": "gelu"}},
]  # fmt: skip


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def pair(shape) -> tuple:
    """Theirs with weights that all matter, and ours with the same."""
    torch.manual_seed(0)
    theirs = transformers.LlavaForConditionalGeneration(transformers.LlavaConfig(**shape))
    with torch.no_grad():
        for weight in theirs.parameters():
            weight.add_(torch.randn(weight.shape) * (0.15 if weight.dim() == 2 else 0.3))
    ours = build(from_hf({"model_type": "llava"} | shape, "llava"))
    assert isinstance(ours, VisionDecoder)
    state = {}
    for name, weight in theirs.state_dict().items():
        for pattern, path in NAMES.items():
            name = re.sub(pattern, path, name)  # noqa: PLW2901 - rewritten step by step
        state[name] = weight.flatten(1) if weight.dim() == 4 else weight
    ours.load_state_dict(state, strict=True)
    return theirs.eval(), ours.eval()


def picture(spec: VisionTower, n_images: int = 3) -> torch.Tensor:
    stream = torch.Generator().manual_seed(1)
    return torch.randn(n_images, spec.channels, spec.image, spec.image, generator=stream)


def text_around(n_each: int) -> torch.Tensor:
    """Two sequences: an image within the text, and two images one after the other."""
    stream = torch.Generator().manual_seed(2)
    tokens = torch.randint(1, IMAGE, (2, 2 * n_each + 5), generator=stream)
    tokens[0, 3 : 3 + n_each] = IMAGE
    tokens[1, 1 : 1 + 2 * n_each] = IMAGE
    return tokens


@pytest.mark.parametrize("shape", SHAPES)
def test_llava_gives_the_logits_and_gradients_of_transformers(shape):
    theirs, ours = pair(shape)
    spec = ours.vision.spec
    pixels, tokens = picture(spec), text_around((spec.image // spec.patch) ** 2)
    expected = theirs(input_ids=tokens, pixel_values=pixels).logits
    got = ours(tokens, Images.at(IMAGE, tokens, pixels))
    reach = expected.max() - expected.min()
    assert reach > 1
    assert (got - expected).abs().max() <= 1e-5 * reach
    weights = torch.randn(expected.shape)
    tower = theirs.model.vision_tower
    embeddings = getattr(tower, "vision_model", tower).embeddings
    their_weights = (embeddings.patch_embedding.weight, embeddings.class_embedding,
                     theirs.get_input_embeddings().weight)  # fmt: skip
    our_weights = (ours.vision.patches.weight, ours.vision.class_token.weight,
                   ours.embedding.tokens.weight)  # fmt: skip
    slopes = torch.autograd.grad((expected * weights).sum(), their_weights)
    our_slopes = torch.autograd.grad((got * weights).sum(), our_weights)
    for slope, our_slope in zip(slopes, our_slopes, strict=True):
        assert (our_slope - slope.view_as(our_slope)).abs().max() <= 2e-5 * slope.abs().max()


def test_without_images_it_is_the_decoder_alone():
    theirs, ours = pair(LLAVA)
    tokens = text_around(4)
    expected = theirs(input_ids=tokens).logits
    got = ours(tokens)
    assert (got - expected).abs().max() <= 1e-5 * (expected.max() - expected.min())


# --- counts and module ----------------------------------------------------------------------


def small(**fields) -> Arch:
    tower = clip("c", d_model=24, n_layers=4, n_heads=3, d_ff=50, image=12, patch=4)
    text = llama("l", d_model=D, n_layers=2, n_heads=4, d_ff=40, vocab_size=V, max_seq_len=64)
    return replace(text, vision=replace(tower, **fields))


@pytest.mark.parametrize("fields", [
    {},
    {"feature_layer": 3},
    {"feature_layer": 4, "pre_norm": None, "patch_bias": True},
    {"feature_layer": 0, "class_token": False, "final_norm": None},
    {"positions": False, "projector": Projector(3, False, RmsNorm(), d_hidden=17)},
])  # fmt: skip
def test_counts_and_module_agree_by_path(fields):
    rows = agree(small(**fields))
    assert not [row for row in rows if not row.agrees]
    paths = {row.path for row in rows}
    assert {"flops/vision/patches", "params/vision/projector/linear_1"} <= paths
    behind = {path for path in paths if path.startswith("params/vision/unread/")}
    assert bool(behind) == ("feature_layer" in fields)


def test_layers_behind_the_one_that_is_read_are_stored_and_cost_nothing_else():
    whole, cut = small(), small(feature_layer=3)
    assert params(cut).value == params(whole).value
    work = Workload.train(2, 32)
    layer = flops_forward(whole, work).find("vision/layer").value / 4
    assert flops_forward(whole, work).value - flops_forward(cut, work).value == layer
    layers = {arch: bytes_saved(arch, work, Precision.FP32).find("vision/layer").value
              for arch in (whole, cut)}  # fmt: skip
    assert layers[cut] / 3 == layers[whole] / 4
    model = build(cut)
    model(
        text_around(9), Images.at(IMAGE, text_around(9), picture(model.vision.spec))
    ).sum().backward()
    unused = {name for name, weight in model.named_parameters() if weight.grad is None}
    assert {name.split(".")[1] for name in unused} == {"layers", "final_norm"}
    assert all(name.startswith(("vision.layers.3.", "vision.final_norm.")) for name in unused)


def test_the_class_token_starts_small_and_not_as_ones():
    token = build(small()).vision.class_token.weight
    assert 0.01 < token.std() < 0.03


def test_the_loss_is_that_of_the_logits():
    model = build(small()).eval()
    tokens = text_around(9)
    images = Images.at(IMAGE, tokens, picture(model.vision.spec))
    shares = model(tokens, images).log_softmax(-1).gather(-1, tokens[..., None])
    assert torch.allclose(model.loss(tokens, tokens, images), -shares.mean())
    assert not torch.allclose(model.loss(tokens, tokens), -shares.mean(), atol=1e-6)


def gemma(window: int = 64, **fields) -> Arch:
    tower = siglip("s", d_model=24, n_layers=2, n_heads=3, d_ff=50, image=28, patch=7, merge=2)
    text = gemma3("g", d_model=D, n_layers=7, n_heads=4, n_kv_heads=2, d_head=8, d_ff=40, window=window,
                  vocab_size=V, max_seq_len=64)  # fmt: skip
    return replace(text, vision=replace(tower, **fields))


@pytest.mark.parametrize("fields", [
    {"both_ways": False, "class_token": True},
    {"both_ways": False, "projector": Projector(2, merge=4, averaged=True)},
    {"both_ways": False, "projector": Projector(2, norm=LayerNorm(), merge=2, d_hidden=70), "frames": 2},
])  # fmt: skip
def test_counts_of_towers_that_merge_patches_agree_with_the_module(fields):
    assert not [row for row in agree(gemma(**fields)) if not row.agrees]


def test_what_an_image_shows_both_ways_costs_a_mask_and_nothing_else():
    """Which of so narrow a model's activations are a large part."""
    odd = {row.path for row in agree(gemma()) if not row.agrees}
    assert odd <= {"saved_none", "saved_selective", "saved_full"}


def test_pairs_within_images_are_counted_where_they_see_each_other():
    """Scores of every pair that a mask leaves, counted on the masks themselves."""
    arch, n_each, n_tokens = gemma(window=3), 4, 13
    places = torch.zeros(1, n_tokens, dtype=torch.bool)
    places[0, 1 : 1 + n_each] = places[0, 6 : 6 + n_each] = True
    flops = flops_forward(arch, Workload(1, n_tokens, n_tokens, causal_skip=True, images=2))
    for name, kind in arch.kinds.items():
        assert isinstance(kind.attention, Attention)
        pairs = int(both_ways(places, kind.attention.span).sum())
        assert flops.find(f"{name}/attention/core").value == 4 * 4 * 8 * pairs


def qwen(**fields) -> Arch:
    """Patches turned by row and column, two of three layers in windows of 2 x 2 merged ones."""
    tower = qwen_vision("q", d_model=96, n_layers=3, n_heads=12, d_ff=31, image=56, patch=7,
                        gated=True, activation="silu", chunk=16, full=(1,))  # fmt: skip
    text = qwen2("q", d_model=D, n_layers=2, n_heads=4, n_kv_heads=2, d_ff=40, vocab_size=V,
                 max_seq_len=64)  # fmt: skip
    return replace(in_sections(text, (1, 1, 2)), vision=replace(tower, **fields))


@pytest.mark.parametrize("fields", [
    {},
    {"frames": 1, "projector": Projector(1, False, merge=4)},
    {"positions": True, "projector": Projector(merge=1), "both_ways": True},
])  # fmt: skip
def test_counts_of_towers_with_windows_agree_with_the_module(fields):
    odd = {row.path for row in agree(qwen(**fields)) if not row.agrees}
    assert odd <= (
        {"saved_none", "saved_selective", "saved_full"} if "both_ways" in fields else set()
    )


def test_a_still_is_a_clip_in_which_nothing_moves():
    model = build(qwen()).eval()
    still, tokens = picture(model.vision.spec), text_around(16)
    clip = still[:, :, None].expand(-1, -1, 2, -1, -1)
    same = model(tokens, Images.at(IMAGE, tokens, clip))
    assert torch.equal(model(tokens, Images.at(IMAGE, tokens, still)), same)
    moved = torch.stack((still, still.roll(1, -1)), dim=2)
    assert not torch.allclose(model(tokens, Images.at(IMAGE, tokens, moved)), same)


def test_a_text_alone_is_turned_as_without_sections():
    model, plain = build(qwen()).eval(), build(replace(qwen(), vision=None)).eval()
    tokens = torch.randint(1, IMAGE, (2, 9))
    plain.load_state_dict(model.state_dict(), strict=False)
    assert torch.equal(model(tokens), plain(tokens))


def test_the_loss_goes_by_the_places_of_images_too():
    model = build(qwen()).eval()
    tokens = text_around(16)
    images = Images.at(IMAGE, tokens, picture(model.vision.spec))
    shares = model(tokens, images).log_softmax(-1).gather(-1, tokens[..., None])
    assert torch.allclose(model.loss(tokens, tokens, images), -shares.mean())


def test_a_merged_token_is_made_of_the_patches_of_a_square():
    tower = gemma().vision
    assert tower is not None
    order = Grid.of(tower, 4, 4).order_P.view(-1, 4)
    rows, columns = order // 4, order % 4
    assert (rows // 2 == (rows // 2)[:, :1]).all()
    assert (columns // 2 == (columns // 2)[:, :1]).all()
    assert (rows // 2 * 2 + columns // 2)[:, 0].tolist() == [0, 1, 2, 3]


# --- what is refused ------------------------------------------------------------------------


@pytest.mark.parametrize(("change", "field"), [
    ({"pixels": torch.zeros(3, 3, 12, 8)}, "images.pixels"),
    ({"pixels": torch.zeros(2, 3, 12, 12)}, "images.places"),
    ({"places": torch.zeros(2, 23)}, "images.places"),
    ({"places": torch.zeros(2, 22, dtype=torch.bool)}, "images.places"),
])  # fmt: skip
def test_images_that_do_not_fit_are_refused(change, field):
    model, tokens = build(small()), text_around(9)
    images = Images.at(IMAGE, tokens, picture(model.vision.spec))
    with pytest.raises(InputError) as caught:
        model(tokens, replace(images, **change))
    assert [problem.field for problem in caught.value.problems] == [field]


def refused(arch: Arch) -> set[str]:
    with pytest.raises(InputError) as caught:
        build(arch)
    return {problem.field for problem in caught.value.problems}


def with_inner(**fields) -> Arch:
    arch = small()
    assert arch.vision is not None
    layer = arch.vision.layers[0]
    layer = replace(layer, attention=replace(layer.attention, **fields))
    return replace(arch, vision=replace(arch.vision, layers=(layer,)))


def seen_in_windows() -> VisionTower:
    tower = qwen().vision
    assert tower is not None
    return tower


def with_chunk(layer: Layer, chunk: int) -> Layer:
    if layer.name != "local":
        return layer
    return replace(layer, attention=replace(layer.attention, span=Chunked(chunk)))


def test_towers_that_cannot_be_followed_are_refused_by_field():
    place = "vision.layers.layer.attention"
    assert refused(with_inner(position=Rope())) == {f"{place}.position"}
    assert refused(with_inner(span=Window(2))) == {f"{place}.span"}
    assert f"{place}.position" in refused(with_inner(position=RelativeBias()))
    assert refused(with_inner(position=Rope2d())) == {"vision.class_token"}
    alone = with_inner(span=Chunked(2))
    assert refused(alone) == {"vision.class_token", f"{place}.span.chunk"}
    crossed = Layer(Attention(3, 3, 8), Dense(9), LayerNorm(), cross=Attention(3, 3, 8))
    assert refused(small(layers=(crossed,))) == {"vision.layers.layer.cross"}
    for chunk in (8, 25, 4 * 49):
        layers = tuple(with_chunk(layer, chunk) for layer in seen_in_windows().layers)
        assert refused(qwen(layers=layers)) == {"vision.layers.local.attention.span.chunk"}
    half = in_sections(small(), (2, 1, 1)).layers[0], replace(small().layers[0], name="plain")
    assert refused(replace(small(), layers=half)) == {"layers.attention.position.sections"}
    turned = replace(small().layers[0], attention=Attention(4, 4, 8, Rope2d()))
    assert refused(replace(small(), layers=(turned,))) == {"layers.layer.attention.position"}
    hidden = replace(small().layers[0], attention=Attention(4, 4, 8, Alibi(), Chunked(4)))
    shown = replace(small(both_ways=True), layers=(hidden,))
    fields = {"layers.layer.attention.span", "layers.layer.attention.position"}
    assert refused(shown) == fields
    embedding = replace(small().embedding, position=Learned(64), norm=LayerNorm())
    fields = {"embedding.position", "embedding.norm"}
    assert refused(replace(small(), embedding=embedding)) == fields


def test_where_text_alone_goes_in_a_tower_is_refused():
    with pytest.raises(InputError, match="name a decoder alone"):
        build_decoder(small())
    assert isinstance(build_decoder(replace(small(), vision=None)), Decoder)


# --- what a config says ---------------------------------------------------------------------


def test_the_layer_that_a_config_names_is_counted_from_either_end():
    layers = {said: from_hf({"model_type": "llava"} | LLAVA | {"vision_feature_layer": said}, "x")
              for said in (-5, -2, -1, 0, 3, 4)}  # fmt: skip
    found = {said: arch.vision.feature_layer for said, arch in layers.items() if arch.vision}
    assert found == {-5: 0, -2: 3, -1: 4, 0: 0, 3: 3, 4: 4}
    said_nothing = from_hf({"model_type": "llava"} | LLAVA, "x").vision
    assert said_nothing is not None
    assert said_nothing.feature_layer == 3


@pytest.mark.parametrize(("key", "value"), [
    ("vision_feature_layer", -6),
    ("vision_feature_layer", [-2, -5]),
    ("vision_feature_layer", True),
    ("vision_feature_select_strategy", "full"),
    ("projector_hidden_act", "relu"),
])  # fmt: skip
def test_what_the_spec_cannot_say_of_a_config_is_refused(key, value):
    with pytest.raises(InputError) as caught:
        from_hf({"model_type": "llava"} | LLAVA | {key: value}, "x")
    assert [problem.field for problem in caught.value.problems] == [key]
