"""The decoder: its names, counts, initial weights, and what must hold whatever the weights."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from isoflop.arch import Arch, Attention, Dense, Experts, Layer, gpt, llama, palm
from isoflop.arch.spec import (
    Embedding,
    Full,
    Head,
    LayerNorm,
    QkNorm,
    RelativeBias,
    RelativeProjection,
    RmsNorm,
    Rope,
    Sinusoidal,
    Span,
    Window,
    Wiring,
)
from isoflop.errors import InputError, UnknownName
from isoflop.model import Decoder, Normal, build, initialise
from isoflop.model.attention import Context
from isoflop.model.rms_norm import rms_norm
from isoflop.model.rotary import Rotation

V, T_MAX = 50, 24

GPT = gpt("gpt", d_model=32, n_layers=2, n_heads=4, vocab_size=V, max_seq_len=T_MAX)
LLAMA = llama(
    "llama", d_model=32, n_layers=2, n_heads=4, n_kv_heads=2, d_ff=64, vocab_size=V,
    max_seq_len=T_MAX,
)  # fmt: skip
PALM = palm(
    "palm", d_model=32, n_layers=2, n_heads=4, d_head=6, d_ff=64, vocab_size=V, max_seq_len=T_MAX
)
FAMILIES = [GPT, LLAMA, PALM]


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def with_layer(arch: Arch, **fields) -> Arch:
    layer = replace(arch.layers[0], **fields)
    return replace(arch, layers=(layer,) * arch.n_layers)


def with_attention(arch: Arch, **fields) -> Arch:
    return with_layer(arch, attention=replace(arch.layers[0].attention, **fields))


def some_tokens(length: int = 12, batch: int = 2) -> torch.Tensor:
    return torch.randint(V, (batch, length), generator=torch.Generator().manual_seed(2))


def lively(arch: Arch, dtype: torch.dtype = torch.float32) -> Decoder:
    """A decoder whose weights are large enough that every part shows in the logits."""
    model = build(arch, dtype=dtype).eval()
    stream = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(torch.randn(weight.shape, generator=stream).to(dtype) * 0.2)
    return model


def n_parameters(model: Decoder) -> int:
    return sum(weight.numel() for weight in model.parameters())


# --- counts and names -----------------------------------------------------------------------


def test_gpt2_has_its_published_parameter_count():
    arch = gpt("g", d_model=768, n_layers=12, n_heads=12, vocab_size=50257, max_seq_len=1024)
    assert n_parameters(build(arch, device="meta")) == 124_439_808


def test_llama_3_8b_has_its_published_parameter_count():
    arch = llama(
        "l", d_model=4096, n_layers=32, n_heads=32, n_kv_heads=8, d_ff=14336, vocab_size=128256,
        max_seq_len=8192,
    )  # fmt: skip
    assert n_parameters(build(arch, device="meta")) == 8_030_261_248


def test_gpt3_175b_has_its_published_parameter_count():
    arch = gpt("g", d_model=12288, n_layers=96, n_heads=96, vocab_size=50257, max_seq_len=2048)
    assert n_parameters(build(arch, device="meta")) == 174_604_259_328


def test_palm_540b_is_built_on_the_meta_device():
    arch = palm(
        "p", d_model=18432, n_layers=118, n_heads=48, d_head=256, d_ff=73728, vocab_size=256000,
        max_seq_len=2048,
    )  # fmt: skip
    model = build(arch, device="meta")
    # Per layer 462,422,016 attention and 4,076,863,488 feed-forward weights (2204.02311, table 1).
    per_layer = 462_422_016 + 4_076_863_488 + 18432
    assert n_parameters(model) == 118 * per_layer + 256000 * 18432 + 18432
    assert all(weight.is_meta for weight in model.state_dict().values())


ATTENTION = {f"attention.{x}.weight" for x in ("q", "k", "v", "out")}
GATED = {f"feed_forward.{x}.weight" for x in ("gate", "up", "down")}
TWO_NORMS = {"norm_attention.weight", "norm_feed_forward.weight"}
OUTPUT_NORMS = {"norm_attention_out.weight", "norm_feed_forward_out.weight"}


@pytest.mark.parametrize(
    ("wiring", "norms"),
    [
        (Wiring.PRE, TWO_NORMS),
        (Wiring.POST, TWO_NORMS),
        (Wiring.OUTPUT, OUTPUT_NORMS),
        (Wiring.SANDWICH, TWO_NORMS | OUTPUT_NORMS),
        (Wiring.PARALLEL, {"norm.weight"}),
        (Wiring.PARALLEL_TWO_NORMS, TWO_NORMS),
    ],
)
def test_weights_are_named_as_the_count_trees_name_them(wiring, norms):
    names = set(build(with_layer(LLAMA, wiring=wiring), device="meta").state_dict())
    layer = ATTENTION | GATED | norms
    outside = {"embedding.tokens.weight", "final_norm.weight", "head.weight"}
    assert names == outside | {f"layers.{i}.{name}" for i in range(2) for name in layer}


def test_biases_positions_qk_norms_projection_and_embedding_norm_have_their_names():
    attention = replace(GPT.layers[0].attention, qk_norm=QkNorm(RmsNorm()))
    layer = replace(GPT.layers[0], attention=attention, feed_forward=Dense(64, "relu", bias=True))
    embedding = replace(GPT.embedding, d_embed=8, norm=LayerNorm(bias=False))
    arch = replace(GPT, layers=(layer,), embedding=embedding, head=Head(bias=True), final_norm=None)
    layer_names = ATTENTION | {name.replace("weight", "bias") for name in ATTENTION}
    layer_names |= {f"attention.{x}_norm.weight" for x in "qk"}
    layer_names |= {f"feed_forward.{x}.{y}" for x in ("up", "down") for y in ("weight", "bias")}
    layer_names |= {f"{norm}.{y}" for norm in ("norm_attention", "norm_feed_forward")
                    for y in ("weight", "bias")}  # fmt: skip
    assert set(build(arch, device="meta").state_dict()) == {
        "embedding.tokens.weight",
        "embedding.project.weight",
        "embedding.positions.weight",
        "embedding.norm.weight",
        "head.weight",
        "head.bias",
        *(f"layers.0.{name}" for name in layer_names),
    }


# --- initial weights ------------------------------------------------------------------------


def test_matrices_start_with_deviation_0_02_and_residual_ones_smaller():
    arch = gpt("g", d_model=128, n_layers=8, n_heads=4, vocab_size=500, max_seq_len=64)
    for name, weight in build(arch).state_dict().items():
        if weight.dim() == 2:
            writes = "attention.out" in name or "feed_forward.down" in name
            expected = 0.02 / 4 if writes else 0.02  # sqrt(2 * 8 layers) = 4
            assert abs(weight.std() / expected - 1) < 0.03, name
            assert abs(weight.mean()) < 0.03 * expected, name
        else:
            assert (weight == (0.0 if name.endswith("bias") else 1.0)).all(), name


def test_a_unit_offset_norm_starts_at_an_effective_weight_of_one():
    model = build(with_layer(LLAMA, norm=RmsNorm(unit_offset=True)))
    assert (model.layers[0].norm_attention.weight == 0).all()
    assert (model.final_norm.weight == 1).all()


def test_norms_of_each_head_start_at_one_and_what_is_told_of_positions_is_drawn():
    attention = Attention(2, 1, 4, qk_norm=QkNorm(RmsNorm(), "each_head"), sinks=True,
                          position=RelativeProjection())  # fmt: skip
    state = build(with_layer(LLAMA, attention=attention)).state_dict()
    assert (state["layers.0.attention.q_norm.weight"] == torch.ones(2, 4)).all()
    for name in ("sinks.weight", "distance_biases.u", "distance_biases.v", "distances.weight"):
        weight = state[f"layers.0.attention.{name}"]
        assert 0 < weight.abs().max() < 0.02 * 5, name


def test_megatron_draws_as_gpt2_does_and_a_deviation_can_be_said():
    first, second = build(GPT).state_dict(), build(GPT, init="megatron").state_dict()
    wider = build(GPT, init=Normal(0.08)).state_dict()
    assert all(torch.equal(weight, second[name]) for name, weight in first.items())
    for name in ("embedding.tokens.weight", "layers.1.attention.out.weight"):
        assert torch.allclose(wider[name], 4 * first[name])


def test_mup_keeps_what_matrices_give_as_large_at_any_width():
    for d_model in (64, 256):
        arch = gpt("g", d_model=d_model, n_layers=2, n_heads=4, vocab_size=500, max_seq_len=64)
        state = build(arch, init="mup").state_dict()
        x = torch.randn(1000, d_model, generator=torch.Generator().manual_seed(1))
        for name in ("attention.q", "attention.out", "feed_forward.up"):
            assert abs((x @ state[f"layers.1.{name}.weight"].T).std() - 1) < 0.05, name
        inner = torch.randn(1000, 4 * d_model, generator=torch.Generator().manual_seed(1))
        assert abs((inner @ state["layers.0.feed_forward.down.weight"].T).std() - 1) < 0.05
        for name in ("embedding.tokens", "embedding.positions"):
            assert abs(state[f"{name}.weight"].std() / 0.02 - 1) < 0.05, name
        assert not state["layers.0.attention.q.bias"].any()


def test_an_unknown_initialisation_is_refused_with_the_near_names():
    with pytest.raises(UnknownName, match=r"megatro: not known \(did you mean megatron\?\)"):
        build(GPT, init="megatro")


def test_initial_weights_depend_on_the_seed_and_not_on_the_threads():
    first = build(GPT, seed=3).state_dict()
    torch.set_num_threads(2)
    torch.manual_seed(99)
    again, other = build(GPT, seed=3).state_dict(), build(GPT, seed=4).state_dict()
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["embedding.tokens.weight"], other["embedding.tokens.weight"])


def test_a_weight_is_drawn_by_its_name_alone():
    deeper = gpt("g", d_model=32, n_layers=5, n_heads=4, vocab_size=V, max_seq_len=T_MAX)
    two, five = build(GPT).state_dict(), build(deeper).state_dict()
    name = "layers.1.attention.k.weight"
    assert torch.equal(two[name], five[name])
    assert not torch.equal(two[name], two["layers.0.attention.k.weight"])


def test_drawing_again_gives_the_same_weights_and_leaves_the_global_stream_alone():
    model = lively(GPT)
    torch.manual_seed(0)
    expected = torch.rand(1)
    torch.manual_seed(0)
    initialise(model, seed=0)
    assert torch.equal(torch.rand(1), expected)
    fresh = build(GPT).state_dict()
    assert all(torch.equal(w, fresh[name]) for name, w in model.state_dict().items())


# --- what holds for any weights -------------------------------------------------------------

spans = st.sampled_from([Full(), Window(1), Window(4)])
norms = st.sampled_from([LayerNorm(), LayerNorm(bias=False), RmsNorm(), RmsNorm(unit_offset=True)])


@st.composite
def architectures(draw: st.DrawFn) -> Arch:
    """Any small spec that the model supports."""
    n_kv_heads, d_head = draw(st.integers(1, 2)), draw(st.sampled_from([4, 6]))
    rope = Rope(interleaved=draw(st.booleans()), d_rotary=draw(st.sampled_from([None, 2])))
    layers = tuple(
        Layer(
            Attention(
                n_kv_heads * draw(st.integers(1, 3)),
                n_kv_heads,
                d_head,
                position=draw(st.sampled_from([None, rope])),
                span=draw(spans),
                bias_qkv=draw(st.booleans()),
                qk_norm=draw(st.sampled_from(
                    [None, QkNorm(RmsNorm()), QkNorm(LayerNorm(), "all_heads")])),
                logit_softcap=draw(st.sampled_from([None, 3.0])),
            ),
            Dense(12, draw(st.sampled_from(["relu", "gelu", "silu", "relu_squared"])),
                  gated=draw(st.booleans()), bias=draw(st.booleans())),
            draw(norms),
            wiring=draw(st.sampled_from(list(Wiring))),
            name=f"layer_{i}",
        )
        for i in range(2)
    )  # fmt: skip
    position = draw(st.sampled_from([None, Sinusoidal(), GPT.embedding.position]))
    embedding = Embedding(draw(st.integers(V, V + 3)), position=position)
    head = Head(tied=draw(st.booleans()), bias=draw(st.booleans()))
    return Arch("any", 10, V, T_MAX, embedding, layers, head, draw(st.none() | norms))


@settings(max_examples=25, deadline=None)
@given(architectures(), st.integers(0, 10))
def test_a_later_token_never_changes_an_earlier_logit(arch, place):
    model, tokens = lively(arch, torch.float64), some_tokens(11)
    changed = tokens.clone()
    changed[:, place:] = (changed[:, place:] + 7) % V
    with torch.no_grad():
        before, after = model(tokens), model(changed)
    assert before.shape == (2, 11, V)
    assert torch.allclose(before[:, :place], after[:, :place], rtol=0, atol=1e-9)
    assert not torch.allclose(before[:, place:], after[:, place:], rtol=0, atol=1e-9)


@settings(max_examples=10, deadline=None)
@given(architectures())
def test_every_weight_gets_a_finite_gradient(arch):
    model = lively(arch).train()
    model.loss(some_tokens(), some_tokens()).backward()
    for name, weight in model.named_parameters():
        assert weight.grad is not None, name
        assert weight.grad.isfinite().all(), name


@pytest.mark.parametrize("arch", FAMILIES, ids=lambda a: a.name)
def test_sequences_of_a_batch_do_not_mix(arch):
    model, tokens = lively(arch), some_tokens(batch=3)
    with torch.no_grad():
        alone = torch.cat([model(row[None]) for row in tokens])
        assert torch.allclose(model(tokens), alone, atol=1e-4)


def test_a_window_as_long_as_the_text_is_full_attention_and_a_shorter_one_is_not():
    def logits(span: Span) -> torch.Tensor:
        with torch.no_grad():
            return lively(with_attention(LLAMA, span=span))(some_tokens(12))

    full = logits(Full())
    assert torch.allclose(logits(Window(12)), full, atol=1e-5)
    assert torch.allclose(logits(Window(11))[:, :11], full[:, :11], atol=1e-5)
    assert not torch.allclose(logits(Window(11))[:, 11], full[:, 11], atol=1e-3)


def test_each_kind_of_layer_turns_by_its_own_rope():
    first = LLAMA.layers[0]
    slow = replace(first.attention, position=Rope(theta=1e6))
    mixed = lively(replace(LLAMA, layers=(first, replace(first, attention=slow, name="slow"))))
    x = mixed.embedding(some_tokens(), torch.arange(12))
    for spec, layer in zip(mixed.arch.layers, mixed.layers, strict=True):
        rope = spec.attention.position
        x = layer(x, Context(Rotation.of(rope, 8, torch.arange(12), x.dtype, T_MAX)))
    expected = mixed.head(mixed.final_norm(x), mixed.embedding.tokens.weight)
    assert torch.equal(mixed(some_tokens()), expected)
    assert not torch.allclose(lively(LLAMA)(some_tokens()), expected, atol=1e-2)


def test_grouped_heads_equal_all_heads_with_repeated_weights():
    grouped = lively(LLAMA)
    full = build(with_attention(LLAMA, n_kv_heads=4))
    state = grouped.state_dict()
    for name, weight in state.items():
        if name.endswith(("attention.k.weight", "attention.v.weight")):
            per_head = weight.unflatten(0, (2, 8))
            state[name] = per_head.repeat_interleave(2, dim=0).flatten(0, 1)
    full.load_state_dict(state)
    with torch.no_grad():
        assert torch.allclose(grouped(some_tokens()), full(some_tokens()), atol=1e-5)


def test_double_precision_and_single_precision_agree():
    for arch in FAMILIES:
        with torch.no_grad():
            wide = lively(arch, torch.float64)(some_tokens())
            narrow = lively(arch)(some_tokens())
        assert wide.dtype == torch.float64
        assert (wide - narrow).abs().max() <= 1e-5 * wide.abs().max()


@pytest.mark.parametrize("arch", FAMILIES, ids=lambda a: a.name)
def test_half_precision_weights_and_autocast_stay_close(arch):
    model = lively(arch)
    with torch.no_grad():
        expected = model.loss(some_tokens(), some_tokens())
        with torch.autocast("cpu", torch.bfloat16):
            cast = model.loss(some_tokens(), some_tokens())
        half = model.bfloat16().loss(some_tokens(), some_tokens())
    assert cast.dtype == half.dtype == torch.float32
    assert abs(cast - expected) < 0.02 * expected
    assert abs(half - expected) < 0.05 * expected


# --- embedding, head, loss ------------------------------------------------------------------


def test_padded_rows_are_weights_but_never_logits():
    padded = replace(LLAMA, embedding=Embedding(n_rows=64))
    model, plain = lively(padded), build(LLAMA)
    state = model.state_dict()
    assert state["head.weight"].shape == (64, 32)
    for name in ("head.weight", "embedding.tokens.weight"):
        state[name] = state[name][:V]
    plain.load_state_dict(state)
    with torch.no_grad():
        assert torch.allclose(model(some_tokens()), plain(some_tokens()), atol=1e-5)
        assert math.isclose(
            model.loss(some_tokens(), some_tokens()),
            plain.loss(some_tokens(), some_tokens()),
            rel_tol=1e-5,
        )


def test_the_loss_is_the_mean_negative_log_probability_of_the_targets():
    model, tokens, targets = lively(GPT), some_tokens(), some_tokens().flip(1)
    with torch.no_grad():
        shares = model(tokens).double().exp()
        shares /= shares.sum(-1, keepdim=True)
        told = [-math.log(shares[b, t, targets[b, t]]) for b in range(2) for t in range(12)]
        assert math.isclose(model.loss(tokens, targets), sum(told) / 24, rel_tol=1e-5)


def test_a_fresh_model_is_about_as_unsure_as_a_uniform_guess():
    for arch in FAMILIES:
        loss = build(arch).loss(some_tokens(24, 8), some_tokens(24, 8).roll(1, 1))
        assert abs(loss - math.log(V)) < 0.15


def test_sinusoidal_positions_are_vaswanis():
    arch = replace(LLAMA, embedding=Embedding(V, position=Sinusoidal()))
    model = build(arch)
    tokens = torch.full((1, 5), 3)
    x = model.embedding(tokens, torch.arange(5))[0] - model.embedding.tokens.weight[3]
    for position in range(5):
        for d in range(32):
            angle = position / 10_000 ** ((d - d % 2) / 32)
            expected = math.cos(angle) if d % 2 else math.sin(angle)
            assert abs(x[position, d] - expected) < 1e-6


def test_an_embedding_is_scaled_projected_placed_and_normed_in_this_order():
    embedding = replace(GPT.embedding, d_embed=8, scale=3.0, norm=LayerNorm())
    model = lively(replace(GPT, embedding=embedding, head=Head()))
    w = model.state_dict()
    rows = 3.0 * w["embedding.tokens.weight"][[7, 9]] @ w["embedding.project.weight"].T
    rows = rows + w["embedding.positions.weight"][:2]
    centred = rows - rows.mean(-1, keepdim=True)
    normed = centred / (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt()
    expected = normed * w["embedding.norm.weight"] + w["embedding.norm.bias"]
    got = model.embedding(torch.tensor([[7, 9]]), torch.arange(2))[0]
    assert torch.allclose(got, expected, atol=1e-5)


def test_more_tokens_than_learned_positions_are_refused():
    with pytest.raises(InputError, match="tokens=25: must be at most 24"):
        build(GPT)(some_tokens(25))


# --- dropout --------------------------------------------------------------------------------


def gpt_with_dropout(**places: float) -> Arch:
    return gpt(
        "g", d_model=32, n_layers=2, n_heads=4, vocab_size=V, max_seq_len=T_MAX,
        **{"dropout": 0.0, **places},
    )  # fmt: skip


@pytest.mark.parametrize(
    "places",
    [
        {"dropout": 0.3, "dropout_attention": 0.0, "dropout_embedding": 0.0},
        {"dropout_attention": 0.3},
        {"dropout_embedding": 0.3},
    ],
    ids=["residual", "attention", "embedding"],
)
def test_each_place_drops_in_training_and_not_in_evaluation(places):
    model, plain = lively(gpt_with_dropout(**places)), lively(GPT)
    with torch.no_grad():
        expected = plain(some_tokens())
        assert torch.equal(model(some_tokens()), expected)
        model.train()
        first, second = model(some_tokens()), model(some_tokens())
    assert not torch.allclose(first, expected, atol=1e-3)
    assert not torch.allclose(first, second, atol=1e-3)


def test_dropout_inside_the_feed_forward_acts_in_training_only():
    feed_forward = replace(GPT.layers[0].feed_forward, dropout=0.4)
    model = lively(with_layer(GPT, feed_forward=feed_forward))
    with torch.no_grad():
        assert torch.equal(model(some_tokens()), lively(GPT)(some_tokens()))
        assert not torch.equal(model.train()(some_tokens()), model(some_tokens()))


# --- parts ----------------------------------------------------------------------------------


def test_rms_norm_and_its_gradient_follow_the_definition():
    stream = torch.Generator().manual_seed(0)
    x = torch.randn(3, 4, 6, dtype=torch.float64, generator=stream).requires_grad_()
    weight = torch.randn(6, dtype=torch.float64, generator=stream).requires_grad_()
    assert torch.autograd.gradcheck(lambda x, w: rms_norm(x, w, 0.1), (x, weight))
    rms = (x.square().mean(-1, keepdim=True) + 0.1).sqrt()
    assert torch.allclose(rms_norm(x, weight, 0.1), x / rms * weight, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rms_norm_equals_pytorchs(dtype):
    x = (torch.randn(64, 96, generator=torch.Generator().manual_seed(0)) * 5).to(dtype)
    grads = []
    for norm in (lambda x, w: rms_norm(x, w, 1e-6), lambda x, w: F.rms_norm(x, (96,), w, 1e-6)):
        leaf, weight = x.clone().requires_grad_(), torch.full((96,), 0.7, dtype=dtype)
        weight.requires_grad_()
        out = norm(leaf, weight)
        out.backward(x.flip(0))
        grads.append((out, leaf.grad, weight.grad))
    bound = 1e-5 if dtype == torch.float32 else 1e-2
    for ours, theirs in zip(*grads, strict=True):
        assert (ours - theirs).abs().max() <= bound * theirs.abs().max()


def test_rotated_scores_depend_on_the_distance_alone():
    q, k = torch.randn(2, 1, 1, 1, 8, dtype=torch.float64, generator=torch.Generator())
    for interleaved in (False, True):
        rope = Rope(interleaved=interleaved, d_rotary=6)
        rotation = Rotation.of(rope, 8, torch.arange(50), torch.float64, T_MAX)
        turned_q, turned_k = (rotation(x.expand(1, 50, 1, 8))[0, :, 0] for x in (q, k))
        scores = turned_q @ turned_k.T
        assert torch.allclose(scores.diagonal(-7), scores[7, 0].expand(43))
        assert not torch.isclose(scores[7, 0], scores[8, 0])


@pytest.mark.parametrize("interleaved", [False, True])
def test_the_gradient_of_a_rotation_follows_it(interleaved):
    rope = Rope(interleaved=interleaved, d_rotary=6)
    rotation = Rotation.of(rope, 8, torch.arange(4), torch.float64, T_MAX)
    x = torch.randn(1, 4, 2, 8, dtype=torch.float64, generator=torch.Generator())
    assert torch.autograd.gradcheck(rotation, x.requires_grad_())


def test_neighbour_pairs_are_half_pairs_in_another_order():
    x = torch.randn(2, 9, 3, 8, dtype=torch.float64, generator=torch.Generator())
    order = [0, 2, 4, 6, 1, 3, 5, 7]  # first the firsts of each pair, then the seconds
    halves, neighbours = (
        Rotation.of(Rope(interleaved=i), 8, torch.arange(9), x.dtype, T_MAX) for i in (False, True)
    )
    assert torch.allclose(halves(x[..., order]), neighbours(x)[..., order])


@pytest.mark.parametrize("n_tokens", [1, 3])
@pytest.mark.parametrize("first", [1, 2])
def test_a_part_of_something_wider_is_turned_wherever_it_starts(first, n_tokens):
    wide = torch.randn(1, n_tokens, 1, 9, generator=torch.Generator().manual_seed(0))
    part = wide[..., first : first + 6]
    rotation = Rotation.of(Rope(interleaved=True), 6, torch.arange(n_tokens), part.dtype, T_MAX)
    assert torch.equal(rotation(part), rotation(part.clone()))


# --- what is refused ------------------------------------------------------------------------


def test_every_unsupported_field_is_named_with_what_is_supported():
    attention = LLAMA.layers[0].attention
    capped = replace(attention, position=RelativeProjection(), logit_softcap=3.0)
    layers = (
        replace(LLAMA.layers[0], attention=replace(attention, position=RelativeBias()), name="a"),
        replace(LLAMA.layers[0], attention=capped, name="b"),
        replace(LLAMA.layers[0], feed_forward=Experts(4, 2, Dense(8, "silu_clamped")), name="d"),
    )
    with pytest.raises(InputError) as caught:
        build(replace(LLAMA, layers=layers))
    rules = {problem.field: problem.rule for problem in caught.value.problems}
    assert rules == {
        "layers.attention.position": (
            "is the same relative_bias, over as many heads, in all layers of a stack or in none"
        ),
        "layers.b.attention.logit_softcap": "is None where distances are scored too",
        "layers.d.feed_forward.expert.activation": (
            "is one of relu, gelu, gelu_tanh, gelu_quick, silu, relu_squared where nothing is gated"
        ),
    }
