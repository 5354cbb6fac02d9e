"""Our mixtures of experts against those of transformers, shrunk, with the same random weights."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from isoflop.arch import Arch, Attention, Dense, Experts, Layer
from isoflop.arch.spec import Embedding, Head, LayerNorm, QkNorm, RmsNorm, Rope, Window
from isoflop.model import build
from isoflop.model.experts import ExpertsModule, Routing, load_balancing_loss
from parity_oracle import LLAMA_NAMES, V, assert_same_logits, renamed, shake
from test_parity import SIZES, D, arch_of

transformers = pytest.importorskip("transformers", reason="transformers is the oracle")

# Inside a layer, or inside a module of experts alone.
EXPERT_NAMES = {
    r"(mlp|block_sparse_moe)\.(?=gate\.|router\.|experts\.|shared_)": "feed_forward.",
    r"\b(gate|router)\.(?=weight|bias|e_score)": "router.",
    r"router\.e_score_correction_bias": "router.correction",
    r"\bshared_experts?\.(gate|up|down)_proj": r"shared.\1",
    r"\bshared_expert_gate": "shared_gate",
}
FUSED = "experts.gate_up_proj"


def expert_weights(theirs, names: dict[str, str]) -> dict[str, torch.Tensor]:
    """Their weights under our names; gate over up in one matrix becomes two."""
    state = {}
    for their_name, stored in theirs.state_dict().items():
        name = renamed(their_name, names)
        if name.endswith(FUSED):
            place = name.removesuffix("gate_up_proj")
            for part, weight in zip(("gate", "up"), stored.chunk(2, dim=1), strict=True):
                state[f"{place}{part}.weight"] = weight
        else:
            state[name.replace("experts.down_proj", "experts.down.weight")] = stored
    return state


def assert_decoders_agree(theirs, arch: Arch) -> None:
    shake(theirs)
    ours = build(arch, seed=5)
    ours.load_state_dict(expert_weights(theirs, EXPERT_NAMES | LLAMA_NAMES), strict=True)
    assert_same_logits(theirs, ours)


def assert_modules_agree(theirs, ours: ExpertsModule) -> None:
    """The same output, and the same gradient of the input."""
    stream = torch.Generator().manual_seed(1)
    x, weights = torch.randn(2, 2, 29, D, generator=stream)
    slopes, outputs = [], []
    for module in (theirs, ours):
        given = x.clone().requires_grad_()
        output = module(given)
        output = output[0] if isinstance(output, tuple) else output
        slopes += torch.autograd.grad((output * weights).sum(), given)
        outputs.append(output)
    reach = outputs[0].max() - outputs[0].min()
    assert reach > 1
    assert (outputs[1] - outputs[0]).abs().max() <= 1e-5 * reach
    assert (slopes[1] - slopes[0]).abs().max() <= 2e-5 * slopes[0].abs().max()


EXPERT = Dense(24, "silu", gated=True)
ATTENTION = Attention(4, 2, 8, position=Rope())
LAYER = Layer(ATTENTION, Dense(72, "silu", gated=True), RmsNorm())


def mixture(experts: Experts, **fields) -> Layer:
    return replace(LAYER, feed_forward=experts, name="moe", **fields)


# --- whole models ---------------------------------------------------------------------------


def test_two_of_four_experts_give_the_logits_of_mixtral():
    config = transformers.MixtralConfig(
        **SIZES, num_local_experts=4, num_experts_per_tok=2, sliding_window=7
    )
    theirs = transformers.MixtralForCausalLM(config)
    attention = replace(ATTENTION, position=Rope(1e6), span=Window(7))
    norm = RmsNorm(1e-5)
    layer = mixture(Experts(4, 2, LAYER.feed_forward), attention=attention, norm=norm)
    assert_decoders_agree(theirs, arch_of(layer, layer))


@pytest.mark.parametrize("normalize", [False, True])
def test_a_gated_shared_expert_and_a_dense_layer_give_the_logits_of_qwen_2(normalize):
    theirs = transformers.Qwen2MoeForCausalLM(
        transformers.Qwen2MoeConfig(
            **SIZES,
            num_experts=6,
            num_experts_per_tok=3,
            moe_intermediate_size=24,
            shared_expert_intermediate_size=40,
            norm_topk_prob=normalize,
            mlp_only_layers=[0],
        )
    )
    attention = replace(ATTENTION, bias_qkv=True)
    shared = Dense(40, "silu", gated=True)
    experts = Experts(6, 3, EXPERT, shared, shared_gate=True, normalize=normalize)
    dense = replace(LAYER, attention=attention)
    assert_decoders_agree(theirs, arch_of(dense, mixture(experts, attention=attention)))


def test_three_of_eight_experts_give_the_logits_of_qwen_3():
    theirs = transformers.Qwen3MoeForCausalLM(
        transformers.Qwen3MoeConfig(
            **SIZES,
            head_dim=12,
            num_experts=8,
            num_local_experts=8,
            num_experts_per_tok=3,
            moe_intermediate_size=24,
            norm_topk_prob=True,
        )
    )
    attention = Attention(4, 2, 12, position=Rope(), qk_norm=QkNorm(RmsNorm()))
    layer = mixture(Experts(8, 3, EXPERT), attention=attention)
    assert_decoders_agree(theirs, arch_of(layer, layer))


def test_gates_that_are_not_normalised_give_the_logits_of_olmoe():
    config = transformers.OlmoeConfig(
        **SIZES, num_experts=6, num_experts_per_tok=2, eos_token_id=None
    )
    theirs = transformers.OlmoeForCausalLM(config)
    norm = RmsNorm(1e-5)
    attention = replace(ATTENTION, qk_norm=QkNorm(norm, "all_heads"))
    experts = Experts(6, 2, LAYER.feed_forward, normalize=False)
    layer = mixture(experts, attention=attention, norm=norm)
    assert_decoders_agree(theirs, arch_of(layer, layer))


def test_scaled_residuals_around_experts_give_the_logits_of_granite():
    theirs = transformers.GraniteMoeForCausalLM(
        transformers.GraniteMoeConfig(
            **SIZES,
            num_local_experts=5,
            num_experts_per_tok=2,
            residual_multiplier=0.3,
            embedding_multiplier=2.5,
            logits_scaling=0.25,
            attention_multiplier=0.2,
        )
    )
    layer = mixture(
        Experts(5, 2, LAYER.feed_forward),
        attention=replace(ATTENTION, scale=0.2),
        residual_scale=0.3,
    )
    arch = arch_of(layer, layer, embedding=Embedding(V, scale=2.5), head=Head(scale=4.0))
    assert_decoders_agree(theirs, arch)


def test_four_fine_experts_give_the_logits_of_dbrx():
    config = transformers.DbrxConfig(
        d_model=D,
        n_heads=4,
        n_layers=2,
        max_seq_len=32,
        vocab_size=V,
        # The class reads what the configuration's own defaults lack.
        attn_config={"kv_n_heads": 2, "clip_qkv": 1e6, "rope_theta": 10_000.0},
        ffn_config={"ffn_hidden_size": 24, "moe_num_experts": 6, "moe_top_k": 4, "hidden_size": D},
    )
    theirs = transformers.DbrxForCausalLM(config)
    norm = LayerNorm(bias=False)
    layer = mixture(Experts(6, 4, EXPERT), norm=norm)
    shake(theirs)
    names = {
        r"transformer\.wte": "embedding.tokens",
        r"transformer\.norm_f": "final_norm",
        r"lm_head": "head",
        r"transformer\.blocks": "layers",
        r"norm_attn_norm\.norm_1": "norm_attention",
        r"norm_attn_norm\.norm_2": "norm_feed_forward",
        r"norm_attn_norm\.attn\.out_proj": "attention.out",
        r"norm_attn_norm\.attn": "attention",
        r"ffn\.router\.layer": "feed_forward.router",
        r"ffn\.experts\.mlp\.w1": "feed_forward.experts.gate.weight",
        r"ffn\.experts\.mlp\.v1": "feed_forward.experts.up.weight",
        r"ffn\.experts\.mlp\.w2": "feed_forward.experts.down.weight",
    }
    state = {}
    for their_name, stored in theirs.state_dict().items():
        name = renamed(their_name, names)
        if ".experts." in name:
            rows = stored.unflatten(0, (6, 24))
            state[name] = rows.transpose(1, 2) if ".down." in name else rows
        elif name.endswith("Wqkv.weight"):
            for letter, part in zip("qkv", stored.split([32, 16, 16]), strict=True):
                state[name.replace("Wqkv", letter)] = part
        else:
            state[name] = stored
    ours = build(arch_of(layer, layer), seed=5)
    ours.load_state_dict(state, strict=True)
    assert_same_logits(theirs, ours)


# --- experts alone: their attention is of other kinds -------------------------------------------


def module_for(theirs, spec: Experts) -> ExpertsModule:
    with torch.no_grad():
        for weight in theirs.parameters():  # a part alone is made without any values
            weight.zero_()
    shake(theirs)
    ours = ExpertsModule(spec, D)
    ours.load_state_dict(expert_weights(theirs, EXPERT_NAMES), strict=True)
    return ours


DEEPSEEK = {
    "hidden_size": D,
    "moe_intermediate_size": 24,
    "n_shared_experts": 2,
    "num_experts_per_tok": 3,
    "num_attention_heads": 4,
    "num_hidden_layers": 2,
    "vocab_size": V,
}
SHARED = Dense(48, "silu", gated=True)


@pytest.mark.parametrize(("n_groups", "n_active_groups"), [(1, 1), (4, 2)])
def test_experts_are_those_of_deepseek_v2(n_groups, n_active_groups):
    from transformers.models.deepseek_v2.modeling_deepseek_v2 import DeepseekV2Moe

    config = transformers.DeepseekV2Config(
        **DEEPSEEK,
        n_routed_experts=12,
        n_group=n_groups,
        topk_group=n_active_groups,
        topk_method="greedy" if n_groups == 1 else "group_limited_greedy",
        routed_scaling_factor=4.0,
        norm_topk_prob=False,
    )
    spec = Experts(12, 3, EXPERT, SHARED, normalize=False, scale=4.0,
                   n_groups=n_groups, n_active_groups=n_active_groups)  # fmt: skip
    theirs = DeepseekV2Moe(config)
    assert_modules_agree(theirs, module_for(theirs, spec))


@pytest.mark.parametrize("normalize", [False, True])
def test_experts_are_those_of_deepseek_v3(normalize):
    from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3MoE

    config = transformers.DeepseekV3Config(
        **DEEPSEEK,
        n_routed_experts=12,
        n_group=4,
        topk_group=2,
        routed_scaling_factor=2.5,
        norm_topk_prob=normalize,
    )
    spec = Experts(12, 3, EXPERT, SHARED, score_correction=True, score="sigmoid",
                   normalize=normalize, scale=2.5, n_groups=4, n_active_groups=2)  # fmt: skip
    theirs = DeepseekV3MoE(config)
    # Corrections as large as the scores: without them other experts would be chosen.
    theirs.gate.e_score_correction_bias.copy_(torch.randn(12, generator=torch.Generator()))
    ours = module_for(theirs, spec)
    assert_modules_agree(theirs, ours)
    ours.router.correction.zero_()
    with pytest.raises(AssertionError):
        assert_modules_agree(theirs, ours)


def test_experts_are_those_of_gpt_oss():
    from transformers.models.gpt_oss.modeling_gpt_oss import GptOssMLP

    config = transformers.GptOssConfig(
        hidden_size=D, intermediate_size=24, num_local_experts=6, num_experts_per_tok=3
    )
    theirs = GptOssMLP(config)
    stream = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for weight in theirs.parameters():  # large enough to reach the clamps
            weight.copy_(torch.randn(weight.shape, generator=stream))
    state = {f"router.{name}": weight for name, weight in theirs.router.state_dict().items()}
    bank = theirs.experts.state_dict()
    for part, first in (("gate", 0), ("up", 1)):  # theirs take turns
        state[f"experts.{part}.weight"] = bank["gate_up_proj"][..., first::2].transpose(1, 2)
        state[f"experts.{part}.bias"] = bank["gate_up_proj_bias"][..., first::2]
    state["experts.down.weight"] = bank["down_proj"].transpose(1, 2)
    state["experts.down.bias"] = bank["down_proj_bias"]
    expert = Dense(24, "silu_clamped", gated=True, bias=True)
    ours = ExpertsModule(Experts(6, 3, expert, router_bias=True), D)
    ours.load_state_dict(state, strict=True)
    assert_modules_agree(theirs, ours)


# --- the loss ---------------------------------------------------------------------------------


@pytest.mark.parametrize("n_active", [1, 2, 5])
def test_the_balancing_loss_is_mixtrals_over_the_choices_of_a_token(n_active):
    from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

    logits = 2 * torch.randn(2, 17, 6, generator=torch.Generator().manual_seed(3))
    scores = logits.softmax(-1).requires_grad_()
    gates, chosen = scores.topk(n_active)
    ours = load_balancing_loss(Routing(logits, scores, chosen, gates))
    theirs = load_balancing_loss_func((logits.flatten(0, 1),), 6, n_active)
    assert torch.isclose(ours * n_active, theirs, rtol=1e-6)
