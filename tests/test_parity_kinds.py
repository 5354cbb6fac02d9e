"""The less common kinds of blocks against the models of transformers, shrunk, same weights.

Specs are read from the very configs that build those models. Where transformers has no model
(Transformer-XL's positions, sparse blocks) a definition written out in this file stands in.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.strategies import embeddings, stacks

from isoflop.arch import Arch, Attention, Dense, LatentAttention, Layer, from_hf, llama, zoo
from isoflop.arch.families import gopher
from isoflop.arch.spec import (
    Alibi,
    BlockSparse,
    Chunked,
    Full,
    Head,
    LayerNorm,
    LongRopeScaling,
    QkNorm,
    RelativeBias,
    RelativeProjection,
    RmsNorm,
    Rope,
    Rope2d,
    Span,
    YarnScaling,
)
from isoflop.check.agree import agree
from isoflop.model import Decoder, build
from isoflop.model.attention import Context, make_attention
from isoflop.model.attention.context import alibi_slopes
from isoflop.model.attention.latent import softmax_scale
from isoflop.model.rope_scaling import amplitude
from isoflop.model.rotary import Rotation
from parity_oracle import (
    LLAMA_NAMES,
    V,
    assert_close,
    assert_same_logits,
    decoder_for,
    in_rows,
    load,
    per_head,
    renamed_state,
    shake,
)

transformers = pytest.importorskip("transformers", reason="transformers is the oracle")

SIZES = {
    "vocab_size": V,
    "hidden_size": 48,
    "intermediate_size": 72,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 3,
    "max_position_embeddings": 32,
    "pad_token_id": 0,
}


def spec_of(theirs) -> Arch:
    """What their config says, read as a file would be."""
    return from_hf(theirs.config.to_dict(), "shrunk")


def assert_counts_agree(arch: Arch) -> None:
    """Parameters, bytes, forward and backward FLOPs, by path."""
    assert [row for row in agree(arch) if not row.agrees] == []


def assert_parity(theirs, names, how=None, n_tokens: int = 23) -> Decoder:
    ours = decoder_for(theirs, spec_of(theirs), names, *([] if how is None else [how]))
    assert_same_logits(theirs, ours, n_tokens)
    assert_counts_agree(ours.arch)
    return ours


@pytest.mark.parametrize("name", ["bloom-560m", "gopher-44m", "opt-350m", "stablelm-2-12b"])
def test_named_models_of_these_kinds_count_what_is_built(name):
    assert_counts_agree(zoo.entry(name).arch)


# --- ALiBi ----------------------------------------------------------------------------------

BLOCK_NAMES = {
    r"transformer\.word_embeddings_layernorm": "embedding.norm",
    r"transformer\.(word_embeddings|wte)": "embedding.tokens",
    r"transformer\.(ln_f|norm_f)": "final_norm",
    r"lm_head": "head",
    r"transformer\.(h|blocks)\.(\d+)": r"layers.\2",
    r"(self_attention\.query_key_value|attn\.Wqkv)": "attention.q+k+v",
    r"(self_attention\.dense|attn\.out_proj)": "attention.out",
    r"(mlp\.dense_h_to_4h|ffn\.up_proj)": "feed_forward.up",
    r"(mlp\.dense_4h_to_h|ffn\.down_proj)": "feed_forward.down",
    r"(input_layernorm|norm_1)": "norm_attention",
    r"(post_attention_layernorm|norm_2)": "norm_feed_forward",
}


@pytest.mark.parametrize("n_heads", [4, 6])
def test_alibi_and_a_normed_embedding_give_the_logits_of_bloom(n_heads):
    theirs = transformers.BloomForCausalLM(
        transformers.BloomConfig(vocab_size=V, hidden_size=48, n_layer=2, n_head=n_heads)
    )
    assert_parity(theirs, BLOCK_NAMES, per_head(n_heads))


@pytest.mark.parametrize(("n_heads", "scale"), [(4, None), (6, 0.2)])
def test_alibi_without_biases_gives_the_logits_of_mpt(n_heads, scale):
    theirs = transformers.MptForCausalLM(
        transformers.MptConfig(
            vocab_size=V,
            d_model=48,
            n_layers=2,
            n_heads=n_heads,
            max_seq_len=32,
            attn_config={"softmax_scale": scale},
        )
    )
    assert_parity(theirs, BLOCK_NAMES)


def test_alibi_scaled_with_the_scores_gives_the_logits_of_falcon():
    theirs = transformers.FalconForCausalLM(
        transformers.FalconConfig(
            vocab_size=V,
            hidden_size=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            alibi=True,
            multi_query=False,
            parallel_attn=False,
            bias=True,
        )
    )
    assert_parity(theirs, BLOCK_NAMES, per_head(4))


def test_slopes_are_powers_of_two_and_every_other_one_of_the_next():
    assert alibi_slopes(8) == [2.0**-i for i in range(1, 9)]
    assert alibi_slopes(12) == [2.0**-i for i in range(1, 9)] + [2**-0.5, 2**-1.5, 2**-2.5, 2**-3.5]
    assert alibi_slopes(1) == [2.0**-8]


# --- scaled rotary positions ----------------------------------------------------------------

YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 8}


@pytest.mark.parametrize(
    "more",
    [
        {},
        {"attention_factor": 0.7, "beta_fast": 4.0, "beta_slow": 0.5},
        {"truncate": False, "beta_fast": 3.0},
        {"mscale": 1.5, "mscale_all_dim": 0.5},
        {"mscale": 1.5},
        {"beta_fast": 1.0, "truncate": False},  # no pair between the two turns
        {"original_max_position_embeddings": 4096, "beta_fast": 32.0},
        {"original_max_position_embeddings": 4096, "truncate": False},
    ],
    ids=str,
)
def test_yarn_gives_the_logits_of_transformers(more):
    rope = {"rope_theta": 500.0, **YARN, **more}
    config = transformers.LlamaConfig(**SIZES, rope_parameters=rope)
    assert_parity(transformers.LlamaForCausalLM(config), LLAMA_NAMES)


@pytest.mark.parametrize("n_tokens", [16, 17, 23])
@pytest.mark.parametrize("more", [{}, {"attention_factor": 1.3}, {"factor": 8.0}], ids=str)
def test_longrope_gives_the_logits_of_phi_3_within_and_beyond_its_first_length(n_tokens, more):
    short, long = [1.0, 1.1, 1.3], [1.5, 2.0, 4.0]
    theirs = transformers.Phi3ForCausalLM(
        transformers.Phi3Config(
            **SIZES,
            original_max_position_embeddings=16,
            rope_parameters={
                "rope_type": "longrope",
                "rope_theta": 100.0,
                "short_factor": short,
                "long_factor": long,
                "original_max_position_embeddings": 16,
                "partial_rotary_factor": 0.75,
                **more,
            },
        )
    )
    assert_parity(theirs, LLAMA_NAMES, in_rows(48, 24, 24), n_tokens)


@pytest.mark.parametrize("n_tokens", [12, 16, 17, 30])
def test_dynamic_scaling_gives_the_logits_of_llama_up_to_its_length_and_beyond(n_tokens):
    rope = {"rope_type": "dynamic", "rope_theta": 50.0, "factor": 3.0}
    config = transformers.LlamaConfig(
        **SIZES | {"max_position_embeddings": 16}, rope_parameters=rope
    )
    assert_parity(transformers.LlamaForCausalLM(config), LLAMA_NAMES, n_tokens=n_tokens)


def test_a_long_text_never_changes_what_longrope_says_of_the_first_length_alone():
    scaling = LongRopeScaling((1.0,) * 4, (2.0,) * 4, 16)
    rope, plain = Rope(scaling=scaling), Rope()
    x = torch.randn(1, 16, 2, 8, dtype=torch.float64, generator=torch.Generator())
    turned = Rotation.of(rope, 8, torch.arange(16), x.dtype, 64)(x)
    expected = Rotation.of(plain, 8, torch.arange(16), x.dtype, 64)(x)
    assert torch.allclose(turned, amplitude(scaling, 64) * expected)
    assert amplitude(scaling, 16) == 1.0 < amplitude(scaling, 64)


# --- norms of each head ---------------------------------------------------------------------


def test_a_norm_of_each_head_gives_the_logits_of_command_r_plus():
    theirs = transformers.CohereForCausalLM(
        transformers.CohereConfig(**SIZES, use_qk_norm=True, logit_scale=0.5)
    )
    assert_parity(theirs, {**LLAMA_NAMES, r"input_layernorm": "norm"})


@pytest.mark.parametrize(("parallel", "eps"), [(True, 1e-5), (False, 1e-2)])
def test_a_norm_of_each_head_gives_the_logits_of_stablelm_2(parallel, eps):
    theirs = transformers.StableLmForCausalLM(
        transformers.StableLmConfig(
            **SIZES,
            qk_layernorm=True,
            use_parallel_residual=parallel,
            layer_norm_eps=eps,
            rope_parameters={"rope_type": "default", "partial_rotary_factor": 0.25},
        )
    )
    shake(theirs)
    names = {r"self_attn\.(q|k)_layernorm": r"attention.\1_norm"}
    names |= {r"input_layernorm": "norm"} if parallel else {}
    state = renamed_state(theirs, {**LLAMA_NAMES, **names})
    for layer in range(2):  # a module per head there, a row per head here
        for path, n in (("q_norm", 6), ("k_norm", 3)):
            place = f"layers.{layer}.attention.{path}"
            rows = [state.pop(f"{place}.norms.{i}.weight") for i in range(n)]
            state[f"{place}.weight"] = torch.stack(rows)
    ours = build(spec_of(theirs))
    load(ours, state)
    assert_same_logits(theirs, ours)
    assert_counts_agree(ours.arch)


@pytest.mark.parametrize("norm", [LayerNorm(), LayerNorm(weight=False), RmsNorm(unit_offset=True)])
def test_a_norm_of_each_head_is_that_norm_with_the_heads_own_vectors(norm):
    each, shared = (Attention(3, 1, 4, qk_norm=QkNorm(norm, per)) for per in ("each_head", "head"))
    both, one = (make_attention(spec, 12).q_norm for spec in (each, shared))
    x = torch.randn(2, 5, 3, 4, generator=torch.Generator())
    for weight in both.parameters():
        torch.nn.init.normal_(weight, generator=torch.Generator().manual_seed(3))
    for head in range(3):
        one.load_state_dict({name: rows[head] for name, rows in both.state_dict().items()})
        assert torch.allclose(both(x)[:, :, head], one(x[:, :, head]), atol=1e-6)


# --- latent attention -----------------------------------------------------------------------

LATENT_NAMES = {
    r"self_attn\.q_a_proj": "attention.q_down",
    r"self_attn\.q_a_layernorm": "attention.q_norm",
    r"self_attn\.q_b_proj": "attention.q_up",
    r"self_attn\.kv_a_proj_with_mqa": "attention.kv_down",
    r"self_attn\.kv_a_layernorm": "attention.kv_norm",
    r"self_attn\.kv_b_proj": "attention.kv_up",
    **LLAMA_NAMES,
}
DEEPSEEK = {
    **SIZES,
    "num_key_value_heads": 6,
    "kv_lora_rank": 20,
    "qk_nope_head_dim": 10,
    "qk_rope_head_dim": 8,
    "v_head_dim": 12,
    "first_k_dense_replace": 2,  # dense layers alone: experts have tests of their own
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "n_group": 1,
    "topk_group": 1,
}
PLAIN = {"rope_type": "default", "rope_theta": 200.0}
SCALED = {"rope_theta": 200.0, **YARN, "mscale": 0.9, "mscale_all_dim": 0.6}


@pytest.mark.parametrize("q_latent", [None, 14])
@pytest.mark.parametrize("rope", [PLAIN, SCALED], ids=["plain", "yarn"])
def test_latent_attention_gives_the_logits_of_deepseek_v2(q_latent, rope):
    config = transformers.DeepseekV2Config(
        **DEEPSEEK, q_lora_rank=q_latent, rope_parameters=rope, attention_bias=q_latent is None
    )
    assert_parity(transformers.DeepseekV2ForCausalLM(config), LATENT_NAMES)


@pytest.mark.parametrize("interleaved", [True, False])
def test_latent_attention_gives_the_logits_of_deepseek_v3(interleaved):
    config = transformers.DeepseekV3Config(
        **DEEPSEEK, q_lora_rank=14, rope_parameters=SCALED, rope_interleave=interleaved
    )
    assert_parity(transformers.DeepseekV3ForCausalLM(config), LATENT_NAMES)


def test_a_stated_scale_of_latent_attention_is_taken_as_it_is():
    yarn = Rope(scaling=YarnScaling(4.0, 8, mscale_all_dim=1.0))
    spec = LatentAttention(2, 8, 12, 4, 12, position=yarn)
    assert softmax_scale(spec) > 0.25
    assert softmax_scale(replace(spec, scale=0.25)) == 0.25


# --- sinks ----------------------------------------------------------------------------------


@pytest.mark.parametrize("local", [True, False])
def test_attention_with_sinks_gives_what_gpt_oss_gives(local):
    from transformers.models.gpt_oss import modeling_gpt_oss as theirs

    kinds = ["sliding_attention" if local else "full_attention"]
    sizes = {key: value for key, value in SIZES.items() if key != "num_hidden_layers"}
    config = transformers.GptOssConfig(
        **sizes,
        num_hidden_layers=1,
        layer_types=kinds,
        head_dim=8,
        sliding_window=5,
        rope_parameters={"rope_theta": 500.0, **YARN, "truncate": False},
        attn_implementation="eager",
    )
    torch.manual_seed(0)
    module = theirs.GptOssAttention(config, 0)
    torch.nn.init.zeros_(module.sinks)
    shake(module)
    spec = from_hf(config.to_dict(), "shrunk").layers[0].attention
    ours = make_attention(spec, 48)
    names = {r"(q|k|v)_proj": r"\1", r"o_proj": "out", r"sinks": "sinks.weight"}
    ours.load_state_dict(renamed_state(module, names))
    x = torch.randn(2, 23, 48, generator=torch.Generator().manual_seed(1)).requires_grad_()
    apart = torch.arange(23)[:, None] - torch.arange(23)
    seen = (apart >= 0) & (apart < (5 if local else 23))
    mask = torch.zeros(1, 1, 23, 23).masked_fill(~seen, -torch.inf)
    waves = theirs.GptOssRotaryEmbedding(config)(x, torch.arange(23)[None])
    expected, _ = module(x, waves, mask)
    got = ours(x, Context(Rotation.of(spec.position, 8, torch.arange(23), x.dtype, 32)))
    assert_close(got, expected, expected.max() - expected.min())
    weights = torch.randn(expected.shape, generator=torch.Generator().manual_seed(2))
    grads = (torch.autograd.grad((y * weights).sum(), (x, sink)) for y, sink in
             ((expected, module.sinks), (got, ours.sinks.weight)))  # fmt: skip
    for theirs_grad, our_grad in zip(*grads, strict=True):
        assert (our_grad - theirs_grad).abs().max() <= 2e-5 * theirs_grad.abs().max()


# --- an embedding of another width ----------------------------------------------------------


def test_projections_around_post_norm_layers_give_the_logits_of_opt_350m():
    theirs = transformers.OPTForCausalLM(
        transformers.OPTConfig(
            vocab_size=V,
            hidden_size=48,
            word_embed_proj_dim=20,
            ffn_dim=72,
            num_hidden_layers=2,
            num_attention_heads=6,
            max_position_embeddings=32,
            do_layer_norm_before=False,
            pad_token_id=0,
        )
    )
    names = {
        r"model\.decoder\.embed_tokens": "embedding.tokens",
        r"model\.decoder\.embed_positions": "embedding.positions",
        r"model\.decoder\.project_in": "embedding.project",
        r"model\.decoder\.project_out": "head.project",
        r"lm_head": "head",
        r"model\.decoder\.layers": "layers",
        r"self_attn_layer_norm": "norm_attention",
        r"final_layer_norm": "norm_feed_forward",
        r"self_attn\.(q|k|v)_proj": r"attention.\1",
        r"self_attn\.out_proj": "attention.out",
        r"fc1": "feed_forward.up",
        r"fc2": "feed_forward.down",
    }
    assert_parity(theirs, names)


# --- chunks and sparse blocks ---------------------------------------------------------------


def sees_chunk(query: int, key: int) -> bool:
    return query // 5 == key // 5


def sees_blocks(query: int, key: int) -> bool:
    """Blocks of 3: the two latest, and before them those an even number of blocks away."""
    away = query // 3 - key // 3
    return away < 2 or away % 2 == 0


@pytest.mark.parametrize(
    ("span", "sees"),
    [(Chunked(5), sees_chunk), (BlockSparse(3, 2, 2), sees_blocks), (Chunked(23), lambda _q, _k: True)],
    ids=("chunks", "blocks", "one chunk"),
)  # fmt: skip
def test_a_span_of_blocks_gives_the_logits_of_llama_under_that_mask(span: Span, sees):
    config = transformers.LlamaConfig(**SIZES, attn_implementation="eager")
    theirs = transformers.LlamaForCausalLM(config)
    arch = spec_of(theirs)
    layer = replace(arch.layers[0], attention=replace(arch.layers[0].attention, span=span))
    ours = decoder_for(theirs, replace(arch, layers=(layer, layer)), LLAMA_NAMES)
    rows = [[key <= query and sees(query, key) for key in range(23)] for query in range(23)]
    hidden = ~torch.tensor(rows)
    mask = torch.zeros(1, 1, 23, 23).masked_fill(hidden, torch.finfo(torch.float32).min)
    assert_same_logits(theirs, ours, attention_mask=mask.expand(2, 1, 23, 23))


# --- Transformer-XL -------------------------------------------------------------------------


def gopher_logits(w: dict[str, torch.Tensor], tokens: list[int], d_head: int) -> torch.Tensor:
    """Dai 2019, section 3.3, in a pre-norm layer: one token, head and key at a time, in float64."""

    def norm(x, weight):
        return x / (x.square().mean() + 1e-6).sqrt() * weight

    def wave(distance, width):
        angles = [distance / 10_000 ** (2 * (i // 2) / width) for i in range(width)]
        waves = torch.tensor(angles, dtype=torch.float64)
        return torch.where(torch.arange(width) % 2 == 0, waves.sin(), waves.cos())

    stream = [w["embedding.tokens.weight"][token] for token in tokens]
    for layer in range(2):
        p = f"layers.{layer}"

        def mapped(name, x, p=p):
            bias = w.get(f"{p}.{name}.bias")
            y = w[f"{p}.{name}.weight"] @ x
            return y if bias is None else y + bias

        h = [norm(x, w[f"{p}.norm_attention.weight"]) for x in stream]
        keys, values = ([mapped(f"attention.{n}", x) for x in h] for n in "kv")
        u, v = (w[f"{p}.attention.distance_biases.{n}"] for n in "uv")
        for t in range(len(tokens)):
            q, heads = mapped("attention.q", h[t]), []
            for first in range(0, len(q), d_head):
                at = slice(first, first + d_head)
                scores = []
                for s in range(t + 1):
                    r = mapped("attention.distances", wave(t - s, len(h[t])))
                    score = (q + u)[at] @ keys[s][at] + (q + v)[at] @ r[at]
                    scores.append(score / d_head**0.5)
                shares = torch.stack(scores).softmax(0)
                heads.append(sum(a * x[at] for a, x in zip(shares, values, strict=False)))
            x = stream[t] + mapped("attention.out", torch.cat(heads))
            up = mapped("feed_forward.up", norm(x, w[f"{p}.norm_feed_forward.weight"]))
            up = torch.nn.functional.gelu(up, approximate="tanh")
            stream[t] = x + mapped("feed_forward.down", up)
    final = [norm(x, w["final_norm.weight"]) for x in stream]
    return torch.stack([w["embedding.tokens.weight"] @ x for x in final])


def test_scored_distances_give_the_logits_of_their_definition():
    arch = gopher(
        "gopher",
        d_model=10,
        n_layers=2,
        n_heads=3,
        d_head=4,
        d_ff=24,
        vocab_size=V,
        max_seq_len=32,
    )
    assert_counts_agree(arch)
    ours = build(arch)
    shake(ours)
    tokens = [5, 0, 60, 17, 17, 3, 42, 8, 1]
    weights = {name: x.detach().double() for name, x in ours.named_parameters()}
    leaves = {name: x.requires_grad_() for name, x in weights.items()}
    expected = gopher_logits(leaves, tokens, d_head=4)
    got = ours.eval()(torch.tensor([tokens]))[0]
    assert_close(got, expected, expected.max() - expected.min())
    slopes = torch.randn(expected.shape, generator=torch.Generator().manual_seed(1))
    (expected * slopes).sum().backward()
    (got * slopes).sum().backward()
    for name, weight in ours.named_parameters():
        bound = max(2e-5 * leaves[name].grad.abs().max(), 1e-6)
        assert (weight.grad - leaves[name].grad).abs().max() <= bound, name


# --- whatever the spec ----------------------------------------------------------------------


@st.composite
def decoders(draw: st.DrawFn) -> Arch:
    """Any decoder that can be built; spans see all, for masks leave a counter's products whole."""

    def built(layer: Layer) -> Layer:
        attention = layer.attention
        if isinstance(attention, Attention):
            attention = replace(attention, span=Full(), logit_softcap=None)
            if isinstance(attention.position, RelativeBias | Rope2d):  # per stack; of patches
                attention = replace(attention, position=None)
        return replace(layer, attention=attention, feed_forward=Dense(7, gated=True))

    embedding = replace(draw(embeddings(V, 16)), position=None)
    head = Head(tied=draw(st.booleans()), bias=draw(st.booleans()))
    layers = tuple(map(built, draw(stacks())))
    return Arch("any", draw(st.integers(1, 20)), V, 16, embedding, layers, head, None)


