"""Folders of models that read images, both ways, with images in: transformers is the oracle."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from isoflop.arch.hf import FAMILIES
from isoflop.errors import InputError
from isoflop.model import Images, VisionDecoder
from isoflop.model.weights import load_model, save_model

transformers = pytest.importorskip("transformers", reason="transformers is the oracle")
pytestmark = pytest.mark.usefixtures("quiet_transformers")

V, IMAGE = 61, 60  # the last number stands for a token of an image
TEXT = {"vocab_size": V, "hidden_size": 32, "intermediate_size": 40, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64,
        "pad_token_id": None, "bos_token_id": 1, "eos_token_id": 1}  # fmt: skip
CLIP = {"model_type": "clip_vision_model", "hidden_size": 24, "num_hidden_layers": 3,
        "num_attention_heads": 3, "intermediate_size": 50, "image_size": 12, "patch_size": 4}  # fmt: skip
LLAVA = {"vision_config": CLIP, "text_config": TEXT | {"model_type": "llama"}}
SIGLIP = CLIP | {"model_type": "siglip_vision_model", "image_size": 24, "vision_use_head": False}
#: The second layer sees all, the others a window shorter than an image.
TEXT3 = TEXT | {"model_type": "gemma3_text", "num_hidden_layers": 3, "head_dim": 8, "sliding_window": 5,
                "layer_types": ["sliding_attention", "full_attention", "sliding_attention"]}  # fmt: skip
GEMMA3 = {"vision_config": SIGLIP, "text_config": TEXT3, "mm_tokens_per_image": 9}
#: 448 pixels, which a config does not name, are 8 x 8 patches here, and 4 x 4 tokens.
QWEN = {"text_config": TEXT | {"rope_scaling": {"type": "mrope", "mrope_section": [1, 1, 2]}}}
TOWER_2 = {"depth": 2, "embed_dim": 24, "hidden_size": 32, "num_heads": 3, "mlp_ratio": 2,
           "patch_size": 56, "in_channels": 1}  # fmt: skip
#: Four windows of 4 x 4 patches, but for the second layer.
TOWER_2_5 = {"depth": 3, "hidden_size": 24, "out_hidden_size": 32, "num_heads": 3, "intermediate_size": 31,
             "patch_size": 56, "in_channels": 1, "window_size": 224, "fullatt_block_indexes": [1]}  # fmt: skip

SHAPES: list[tuple[str, dict[str, Any]]] = [
    ("llava", LLAVA),
    ("llava", LLAVA | {"text_config": TEXT | {"model_type": "qwen2", "tie_word_embeddings": True},
                       "vision_feature_layer": -1, "multimodal_projector_bias": False}),
    ("gemma3", GEMMA3),
    ("gemma3", {"vision_config": SIGLIP, "text_config": TEXT3, "mm_tokens_per_image": 36, "tie_word_embeddings": False}),
    ("qwen2_vl", QWEN | {"vision_config": TOWER_2}),
    ("qwen2_vl", QWEN | {"vision_config": TOWER_2 | {"temporal_patch_size": 1, "in_channels": 3}, "tie_word_embeddings": True}),
    ("qwen2_5_vl", QWEN | {"vision_config": TOWER_2_5}),
    ("qwen2_5_vl", QWEN | {"vision_config": TOWER_2_5 | {"spatial_merge_size": 1, "window_size": 112, "temporal_patch_size": 1}}),
]  # fmt: skip
each = pytest.mark.parametrize(
    ("model_type", "shape"), SHAPES, ids=[f"{name}-{i}" for i, (name, _) in enumerate(SHAPES)]
)
#: What the hub and transformers 4 call what transformers 5 writes under another name.
_CLIP_OLDER = [
    {r"^vision_tower\.": "vision_tower.vision_model."},
    {
        r"^vision_tower\.": "model.vision_tower.vision_model.",
        r"^multi_modal": "model.multi_modal",
        r"^language_model\.lm_head": "lm_head",
        r"^language_model\.model": "model.language_model",
    },
]
_QWEN_OLDER = [{r"^model\.": "model.language_model.", r"^visual\.": "model.visual."}]
OLDER = {"llava": _CLIP_OLDER, "gemma3": _CLIP_OLDER, "qwen2_vl": _QWEN_OLDER, "qwen2_5_vl": _QWEN_OLDER}  # fmt: skip


def theirs_of(model_type: str, shape: dict[str, Any]) -> torch.nn.Module:
    """A model of theirs whose every weight has a value that matters."""
    config = transformers.CONFIG_MAPPING[model_type](**shape, attn_implementation="eager")
    model = getattr(transformers, FAMILIES[model_type].model_class)(config).eval()
    stream = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for weight in model.parameters():
            noise = torch.randn(weight.shape, generator=stream)
            weight.add_(noise * (0.15 if weight.dim() > 1 else 0.3))
    return told(model)


def told(model: torch.nn.Module) -> torch.nn.Module:
    """Which number stands for a token of an image: a spec knows no special tokens."""
    model.config.image_token_id = IMAGE
    return model


def load_theirs(folder: Path) -> torch.nn.Module:
    config = json.loads((folder / "config.json").read_text())
    model_class = getattr(transformers, config["architectures"][0])
    model, loading = model_class.from_pretrained(
        folder, output_loading_info=True, attn_implementation="eager"
    )
    assert not any(loading[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    return told(model.eval())


def pictures(model: VisionDecoder, n_images: int) -> torch.Tensor:
    spec, stream = model.vision.spec, torch.Generator().manual_seed(1)
    return torch.randn(n_images, spec.channels, spec.image, spec.image, generator=stream)


def text_around(n_each: int) -> torch.Tensor:
    """Two texts: one with an image, one with two that a token keeps apart."""
    tokens = torch.randint(
        1, IMAGE, (2, 2 * n_each + 5), generator=torch.Generator().manual_seed(2)
    )
    tokens[0, 3 : 3 + n_each] = IMAGE
    tokens[1, 1 : 1 + n_each] = IMAGE
    tokens[1, 2 + n_each : 2 + 2 * n_each] = IMAGE
    return tokens


def tokens_of_an_image(model: VisionDecoder) -> int:
    spec = model.vision.spec
    return (spec.image // spec.patch // spec.projector.merge) ** 2


def asked(config: Any, tokens: torch.Tensor, *images: torch.Tensor) -> dict[str, Any]:
    """Tokens and images, batches of one size each, in the words of a class."""
    pixels = images[0]
    of_images = (tokens == IMAGE).long()
    if config.model_type == "llava":
        return {"input_ids": tokens, "pixel_values": pixels}
    if config.model_type == "gemma3":
        return {"input_ids": tokens, "pixel_values": pixels, "token_type_ids": of_images}
    tower = config.vision_config
    grids = [[1, x.shape[-2] // tower.patch_size, x.shape[-1] // tower.patch_size]
             for x in images for _ in x]  # fmt: skip
    return {
        "input_ids": tokens,
        "mm_token_type_ids": of_images,
        "pixel_values": torch.cat([in_patches(x, tower) for x in images]),
        "image_grid_thw": torch.tensor(grids),
    }


def in_patches(pixels: torch.Tensor, tower: Any) -> torch.Tensor:
    """What their processor makes of stills: a row for each patch, those of a token in a row."""
    p, m, frames = tower.patch_size, tower.spatial_merge_size, tower.temporal_patch_size
    n, colours, height, width = pixels.shape
    stills = pixels.unsqueeze(2).expand(n, colours, frames, height, width)
    cut = stills.reshape(n, colours, frames, height // m // p, m, p, width // m // p, m, p)
    return cut.permute(0, 3, 6, 4, 7, 1, 2, 5, 8).reshape(-1, colours * frames * p * p)


@torch.no_grad()
def both(theirs: torch.nn.Module, ours: VisionDecoder) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits of two texts with three images."""
    pixels, tokens = pictures(ours, 3), text_around(tokens_of_an_image(ours))
    expected = theirs(**asked(theirs.config, tokens, pixels)).logits
    return expected, ours(tokens, Images.at(IMAGE, tokens, pixels))


