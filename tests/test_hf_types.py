"""Every config type: counts equal transformers' class, active ones a count by hand, and back."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
import transformers

from isoflop.arch import from_hf, read_hf, to_hf
from isoflop.arch.hf import FAMILIES
from isoflop.arch.spec import Experts, RelativeBias, Rope, Window
from isoflop.count import Precision, Workload, bytes_kv_cache, flops_forward, params
from isoflop.errors import InputError

#: A small shape in the words of most types, with uneven settings.
SMALL = {"hidden_size": 48, "num_hidden_layers": 3, "num_attention_heads": 6, "vocab_size": 101,
         "intermediate_size": 76, "pad_token_id": None, "bos_token_id": 1, "eos_token_id": 1}  # fmt: skip
GROUPED = SMALL | {"num_key_value_heads": 2}
WIDE = GROUPED | {"head_dim": 20, "intermediate_size": 35, "num_hidden_layers": 2}
TIED, UNTIED = {"tie_word_embeddings": True}, {"tie_word_embeddings": False}
OLD = {
    "n_embd": 48,
    "n_layer": 3,
    "n_head": 6,
    "vocab_size": 101,
    "bos_token_id": 1,
    "eos_token_id": 1,
}
BLOOM = {key: value for key, value in OLD.items() if key != "n_embd"} | {"hidden_size": 48}
BARE = {key: value for key, value in SMALL.items() if key != "intermediate_size"}
MLA = {"kv_lora_rank": 10, "q_lora_rank": 14, "qk_nope_head_dim": 6, "qk_rope_head_dim": 4,
       "v_head_dim": 7, "n_routed_experts": 6, "num_experts_per_tok": 2, "n_shared_experts": 2,
       "moe_intermediate_size": 11, "first_k_dense_replace": 1}  # fmt: skip
MOE = {"moe_intermediate_size": 13, "num_experts": 6, "num_experts_per_tok": 2}
CLIP = {"model_type": "clip_vision_model", "hidden_size": 24, "num_hidden_layers": 2,
        "num_attention_heads": 3, "intermediate_size": 50, "image_size": 28, "patch_size": 7}  # fmt: skip

SIGLIP = CLIP | {"model_type": "siglip_vision_model", "image_size": 56, "vision_use_head": False}
TEXT3 = GROUPED | {"head_dim": 14, "model_type": "gemma3_text"}
QWEN_TEXT = GROUPED | {"rope_scaling": {"type": "mrope", "mrope_section": [1, 1, 2]}}
QWEN_TOWER = {
    "depth": 3,
    "embed_dim": 24,
    "hidden_size": 48,
    "num_heads": 3,
    "mlp_ratio": 2,
    "patch_size": 7,
}
QWEN_TOWER_2_5 = {"depth": 3, "hidden_size": 24, "out_hidden_size": 48, "num_heads": 3, "intermediate_size": 31,
                  "patch_size": 7, "window_size": 28, "fullatt_block_indexes": [1]}  # fmt: skip

SHAPES: dict[str, list[dict[str, Any]]] = {
    "gpt2": [OLD, OLD | UNTIED | {"n_inner": 70}, OLD | {"n_positions": 33, "n_layer": 1}],
    "gpt_neox": [SMALL, SMALL | TIED | {"use_parallel_residual": False}, SMALL | {"attention_bias": False, "rotary_pct": 0.5}],
    "gptj": [OLD | {"rotary_dim": 4}, OLD | TIED | {"rotary_dim": 8}, OLD | {"n_inner": 31, "n_head": 4, "rotary_dim": 6}],
    "opt": [BARE | {"ffn_dim": 70}, BARE | {"ffn_dim": 50, "word_embed_proj_dim": 20, "do_layer_norm_before": False},
            BARE | UNTIED | {"ffn_dim": 80, "enable_bias": False, "layer_norm_elementwise_affine": False, "_remove_final_layer_norm": True}],
    "bloom": [BLOOM, BLOOM | UNTIED | {"hidden_size": 60}, BLOOM | {"n_layer": 1, "hidden_size": 12}],
    "falcon": [BARE, BARE | {"new_decoder_architecture": True, "num_kv_heads": 2, "bias": True},
               BARE | {"multi_query": False, "parallel_attn": False, "alibi": True, "bias": True},
               BARE | UNTIED | {"new_decoder_architecture": True, "num_kv_heads": 3, "num_ln_in_parallel_attn": 1, "ffn_hidden_size": 77}],
    "mpt": [{"d_model": 48, "n_heads": 6, "n_layers": 3, "vocab_size": 101}, {"d_model": 32, "n_heads": 2, "n_layers": 1, "vocab_size": 64},
            {"d_model": 48, "n_heads": 3, "n_layers": 2, "vocab_size": 77} | UNTIED],
    "phi": [GROUPED, GROUPED | TIED | {"qk_layernorm": True}, SMALL | {"partial_rotary_factor": 0.25, "num_hidden_layers": 1}],
    "phi3": [GROUPED, SMALL | TIED | {"sliding_window": 17}, GROUPED | {"partial_rotary_factor": 0.5}],
    "starcoder2": [GROUPED, GROUPED | UNTIED | {"use_bias": False}, GROUPED | {"sliding_window": 9, "num_hidden_layers": 1}],
    "mixtral": [GROUPED, WIDE | TIED | {"num_local_experts": 5, "num_experts_per_tok": 3}, SMALL | {"num_key_value_heads": 3, "sliding_window": 9}],
    "qwen2_moe": [GROUPED | MOE | {"shared_expert_intermediate_size": 21},
                  GROUPED | MOE | {"mlp_only_layers": [0], "qkv_bias": False},
                  SMALL | MOE | TIED | {"num_key_value_heads": 6, "decoder_sparse_step": 2, "use_sliding_window": True, "sliding_window": 8}],
    "qwen3_moe": [WIDE | MOE, GROUPED | MOE | {"mlp_only_layers": [1], "attention_bias": True},
                  GROUPED | MOE | TIED | {"decoder_sparse_step": 2}],
    "stablelm": [GROUPED, GROUPED | TIED | {"use_qkv_bias": True, "use_parallel_residual": True},
                 GROUPED | {"qk_layernorm": True, "partial_rotary_factor": 0.5}],
    "cohere": [GROUPED, GROUPED | UNTIED | {"use_qk_norm": True}, WIDE | {"attention_bias": True}],
    "gemma2": [GROUPED | {"head_dim": 14}, GROUPED | UNTIED | {"attention_bias": True}, WIDE | {"layer_types": ["full_attention", "sliding_attention"]}],
    "gemma3_text": [GROUPED | {"num_hidden_layers": 7}, WIDE | UNTIED | {"attention_bias": True}, WIDE | {"layer_types": ["full_attention", "sliding_attention"]}],
    "gpt_oss": [GROUPED | {"num_local_experts": 6}, WIDE | TIED | {"num_local_experts": 5, "num_experts_per_tok": 3}, WIDE | {"attention_bias": False}],
    "deepseek_v2": [SMALL | MLA, SMALL | MLA | TIED | {"q_lora_rank": None, "attention_bias": True},
                    SMALL | MLA | {"mlp_bias": True, "n_group": 3, "topk_group": 2, "topk_method": "group_limited_greedy"}],
    "deepseek_v3": [SMALL | MLA | {"n_group": 3, "topk_group": 2}, SMALL | MLA | TIED | {"q_lora_rank": None, "n_group": 1, "topk_group": 1},
                    SMALL | MLA | {"attention_bias": True, "first_k_dense_replace": 0, "n_group": 2, "topk_group": 1}],
    "t5": [{"d_model": 48, "num_heads": 6, "num_layers": 3, "d_ff": 70, "d_kv": 9, "vocab_size": 101},
           {"d_model": 32, "num_heads": 4, "num_layers": 2, "num_decoder_layers": 4, "feed_forward_proj": "gated-gelu", "vocab_size": 77} | UNTIED,
           {"d_model": 24, "num_heads": 2, "num_layers": 1, "relative_attention_num_buckets": 12, "vocab_size": 50, "d_ff": 13}],
    "llava": [{"vision_config": CLIP, "text_config": {"model_type": "llama"} | GROUPED},
              {"vision_config": CLIP | {"image_size": 21}, "text_config": {"model_type": "mistral"} | WIDE | TIED, "multimodal_projector_bias": False},
              {"vision_config": CLIP | {"num_channels": 1}, "text_config": {"model_type": "qwen2"} | GROUPED}],
    "gemma3": [{"vision_config": SIGLIP, "text_config": TEXT3, "mm_tokens_per_image": 16},
               {"vision_config": SIGLIP | {"num_channels": 1, "num_hidden_layers": 3}, "text_config": TEXT3, "mm_tokens_per_image": 64} | UNTIED,
               {"vision_config": SIGLIP | {"image_size": 28}, "text_config": TEXT3 | {"num_hidden_layers": 7}, "mm_tokens_per_image": 4}],
    "qwen2_vl": [{"vision_config": QWEN_TOWER, "text_config": QWEN_TEXT},
                 {"vision_config": QWEN_TOWER | {"in_channels": 1, "temporal_patch_size": 1}, **QWEN_TEXT, **TIED},
                 {"vision_config": QWEN_TOWER | {"spatial_merge_size": 3, "depth": 1}, "text_config": QWEN_TEXT | {"num_hidden_layers": 1}}],
    "qwen2_5_vl": [{"vision_config": QWEN_TOWER_2_5, "text_config": QWEN_TEXT},
                   {"vision_config": QWEN_TOWER_2_5 | {"temporal_patch_size": 1, "fullatt_block_indexes": [0, 2]}, **QWEN_TEXT, **TIED},
                   {"vision_config": QWEN_TOWER_2_5 | {"spatial_merge_size": 1, "depth": 2}, "text_config": QWEN_TEXT}],
}  # fmt: skip
#: The relatives of Llama take the same three shapes, with biases where they have any.
PLAIN = [
    GROUPED,
    WIDE | {"tie_word_embeddings": True},
    SMALL
    | {"num_key_value_heads": 6, "attention_bias": True, "mlp_bias": True, "num_hidden_layers": 5},
]
SHAPES |= dict.fromkeys(
    ("llama", "mistral", "qwen2", "qwen3", "gemma", "olmo", "olmo2", "granite", "smollm3", "glm4"),
    PLAIN,
)
CASES = [(name, shape) for name in sorted(SHAPES) for shape in SHAPES[name]]
ids = [f"{name}-{i}" for name in sorted(SHAPES) for i in range(len(SHAPES[name]))]
each_case = pytest.mark.parametrize(("model_type", "shape"), CASES, ids=ids)


def build(model_type: str, shape: dict[str, Any]) -> torch.nn.Module:
    """transformers' class on the meta device."""
    config = transformers.CONFIG_MAPPING[model_type](**shape)
    with torch.device("meta"):
        return getattr(transformers, FAMILIES[model_type].model_class)(config)