@settings(max_examples=25, deadline=None)
@given(decoders())
def test_any_decoder_counts_what_is_built(arch):
    apart = [row for row in agree(arch) if not row.agrees]
    assert not apart


# --- whatever the weights -------------------------------------------------------------------

TINY = llama("tiny", d_model=12, n_layers=2, n_heads=3, n_kv_heads=3, d_ff=16, vocab_size=V,
             max_seq_len=32)  # fmt: skip
KINDS = {
    "alibi": Attention(3, 1, 4, position=Alibi()),
    "relative": Attention(3, 1, 4, position=RelativeProjection()),
    "sinks": Attention(3, 1, 4, position=Rope(scaling=YarnScaling(4.0, 8)), sinks=True),
    "chunked": Attention(3, 3, 4, span=Chunked(5)),
    "sparse": Attention(3, 3, 4, span=BlockSparse(2, 1, 3)),
    "latent": LatentAttention(3, 8, 4, 2, 6, d_q_latent=5),
}


def lively(attention: Attention | LatentAttention) -> Decoder:
    """A decoder in double precision whose weights are large enough to show."""
    layer = Layer(attention, Dense(16), RmsNorm())
    model = build(replace(TINY, layers=(layer, layer)), dtype=torch.float64)
    shake(model)
    return model