def assert_close(expected: torch.Tensor, got: torch.Tensor) -> None:
    reach = expected.max() - expected.min()
    assert reach > 1
    assert (got - expected).abs().max() <= 1e-5 * reach


def loaded(folder: Path) -> VisionDecoder:
    model = load_model(folder).eval()
    assert isinstance(model, VisionDecoder)
    return model


@each
def test_logits_with_images_are_those_of_transformers_both_ways(
    model_type: str, shape: dict[str, Any], tmp_path: Path
) -> None:
    theirs = theirs_of(model_type, shape)
    theirs.save_pretrained(tmp_path / "theirs")
    ours = loaded(tmp_path / "theirs")
    assert_close(*both(theirs, ours))
    save_model(ours, tmp_path / "ours")
    assert_close(*both(load_theirs(tmp_path / "ours"), ours))


@pytest.mark.parametrize("case", [case for case in SHAPES if case[0].startswith("qwen")])
@torch.no_grad()
def test_images_of_any_size_are_read_as_transformers_reads_them(
    case: tuple[str, dict[str, Any]], tmp_path: Path
) -> None:
    """One batch of two, then a lone one: windows at the edges are cut, grids are no squares."""
    theirs = theirs_of(*case)
    theirs.save_pretrained(tmp_path)
    ours = loaded(tmp_path)
    spec, stream = ours.vision.spec, torch.Generator().manual_seed(4)
    side = spec.patch * spec.projector.merge
    sizes = [(2, 3, 5), (1, 4, 2)]
    images = tuple(
        torch.randn(n, spec.channels, rows * side, columns * side, generator=stream)
        for n, rows, columns in sizes
    )
    tokens = torch.randint(1, IMAGE, (2, 28), generator=stream)
    tokens[0, 2:17] = tokens[1, :15] = tokens[1, 17:25] = IMAGE
    expected = theirs(**asked(theirs.config, tokens, *images)).logits
    assert_close(expected, ours(tokens, Images.at(IMAGE, tokens, images)))


@pytest.mark.parametrize(
    ("model_type", "names"),
    [(model_type, names) for model_type, ways in OLDER.items() for names in ways],
)
def test_names_of_the_hub_and_of_transformers_4_are_read_as_transformers_5_reads_them(
    model_type: str, names: dict[str, str], tmp_path: Path
) -> None:
    shape = next(shape for name, shape in SHAPES if name == model_type)
    theirs_of(model_type, shape).save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    state = load_file(file)
    for pattern, older in names.items():
        state = {re.sub(pattern, older, name): tensor for name, tensor in state.items()}
    save_file(state, file, {"format": "pt"})
    assert_close(*both(load_theirs(tmp_path), loaded(tmp_path)))


def test_a_tied_head_under_an_older_name_equals_the_token_vectors(tmp_path: Path) -> None:
    model_type, shape = SHAPES[1]
    theirs_of(model_type, shape).save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    state = load_file(file)
    vectors = state["language_model.model.embed_tokens.weight"]
    save_file(state | {"lm_head.weight": vectors.clone()}, file)
    loaded(tmp_path)
    save_file(state | {"lm_head.weight": vectors + 1}, file)
    with pytest.raises(InputError, match=r"lm_head\.weight=other numbers"):
        load_model(tmp_path)