def test_every_type_is_tried_in_three_shapes() -> None:
    assert set(SHAPES) == set(FAMILIES)
    assert all(len(shapes) >= 3 for shapes in SHAPES.values())


@each_case
def test_the_count_is_that_of_transformers_class(model_type: str, shape: dict[str, Any]) -> None:
    model = build(model_type, shape)
    expected = sum(p.numel() for p in model.parameters())
    if model_type == "t5" and shape.get("tie_word_embeddings") is False:
        # transformers 5 ties T5 1.1's head until a checkpoint with its own is loaded.
        expected += model.lm_head.weight.numel()
    assert params(from_hf({"model_type": model_type} | shape, "x")).value == expected


EXPERT_CASES = [
    (case, label)
    for case, label in zip(CASES, ids, strict=True)
    if "moe" in case[0] or case[0] in ("mixtral", "gpt_oss", "deepseek_v2", "deepseek_v3")
]


@pytest.mark.parametrize(
    ("model_type", "shape"), [c for c, _ in EXPERT_CASES], ids=[i for _, i in EXPERT_CASES]
)
def test_active_counts_scale_the_expert_tensors(model_type: str, shape: dict[str, Any]) -> None:
    """On their module: tensors with a leading axis of experts, k of E; everything else whole."""
    model = build(model_type, shape)
    config = model.config
    n_experts = getattr(config, "num_local_experts", None) or config.num_experts
    active = 0
    for name, tensor in model.named_parameters():
        of_experts = ".experts." in name
        assert not of_experts or tensor.shape[0] == n_experts
        active += (
            tensor.numel() * config.num_experts_per_tok // n_experts
            if of_experts
            else tensor.numel()
        )
    arch = from_hf({"model_type": model_type} | shape, "x")
    assert any(isinstance(layer.feed_forward, Experts) for layer in arch.layers)
    assert params(arch, active=True).value == active


