"""Our decoder against the models of transformers, shrunk, with the same random weights.

PaLM has no class there; a float64 forward written out in this file stands in for it.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from isoflop.arch import Arch, Attention, Dense, Layer, Wiring, gpt, llama, palm
from isoflop.arch.spec import (
    Embedding,
    Head,
    LayerNorm,
    Learned,
    LinearScaling,
    Llama3Scaling,
    QkNorm,
    RmsNorm,
    Rope,
    Window,
)
from isoflop.model import build
from parity_oracle import (
    GPT2_NAMES,
    LLAMA_NAMES,
    T_MAX,
    V,
    assert_same_logits,
    cut,
    decoder_for,
    load,
    per_head,
    renamed_state,
    shake,
)

transformers = pytest.importorskip("transformers", reason="transformers is the oracle")

# Gemma 2 and OLMo 2 use "post" for norms on a block's output.
OUTPUT_NAMES = {
    r"post_attention_layernorm": "norm_attention_out",
    r"pre_feedforward_layernorm": "norm_feed_forward",
    r"post_feedforward_layernorm": "norm_feed_forward_out",
}

# --- GPT-2 and Llama, three shapes each ---------------------------------------------------


@pytest.mark.parametrize(
    ("d_model", "n_layers", "n_heads", "d_ff", "tied", "activation"),
    [
        (16, 1, 1, 64, True, "gelu_tanh"),
        (48, 3, 4, 100, False, "gelu_tanh"),
        (64, 2, 8, 256, True, "relu"),
    ],
)
def test_gpt2_gives_the_logits_of_transformers(d_model, n_layers, n_heads, d_ff, tied, activation):
    names = {"gelu_tanh": "gelu_new", "relu": "relu"}
    theirs = transformers.GPT2LMHeadModel(
        transformers.GPT2Config(
            vocab_size=V,
            n_positions=T_MAX,
            n_embd=d_model,
            n_layer=n_layers,
            n_head=n_heads,
            n_inner=d_ff,
            activation_function=names[activation],
            tie_word_embeddings=tied,
        )
    )
    arch = gpt(
        "gpt2",
        d_model=d_model,
        n_layers=n_layers,
        n_heads=n_heads,
        d_ff=d_ff,
        vocab_size=V,
        max_seq_len=T_MAX,
        activation=activation,
        tied=tied,
        dropout=0.1,
    )
    assert_same_logits(theirs, decoder_for(theirs, arch, GPT2_NAMES, transposed=True))


LLAMA3_SCALING = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}


@pytest.mark.parametrize(
    ("d_model", "n_heads", "n_kv_heads", "d_head", "tied", "bias", "theirs_scaling", "scaling"),
    [
        (32, 4, 4, 8, False, False, {"rope_type": "default"}, None),
        (48, 6, 2, 12, True, True, {"rope_type": "linear", "factor": 3.0}, LinearScaling(3.0)),
        (64, 4, 1, 32, False, True, LLAMA3_SCALING, Llama3Scaling(8.0, 1.0, 4.0, 16)),
    ],
)
def test_llama_gives_the_logits_of_transformers(
    d_model, n_heads, n_kv_heads, d_head, tied, bias, theirs_scaling, scaling
):
    theirs = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=V,
            hidden_size=d_model,
            intermediate_size=88,
            num_hidden_layers=2,
            num_attention_heads=n_heads,
            num_key_value_heads=n_kv_heads,
            head_dim=d_head,
            max_position_embeddings=T_MAX,
            rms_norm_eps=1e-5,
            rope_parameters={"rope_theta": 500.0, **theirs_scaling},
            tie_word_embeddings=tied,
            attention_bias=bias,
            mlp_bias=bias,
        )
    )
    arch = llama(
        "llama",
        d_model=d_model,
        n_layers=2,
        n_heads=n_heads,
        n_kv_heads=n_kv_heads,
        d_head=d_head,
        d_ff=88,
        vocab_size=V,
        max_seq_len=T_MAX,
        theta=500.0,
        scaling=scaling,
        tied=tied,
        bias_attention=bias,
        bias_feed_forward=bias,
    )
    assert_same_logits(theirs, decoder_for(theirs, arch, LLAMA_NAMES))


# --- the other wirings, norms and positions -----------------------------------------------

D = 32
SIZES = {
    "vocab_size": V,
    "hidden_size": D,
    "intermediate_size": 72,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": T_MAX,
    "pad_token_id": 0,
}


def arch_of(*layers: Layer, embedding: Embedding | None = None, **fields) -> Arch:
    given = {"head": Head(), "final_norm": layers[0].norm, **fields}
    return Arch(
        "shrunk",
        d_model=D,
        vocab_size=V,
        max_seq_len=T_MAX,
        embedding=embedding or Embedding(V),
        layers=layers,
        **given,
    )


def test_post_norm_gives_the_logits_of_gpt_1():
    config = transformers.OpenAIGPTConfig(
        vocab_size=V, n_positions=T_MAX, n_embd=D, n_layer=2, n_head=4, afn="gelu"
    )
    theirs = transformers.OpenAIGPTLMHeadModel(config)
    arch = gpt("gpt1", d_model=D, n_layers=2, n_heads=4, vocab_size=V, max_seq_len=T_MAX)
    layer = replace(arch.layers[0], wiring=Wiring.POST)
    arch = replace(arch, layers=(layer, layer), final_norm=None)
    assert_same_logits(theirs, decoder_for(theirs, arch, GPT2_NAMES, transposed=True))


def test_neighbour_pairs_and_one_parallel_norm_give_the_logits_of_gpt_j():
    theirs = transformers.GPTJForCausalLM(
        transformers.GPTJConfig(
            vocab_size=V, n_positions=T_MAX, n_embd=D, n_layer=2, n_head=4, rotary_dim=4
        )
    )
    layer = Layer(
        Attention(4, 4, 8, position=Rope(d_rotary=4, interleaved=True)),
        Dense(4 * D, "gelu_tanh", bias=True),
        LayerNorm(),
        wiring=Wiring.PARALLEL,
    )
    names = {**GPT2_NAMES, r"ln_1": "norm"}
    arch = arch_of(layer, layer, head=Head(bias=True))
    assert_same_logits(theirs, decoder_for(theirs, arch, names))


def test_two_parallel_norms_give_the_logits_of_gpt_neox():
    theirs = transformers.GPTNeoXForCausalLM(
        transformers.GPTNeoXConfig(
            vocab_size=V,
            hidden_size=D,
            intermediate_size=72,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=T_MAX,
            rope_parameters={
                "rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5,
            },
        )
    )  # fmt: skip
    layer = Layer(
        Attention(4, 4, 8, position=Rope(d_rotary=4), bias_qkv=True, bias_out=True),
        Dense(72, "gelu", bias=True),
        LayerNorm(),
        wiring=Wiring.PARALLEL_TWO_NORMS,
    )
    names = {
        r"gpt_neox\.embed_in": "embedding.tokens",
        r"gpt_neox\.final_layer_norm": "final_norm",
        r"(embed_out|lm_head)": "head",
        r"gpt_neox\.layers": "layers",
        r"query_key_value": "q+k+v",
        r"attention\.dense": "attention.out",
        r"mlp\.dense_h_to_4h": "feed_forward.up",
        r"mlp\.dense_4h_to_h": "feed_forward.down",
        r"input_layernorm": "norm_attention",
        r"post_attention_layernorm": "norm_feed_forward",
    }
    shake(theirs)
    ours = build(arch_of(layer, layer))
    load(ours, cut(renamed_state(theirs, names), per_head(4)))
    assert_same_logits(theirs, ours)


def test_sandwich_norms_softcaps_and_windows_give_the_logits_of_gemma_2():
    theirs = transformers.Gemma2ForCausalLM(
        transformers.Gemma2Config(
            **SIZES,
            head_dim=12,
            query_pre_attn_scalar=20,
            sliding_window=5,
            layer_types=["sliding_attention", "full_attention"],
            attn_logit_softcapping=2.0,
            final_logit_softcapping=3.0,
            attn_implementation="eager",
        )
    )
    attention = Attention(4, 2, 12, position=Rope(), scale=20**-0.5, logit_softcap=2.0)
    full = Layer(
        attention,
        Dense(72, "gelu_tanh", gated=True),
        RmsNorm(unit_offset=True),
        wiring=Wiring.SANDWICH,
        name="full",
    )
    local = replace(full, attention=replace(attention, span=Window(5)), name="local")
    arch = arch_of(
        local,
        full,
        embedding=Embedding(V, scale=D**0.5),
        head=Head(tied=True, softcap=3.0),
    )
    assert_same_logits(theirs, decoder_for(theirs, arch, {**LLAMA_NAMES, **OUTPUT_NAMES}))


def test_output_norms_and_a_norm_over_all_heads_give_the_logits_of_olmo_2():
    theirs = transformers.Olmo2ForCausalLM(transformers.Olmo2Config(**SIZES))
    norm = RmsNorm(eps=1e-5)
    layer = Layer(
        Attention(4, 2, 8, position=Rope(), qk_norm=QkNorm(norm, "all_heads")),
        Dense(72, "silu", gated=True),
        norm,
        wiring=Wiring.OUTPUT,
    )
    names = {**LLAMA_NAMES, **OUTPUT_NAMES}
    assert_same_logits(theirs, decoder_for(theirs, arch_of(layer, layer), names))


def test_a_norm_per_head_gives_the_logits_of_qwen_3():
    theirs = transformers.Qwen3ForCausalLM(transformers.Qwen3Config(**SIZES, head_dim=12))
    norm = RmsNorm()
    layer = Layer(
        Attention(4, 2, 12, position=Rope(), qk_norm=QkNorm(norm)),
        Dense(72, "silu", gated=True),
        norm,
    )
    assert_same_logits(theirs, decoder_for(theirs, arch_of(layer, layer), LLAMA_NAMES))


def test_scaled_residuals_embedding_and_logits_give_the_logits_of_granite():
    theirs = transformers.GraniteForCausalLM(
        transformers.GraniteConfig(
            **SIZES,
            residual_multiplier=0.3,
            embedding_multiplier=2.5,
            logits_scaling=0.25,
            attention_multiplier=0.2,
        )
    )
    layer = Layer(
        Attention(4, 2, 8, position=Rope(), scale=0.2),
        Dense(72, "silu", gated=True),
        RmsNorm(),
        residual_scale=0.3,
    )
    arch = arch_of(layer, layer, embedding=Embedding(V, scale=2.5), head=Head(scale=4.0))
    assert_same_logits(theirs, decoder_for(theirs, arch, LLAMA_NAMES))


def test_position_rows_kept_before_the_first_give_the_logits_of_opt():
    theirs = transformers.OPTForCausalLM(
        transformers.OPTConfig(
            vocab_size=V,
            hidden_size=D,
            word_embed_proj_dim=D,
            ffn_dim=72,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=T_MAX,
            pad_token_id=0,
        )
    )
    layer = Layer(
        Attention(4, 4, 8, bias_qkv=True, bias_out=True), Dense(72, "relu", bias=True), LayerNorm()
    )
    arch = arch_of(
        layer, layer, embedding=Embedding(V, position=Learned(T_MAX, 2)), head=Head(tied=True)
    )
    names = {
        r"model\.decoder\.embed_tokens": "embedding.tokens",
        r"model\.decoder\.embed_positions": "embedding.positions",
        r"model\.decoder\.final_layer_norm": "final_norm",
        r"lm_head": "head",
        r"model\.decoder\.layers": "layers",
        r"self_attn_layer_norm": "norm_attention",
        r"final_layer_norm": "norm_feed_forward",
        r"self_attn\.(q|k|v)_proj": r"attention.\1",
        r"self_attn\.out_proj": "attention.out",
        r"fc1": "feed_forward.up",
        r"fc2": "feed_forward.down",
    }
    assert_same_logits(theirs, decoder_for(theirs, arch, names))


# --- PaLM -----------------------------------------------------------------------------------


def palm_logits(w: dict[str, torch.Tensor], tokens: list[int], n_heads: int, d_head: int):
    """Chowdhery 2022, section 2, one token and one head at a time, in float64."""

    def norm(x, weight):
        return (x - x.mean()) / (x.var(unbiased=False) + 1e-5).sqrt() * weight

    def turn(x, position):
        half = d_head // 2
        out = x.clone()
        for p in range(half):
            angle = torch.tensor(position * 10_000.0 ** (-2 * p / d_head), dtype=torch.float64)
            out[p] = x[p] * angle.cos() - x[p + half] * angle.sin()
            out[p + half] = x[p + half] * angle.cos() + x[p] * angle.sin()
        return out

    stream = [w["embedding.tokens.weight"][token] for token in tokens]
    n_layers = 1 + max(int(name.split(".")[1]) for name in w if name.startswith("layers."))
    for layer in range(n_layers):
        p = f"layers.{layer}"
        h = [norm(x, w[f"{p}.norm.weight"]) for x in stream]
        keys = [turn(w[f"{p}.attention.k.weight"] @ x, t) for t, x in enumerate(h)]
        values = [w[f"{p}.attention.v.weight"] @ x for x in h]
        for t in range(len(tokens)):
            heads = []
            for q in (w[f"{p}.attention.q.weight"] @ h[t]).split(d_head):
                turned = turn(q, t)
                scores = torch.stack([turned @ k for k in keys[: t + 1]]) / d_head**0.5
                shares = scores.exp() / scores.exp().sum()
                heads.append(sum(s * v for s, v in zip(shares, values, strict=False)))
            assert len(heads) == n_heads
            gate = w[f"{p}.feed_forward.gate.weight"] @ h[t]
            fed = gate * torch.sigmoid(gate) * (w[f"{p}.feed_forward.up.weight"] @ h[t])
            stream[t] = (
                stream[t]
                + w[f"{p}.attention.out.weight"] @ torch.cat(heads)
                + w[f"{p}.feed_forward.down.weight"] @ fed
            )
    final = [norm(x, w["final_norm.weight"]) for x in stream]
    return torch.stack([w["embedding.tokens.weight"] @ x for x in final])


def test_palm_gives_the_logits_of_its_definition():
    arch = palm(
        "palm",
        d_model=24,
        n_layers=2,
        n_heads=3,
        d_head=6,
        d_ff=40,
        vocab_size=V,
        max_seq_len=T_MAX,
    )
    ours = build(arch)
    shake(ours)
    tokens = [5, 0, 60, 17, 17, 3, 42]
    weights = {name: weight.double() for name, weight in ours.state_dict().items()}
    expected = palm_logits(weights, tokens, n_heads=3, d_head=6)
    with torch.no_grad():
        got = ours.eval()(torch.tensor([tokens]))[0]
    assert (got - expected).abs().max() <= 1e-5 * (expected.max() - expected.min())