@pytest.mark.parametrize("kind", KINDS)
def test_a_later_token_never_changes_an_earlier_logit_of_any_kind(kind):
    model = lively(KINDS[kind]).eval()
    tokens = torch.randint(V, (2, 17), generator=torch.Generator().manual_seed(2))
    for place in (0, 6, 16):
        changed = tokens.clone()
        changed[:, place:] = (changed[:, place:] + 7) % V
        with torch.no_grad():
            before, after = model(tokens), model(changed)
        assert torch.allclose(before[:, :place], after[:, :place], rtol=0, atol=1e-9)
        assert not torch.allclose(before[:, place:], after[:, place:], rtol=0, atol=1e-9)


@pytest.mark.parametrize("kind", KINDS)
def test_every_weight_of_any_kind_gets_a_finite_gradient_in_training_and_autocast(kind):
    model = lively(replace(KINDS[kind], dropout=0.1)).float().train()
    tokens = torch.randint(V, (2, 17), generator=torch.Generator().manual_seed(2))
    for autocast in (False, True):
        model.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            model.loss(tokens, tokens).backward()
        for name, weight in model.named_parameters():
            assert weight.grad is not None, name
            assert weight.grad.isfinite().all(), name
            assert weight.grad.any(), name


@pytest.mark.parametrize("kind", KINDS)
def test_any_kind_is_built_and_run_on_the_meta_device(kind):
    layer = Layer(KINDS[kind], Dense(16), RmsNorm())
    model = build(replace(TINY, layers=(layer,)), device="meta")
    logits = model(torch.zeros(2, 20, dtype=torch.int64, device="meta"))
    assert logits.is_meta
    assert logits.shape == (2, 20, V)