@each_case
def test_a_spec_goes_back_to_a_config_unchanged(model_type: str, shape: dict[str, Any]) -> None:
    arch = from_hf({"model_type": model_type} | shape, "x")
    if FAMILIES[model_type].more is None:
        with pytest.raises(InputError):
            to_hf(arch)
        return
    config = json.loads(json.dumps(to_hf(arch)))
    assert from_hf(config, "x") == arch


@each_case
def test_a_written_config_builds_the_same_class_size(
    model_type: str, shape: dict[str, Any]
) -> None:
    """Written by us, understood by them: keys that only we read would show here."""
    if FAMILIES[model_type].more is None:
        pytest.skip(f"{model_type} configs are read, not written")
    arch = from_hf({"model_type": model_type} | shape, "x")
    config = to_hf(arch)
    written = config.pop("model_type")
    config.pop("architectures")
    ours = build(written, config | {"pad_token_id": None, "bos_token_id": 1, "eos_token_id": 1})
    same = sum(p.numel() for p in build(model_type, shape).parameters())
    assert sum(p.numel() for p in ours.parameters()) == same


@pytest.mark.parametrize("model_type", sorted(set(FAMILIES) - {"llava"}))
def test_absent_keys_take_the_defaults_of_the_class(model_type: str) -> None:
    """Nothing said: what transformers builds, but for lists it makes of those defaults."""
    theirs = transformers.CONFIG_MAPPING[model_type]()
    family = FAMILIES[model_type]
    for name, key in family.keys.items():
        if name in (
            "feed_forward_proj",
            "word_embed_proj_dim",
            "num_decoder_layers",
            "seq_length",
            "n_positions",
        ):
            continue  # filled in by their class, or (the lengths) not kept by it
        if key.kind in ("size_or_none", "real_or_none") and key.default is None:
            continue  # null, or what the builder makes of it
        if (model_type, name) == ("deepseek_v2", "num_experts_per_tok"):
            assert theirs.num_experts_per_tok is None  # their class cannot be built without it
            continue
        assert getattr(theirs, name) == key.default, name


@pytest.mark.parametrize("model_type", sorted(FAMILIES))
def test_a_config_saved_by_transformers_reads_without_unknown_keys(
    model_type: str, tmp_path: Any
) -> None:
    shape = SHAPES[model_type][0]
    transformers.CONFIG_MAPPING[model_type](**shape).save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "config.json").read_text())
    reading = read_hf(saved, "x")
    # DeepSeek-V3's prediction head is not in their class, nor in our count: it is reported.
    left_out = ("num_nextn_predict_layers",) if model_type == "deepseek_v3" else ()
    assert reading.unknown == left_out
    assert (
        params(reading.arch).value == params(from_hf({"model_type": model_type} | shape, "x")).value
    )


# --- what the shapes mean ---------------------------------------------------------------


def test_the_correction_of_deepseek_v3_is_a_buffer_and_not_counted() -> None:
    model = build("deepseek_v3", SHAPES["deepseek_v3"][0])
    name = "e_score_correction_bias"
    assert any(key.endswith(name) for key, _ in model.named_buffers())
    assert not any(key.endswith(name) for key, _ in model.named_parameters())


def test_t5_stores_one_bias_table_per_stack() -> None:
    arch = from_hf({"model_type": "t5"}, "x")
    tree = params(arch)
    assert tree.find("relative_bias").value == tree.find("encoder/relative_bias").value == 32 * 8
    assert isinstance(arch.layers[0].attention.position, RelativeBias)


def test_an_encoder_runs_once_and_its_keys_are_cached() -> None:
    arch = from_hf({"model_type": "t5", "num_layers": 2}, "x")
    prefill = flops_forward(arch, Workload(3, 8, 8, source_len=20))
    # Four projections and two of the feed-forward, 3 x 20 tokens.
    layer = 2 * 60 * (4 * 512 * 512 + 2 * 512 * 2048) + 4 * 3 * 8 * 20 * 20 * 64
    assert prefill.find("encoder").value == 2 * layer
    assert prefill.find("layer/cross/k").value == 2 * 60 * 512 * 512
    decode = flops_forward(arch, Workload(3, 1, 8, source_len=20))
    assert {child.name for child in decode.children} == {"layer", "head"}
    assert decode.find("layer/cross/core").value == 4 * 3 * 8 * 1 * 20 * 64
    cache = bytes_kv_cache(arch, Workload(3, 1, 8, source_len=20), Precision.BF16)
    assert cache.value == 2 * 2 * 2 * 512 * 3 * (8 + 20)  # bytes, k and v, layers, width, sequences


def test_a_vision_tower_reads_images_once() -> None:
    arch = from_hf({"model_type": "llava"} | SHAPES["llava"][0], "x")
    one = flops_forward(arch, Workload(2, 8, 8)).find("vision")
    assert one.find("patches").value == 2 * (2 * 16) * (7 * 7 * 3) * 24
    assert (
        one.find("layer/attention/core").value == 4 * 2 * 3 * 17 * 17 * 8
    )  # 16 patches, a class token
    assert flops_forward(arch, Workload(2, 8, 8, images=3)).find("vision").value == 3 * one.value
    names = {child.name for child in flops_forward(arch, Workload(2, 8, 8, images=0)).children}
    assert "vision" not in {
        n for n in names if flops_forward(arch, Workload(2, 8, 8, images=0)).find(n).value
    }


def test_windows_stand_in_the_layers_that_the_class_gives_them() -> None:
    for model_type, shape in (
        ("gemma3_text", SHAPES["gemma3_text"][0]),
        ("gpt_oss", SHAPES["gpt_oss"][0]),
    ):
        theirs = transformers.CONFIG_MAPPING[model_type](**shape).layer_types
        arch = from_hf({"model_type": model_type} | shape, "x")
        ours = [isinstance(a.span, Window) for a in arch.attentions()]
        assert ours == [kind == "sliding_attention" for kind in theirs]


def test_windows_stand_in_the_layers_of_a_tower_that_its_config_does_not_list() -> None:
    arch = from_hf({"model_type": "qwen2_5_vl"} | SHAPES["qwen2_5_vl"][0], "x")
    assert arch.vision is not None
    assert [layer.name for layer in arch.vision.layers] == ["local", "global", "local"]
    # 448 pixels are 64 x 64 patches of 7; a window of 28 pixels holds 4 x 4 of them.
    vision = flops_forward(arch, Workload(1, 8, 8)).find("vision")
    assert vision.find("local/attention/core").value == 4 * 3 * 4096 * 16 * 8
    assert vision.find("global/attention/core").value == 4 * 3 * 4096 * 4096 * 8
    # Two by two patches are one token of the decoder.
    assert vision.find("projector").value == 2 * 1024 * (96 * 96 + 96 * 48)


def test_sections_of_turned_pairs_are_read_from_either_table_or_said_to_be_assumed() -> None:
    shape = SHAPES["qwen2_vl"][0]
    plain = {key: value for key, value in QWEN_TEXT.items() if key != "rope_scaling"}
    newer = plain | {"rope_parameters": {"rope_type": "default", "mrope_section": [2, 1, 1]}}
    for text, sections in ((QWEN_TEXT, (1, 1, 2)), (newer, (2, 1, 1))):
        arch = from_hf({"model_type": "qwen2_vl"} | shape | {"text_config": text}, "x")
        position = arch.layers[0].attention.position
        assert isinstance(position, Rope)
        assert position.sections == sections
    wide = plain | {"num_attention_heads": 1, "num_key_value_heads": 1, "hidden_size": 128}
    tower = shape["vision_config"] | {"hidden_size": 128}
    reading = read_hf({"model_type": "qwen2_vl", "text_config": wide, "vision_config": tower}, "x")
    assert "mrope_section=[16, 24, 24]" in reading.defaulted
    assert not reading.unknown
    with pytest.raises(InputError, match="add up to the 4 rotated pairs"):
        from_hf({"model_type": "qwen2_vl"} | shape | {"text_config": plain}, "x")


def test_what_an_image_is_assumed_to_measure_is_said() -> None:
    reading = read_hf({"model_type": "qwen2_vl"} | SHAPES["qwen2_vl"][0], "x")
    assert any("448 pixels" in text for text in reading.defaulted)


@pytest.mark.parametrize(
    ("model_type", "change", "said"),
    [("gemma3", {"vision_config": SIGLIP | {"vision_use_head": True}}, "pooling head"),
     ("gemma3", {"text_config": {"model_type": "llama"}}, "gemma3_text"),
     ("qwen2_vl", {"vision_config": QWEN_TOWER | {"hidden_size": 24}}, "language model's width, 48")],
)  # fmt: skip
def test_a_tower_that_cannot_be_said_or_does_not_fit_is_refused(
    model_type: str, change: dict[str, Any], said: str
) -> None:
    with pytest.raises(InputError, match=said):
        from_hf({"model_type": model_type} | SHAPES[model_type][0] | change, "x")


@pytest.mark.parametrize(
    "config",
    [
        {"model_type": "olmo", "clip_qkv": 8.0},
        {"model_type": "mpt", "attn_config": {"clip_qkv": 6}},
    ],
)
def test_a_clamp_on_queries_changes_no_count_and_is_known(config: dict[str, Any]) -> None:
    assert read_hf(config, "x").unknown == ()


def test_falcons_first_name_for_its_key_value_heads_is_read() -> None:
    shape = SHAPES["falcon"][1] | {"n_head_kv": 2}
    old = from_hf(
        {"model_type": "falcon"} | {k: v for k, v in shape.items() if k != "num_kv_heads"}, "x"
    )
    assert old == from_hf({"model_type": "falcon"} | SHAPES["falcon"][1], "x")
