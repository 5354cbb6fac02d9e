"""Folders of weights: transformers' own files are the oracle, both ways, for every family.

Where the model is not built yet, names, shapes and bits are tested without it: the parameters
that the count's description names stand in for the module's.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.test_hf_types import BARE, GROUPED, PLAIN, SHAPES

from isoflop.arch import Arch, gpt, llama, read_hf, to_hf
from isoflop.arch.hf import FAMILIES
from isoflop.arch.spec import Experts, Layer, VisionTower
from isoflop.count import Workload
from isoflop.count.blocks import Part, describe
from isoflop.errors import Fault, InputError
from isoflop.model import build
from isoflop.model.weights import load_model, read_weights, save_model
from isoflop.model.weights import write as writing
from isoflop.model.weights.folder import open_folder
from isoflop.model.weights.read import shapes_of, weights_of
from isoflop.model.weights.table import Pair, pairs
from isoflop.model.weights.tables.llama import LLAMA
from isoflop.model.weights.tables.registry import TYPES, table_of
from isoflop.model.weights.write import write_folder
from isoflop.runs.durable import WriteFailed

transformers = pytest.importorskip("transformers", reason="transformers is the oracle")
pytestmark = pytest.mark.usefixtures("quiet_transformers")

#: transformers' DeepSeek-V3 lacks the prediction head that its config speaks of.
KNOWN = ("num_nextn_predict_layers",)

LLAMA3 = {"rope_type": "llama3", "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
          "original_max_position_embeddings": 8}  # fmt: skip
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 8}
#: What a family's three usual shapes leave out.
MORE: list[tuple[str, dict[str, Any]]] = [
    ("llama", GROUPED | {"rope_scaling": LLAMA3, "max_position_embeddings": 32}),
    ("llama", GROUPED | {"rope_scaling": YARN, "max_position_embeddings": 32}),
    ("mistral", GROUPED | {"sliding_window": 5}),
    ("qwen2", GROUPED | {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1}),
    ("qwen3", PLAIN[1] | {"head_dim": 12}),
    ("gemma2", GROUPED | {"head_dim": 14, "sliding_window": 4, "query_pre_attn_scalar": 20}),
    ("gpt_oss", GROUPED | {"num_local_experts": 4, "sliding_window": 4, "head_dim": 8}),
]


def sayable(model_type: str, shape: dict[str, Any]) -> dict[str, Any]:
    """A shape without the keys that its class does not know.

    transformers rounds Falcon's ALiBi to bfloat16, which powers of two outlive: 8 heads, not 6.
    Its DeepSeek-V3 divides the heads by a number of kv heads that it has no other use for.
    """
    foreign = {"attention_bias", "mlp_bias"} - FAMILIES[model_type].keys.keys()
    known = {key: value for key, value in shape.items() if key not in foreign}
    if model_type == "deepseek_v3":
        return known | {"num_key_value_heads": shape["num_attention_heads"]}
    return known | {"num_attention_heads": 8} if shape.get("alibi") else known


#: The plain way where there is a choice: sdpa has no softcap and no sinks, and the products of
#: grouped experts ask for other sizes than ours. Falcon's plain way adds its ALiBi twice.
PLAIN_WAYS = {"attn_implementation": "eager", "experts_implementation": "eager"}


def ways(model_type: str) -> dict[str, str]:
    return PLAIN_WAYS | ({"attn_implementation": "sdpa"} if model_type == "falcon" else {})


CASES = [(name, sayable(name, x)) for name in sorted(TYPES) for x in SHAPES[name]] + MORE
ids = [f"{name}-{i}" for i, (name, _) in enumerate(CASES)]
each_case = pytest.mark.parametrize(("model_type", "shape"), CASES, ids=ids)


# --- transformers' side -----------------------------------------------------------------


def theirs_of(model_type: str, shape: dict[str, Any]) -> torch.nn.Module:
    """A model of theirs whose every weight, norms and biases too, has a value that matters."""
    config = transformers.CONFIG_MAPPING[model_type](**shape, **ways(model_type))
    model = getattr(transformers, FAMILIES[model_type].model_class)(config).eval()
    stream = torch.Generator().manual_seed(0)
    of_matrices = 0.05 if model_type == "t5" else 0.15  # T5 does not scale its scores down
    with torch.no_grad():
        for weight in model.state_dict().values():
            noise = torch.randn(weight.shape, generator=stream)
            weight.add_(noise * (of_matrices if weight.dim() > 1 else 0.3))
    return model


def save_theirs(model_type: str, shape: dict[str, Any], folder: Path) -> torch.nn.Module:
    model = theirs_of(model_type, shape)
    model.save_pretrained(folder)
    if model_type == "t5" and not shape.get("tie_word_embeddings", True):
        # transformers 5 ties T5 1.1's head until it has loaded one of its own.
        state = load_file(folder / "model.safetensors")
        head = torch.randn(model.lm_head.weight.shape, generator=torch.Generator().manual_seed(3))
        save_file(state | {"lm_head.weight": head}, folder / "model.safetensors", {"format": "pt"})
        return load_theirs(folder)
    return model


def load_theirs(folder: Path) -> torch.nn.Module:
    config = json.loads((folder / "config.json").read_text())
    model_class = getattr(transformers, config["architectures"][0])
    model, told = model_class.from_pretrained(
        folder, output_loading_info=True, **ways(config["model_type"])
    )
    assert not told["missing_keys"], told
    assert not told["unexpected_keys"], told
    assert not told["mismatched_keys"], told
    return model.eval()


def tokens_for(arch: Arch) -> torch.Tensor:
    return torch.randint(1, arch.vocab_size, (2, 13), generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def logits(model: torch.nn.Module, tokens: torch.Tensor) -> torch.Tensor:
    """Of theirs or ours; an encoder-decoder reads the tokens and writes them again."""
    arch = getattr(model, "arch", None)
    if arch is None:
        if model.config.is_encoder_decoder:
            return model(input_ids=tokens, decoder_input_ids=tokens.flip(1)).logits
        return model(tokens).logits
    return model(tokens, tokens.flip(1)) if arch.encoder is not None else model(tokens)


def assert_close(a: torch.Tensor, b: torch.Tensor) -> None:
    reach = a.max() - a.min()
    assert reach > 0.1
    assert (a - b).abs().max() <= 1e-5 * reach


# --- ours, from the count's description -------------------------------------------------


def counted_shapes(arch: Arch) -> dict[str, torch.Size]:
    """The names and shapes of a model's parameters as the count describes them."""
    whole = describe(arch, Workload(1, 1, 1))
    found = _shapes(whole, "")
    found |= _layer_shapes(whole, arch.layers, "")
    if arch.encoder is not None:
        (encoder,) = (part for part in whole.parts if part.name == "encoder")
        found |= _layer_shapes(encoder, arch.encoder.layers, "encoder.")
    if arch.vision is not None:
        (vision,) = (part for part in whole.parts if part.name == "vision")
        found |= _tower_shapes(vision, arch.vision)
    return found


def _tower_shapes(vision: Part, tower: VisionTower) -> dict[str, torch.Size]:
    """A tower's: what stands behind the layer that is read is stored too."""
    unread = [part for part in vision.parts if part.name == "unread"]
    behind = [inner for part in unread for inner in part.parts]
    stored = [*vision.parts, *(part for part in behind if part.name != "final_norm")]
    found = _layer_shapes(replace(vision, parts=tuple(stored)), tower.layers, "vision.")
    norms = (part for part in behind if part.name == "final_norm")
    return found | {
        name: x for part in norms for name, x in _shapes(part, "vision.final_norm.").items()
    }


def _shapes(part: Part, place: str, lead: tuple[int, ...] = ()) -> dict[str, torch.Size]:
    found = {}
    for weight in part.weights:
        sizes = [int(size.value) for _, size in weight.axes]
        if weight.multiplies and weight.axes[0][0] != "vocab":
            sizes.reverse()  # the description reads [in, out], a module stores [out, in]
        found[f"{place}{weight.name}"] = torch.Size([*lead, *sizes])
    for inner in part.parts:
        if not inner.is_layer and inner.name != "unread":
            stacked = (int(inner.times.value),) if inner.name == "experts" else lead
            found |= _shapes(inner, f"{place}{inner.name}.", stacked)
    return found


def _layer_shapes(stack: Part, layers: Sequence[Layer], place: str) -> dict[str, torch.Size]:
    kinds = {part.name: part for part in stack.parts if part.is_layer}
    found = {}
    for i, layer in enumerate(layers):
        found |= _shapes(kinds[layer.name], f"{place}layers.{i}.")
        if isinstance(layer.feed_forward, Experts) and layer.feed_forward.score_correction:
            name = f"{place}layers.{i}.feed_forward.router.correction"  # a buffer: not counted
            found[name] = torch.Size([layer.feed_forward.n_experts])
    return found


def arch_in(folder: Path) -> Arch:
    return read_hf(json.loads((folder / "config.json").read_text()), "read").arch


def same_bits(a: Path, b: Path) -> bool:
    ours, theirs = load_file(a / "model.safetensors"), load_file(b / "model.safetensors")
    return ours.keys() == theirs.keys() and all(
        ours[name].dtype == theirs[name].dtype and torch.equal(ours[name], theirs[name])
        for name in theirs
    )


# --- every family -----------------------------------------------------------------------


def test_every_family_has_a_table() -> None:
    assert set(TYPES) == set(FAMILIES)


@pytest.fixture(scope="module", params=CASES, ids=ids)
def theirs(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[torch.nn.Module, Path]:
    """A model of theirs, and the folder they have saved it in."""
    folder = tmp_path_factory.mktemp("theirs")
    return save_theirs(*request.param, folder), folder


def test_read_and_written_again_a_file_is_the_same_to_the_bit(
    theirs: tuple[torch.nn.Module, Path], tmp_path: Path
) -> None:
    """Names, shapes and bits of every tensor; reading alone refuses a name or shape amiss."""
    _, saved = theirs
    folder = open_folder(saved)
    arch = arch_in(saved)
    weights = weights_of(folder, arch, counted_shapes(arch))
    read = dict(weights)
    dtypes = {name: tensor.dtype for name, tensor in read.items()}
    write_folder(tmp_path / "ours", folder.config, weights.pairs, read, dtypes)
    assert same_bits(tmp_path / "ours", saved)


@pytest.mark.parametrize(
    ("model_type", "shape"), [(name, sayable(name, SHAPES[name][1])) for name in sorted(TYPES)]
)
def test_transformers_loads_what_is_written_for_any_spec(
    model_type: str, shape: dict[str, Any], tmp_path: Path
) -> None:
    """Our names and config, random bits: what transformers saves again is what we wrote."""
    arch = read_hf({"model_type": model_type} | shape, "random").arch
    config = to_hf(arch)
    stream = torch.Generator().manual_seed(2)
    shapes = counted_shapes(arch)
    tensors = {name: torch.randn(shape, generator=stream) for name, shape in shapes.items()}
    paired = pairs(table_of(config, arch), arch, shapes)
    dtypes = dict.fromkeys(shapes, torch.float32)
    write_folder(tmp_path / "ours", writing.without_tokens(config), paired, tensors, dtypes)
    load_theirs(tmp_path / "ours").save_pretrained(tmp_path / "theirs")
    assert same_bits(tmp_path / "ours", tmp_path / "theirs")


def test_logits_are_those_of_transformers_both_ways(
    theirs: tuple[torch.nn.Module, Path], tmp_path: Path
) -> None:
    model, saved = theirs
    arch = arch_in(saved)
    try:
        build(arch, device="meta")
    except InputError as error:
        pytest.skip(f"not built yet: {error.problems[0]}")
    ours = load_model(saved, ignored_keys=KNOWN).eval()
    tokens = tokens_for(arch)
    got = logits(ours, tokens)
    assert_close(logits(model, tokens), got)
    save_model(ours, tmp_path / "ours")
    assert_close(logits(load_theirs(tmp_path / "ours"), tokens), got)


@each_case
def test_the_module_has_the_parameters_that_the_count_describes(
    model_type: str, shape: dict[str, Any]
) -> None:
    """What stands in for models that are not built is right for those that are."""
    arch = read_hf({"model_type": model_type} | shape, "x").arch
    try:
        model = build(arch, device="meta")
    except InputError as error:
        pytest.skip(f"not built yet: {error.problems[0]}")
    assert shapes_of(model) == counted_shapes(arch)


def test_the_layouts_of_joined_tensors_are_told_apart() -> None:
    """Three ways to join equal shapes: a test of shapes alone would not see a wrong one."""
    arch = read_hf({"model_type": "gpt_neox"} | SHAPES["gpt_neox"][0], "x").arch
    names = [f"layers.0.attention.{x}.weight" for x in "qkv"]
    ours = tuple(torch.full((48, 48), float(i)) for i in range(3))
    shapes = {name: x.shape for name, x in zip(names, ours, strict=True)}
    stored = next(
        stored
        for n, stored in table_of({"model_type": "gpt_neox"}, arch).entries(arch)
        if n == tuple(names)
    )
    (kept,) = Pair.of(shapes, stored).join(ours)
    assert kept[:, 0].tolist() == ([0.0] * 8 + [1.0] * 8 + [2.0] * 8) * 6  # head by head


def test_a_name_that_the_table_lacks_or_has_twice_is_our_fault() -> None:
    arch = llama("l", d_model=8, n_layers=1, n_heads=2, d_ff=8, vocab_size=5, max_seq_len=4)
    shapes = shapes_of(build(arch, device="meta"))
    with pytest.raises(Fault, match=r"layers\.0\.odd\.weight"):
        pairs(LLAMA, arch, shapes | {"layers.0.odd.weight": torch.Size([1])})


# --- tied heads, copies, bare models ----------------------------------------------------

TINY = llama(
    "tiny", d_model=16, n_layers=2, n_heads=4, n_kv_heads=2, d_ff=24, vocab_size=31,
    max_seq_len=16, tied=True,
)  # fmt: skip
TINY_GPT = gpt("g", d_model=16, n_layers=2, n_heads=4, vocab_size=31, max_seq_len=16)


def saved(tmp_path: Path, arch: Arch = TINY, **how: Any) -> Path:
    save_model(build(arch, seed=4), tmp_path / "model", **how)
    return tmp_path / "model"


def change(
    folder: Path, more: Mapping[str, torch.Tensor] = {}, without: Sequence[str] = ()
) -> None:
    state = load_file(folder / "model.safetensors") | dict(more)
    kept = {name: tensor for name, tensor in state.items() if name not in without}
    save_file(kept, folder / "model.safetensors", {"format": "pt"})


def test_a_tied_head_is_left_out_and_a_head_of_its_own_is_written(tmp_path: Path) -> None:
    tied = load_file(saved(tmp_path / "a") / "model.safetensors")
    assert "lm_head.weight" not in tied
    arch = llama("u", d_model=16, n_layers=1, n_heads=4, d_ff=24, vocab_size=31, max_seq_len=16)
    assert "lm_head.weight" in load_file(saved(tmp_path / "b", arch) / "model.safetensors")


def test_a_tied_head_that_is_written_out_is_read_where_it_is_the_token_vectors(
    tmp_path: Path,
) -> None:
    folder = saved(tmp_path)
    vectors = load_file(folder / "model.safetensors")["model.embed_tokens.weight"]
    change(folder, {"lm_head.weight": vectors.clone()})
    assert torch.equal(load_model(folder).embedding.tokens.weight, vectors)
    change(folder, {"lm_head.weight": vectors + 1})
    with pytest.raises(InputError, match=r"lm_head\.weight=other numbers.*model\.embed_tokens"):
        load_model(folder)


def test_a_head_that_is_missing_is_not_taken_from_the_token_vectors(tmp_path: Path) -> None:
    arch = llama("u", d_model=16, n_layers=1, n_heads=4, d_ff=24, vocab_size=31, max_seq_len=16)
    folder = saved(tmp_path, arch)
    change(folder, without=["lm_head.weight"])
    with pytest.raises(InputError, match=r"lm_head\.weight is missing"):
        load_model(folder)


def test_files_of_a_bare_model_with_its_masks_are_read(tmp_path: Path) -> None:
    """GPT-2's own files on the hub: no prefix, and causal masks beside the weights."""
    folder = saved(tmp_path, TINY_GPT)
    state = load_file(folder / "model.safetensors")
    bare = {name.removeprefix("transformer."): tensor for name, tensor in state.items()}
    bare["h.0.attn.bias"] = torch.ones(1, 1, 16, 16, dtype=torch.bool)
    save_file(bare, folder / "model.safetensors")
    tokens = tokens_for(TINY_GPT)
    assert torch.equal(load_model(folder)(tokens), build(TINY_GPT, seed=4)(tokens))


# --- shards, kinds of numbers -----------------------------------------------------------


def test_shards_hold_what_one_file_would_and_transformers_reads_them(tmp_path: Path) -> None:
    folder = saved(tmp_path, TINY_GPT, max_shard_bytes=2_000)
    shards = sorted(folder.glob("*.safetensors"))
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    assert len(shards) > 3
    assert {path.name for path in shards} == set(index["weight_map"].values())
    sizes = [sum(t.nbytes for t in load_file(path).values()) for path in shards]
    assert sum(sizes) == index["metadata"]["total_size"]
    assert all(
        size <= 2_000 or len(load_file(path)) == 1 for size, path in zip(sizes, shards, strict=True)
    )
    tokens = tokens_for(TINY_GPT)
    expected = build(TINY_GPT, seed=4).eval()(tokens)
    assert torch.equal(load_model(folder).eval()(tokens), expected)
    assert_near(logits(load_theirs(folder), tokens), expected)


def assert_near(a: torch.Tensor, b: torch.Tensor) -> None:
    assert (a - b).abs().max() <= 1e-5 * (b.max() - b.min())


def test_kinds_of_numbers_are_kept_or_cast_as_asked(tmp_path: Path) -> None:
    folder = saved(tmp_path, dtype=torch.bfloat16)
    assert json.loads((folder / "config.json").read_text())["torch_dtype"] == "bfloat16"
    kept, cast = load_model(folder), load_model(folder, dtype=torch.float32)
    assert {p.dtype for p in kept.parameters()} == {torch.bfloat16}
    assert {p.dtype for p in cast.parameters()} == {torch.float32}
    for name, tensor in build(TINY, seed=4).state_dict().items():
        assert torch.equal(kept.state_dict()[name], tensor.bfloat16())
        assert torch.equal(cast.state_dict()[name], tensor.bfloat16().float())


def test_one_norm_in_single_precision_stays_so_beside_halves(tmp_path: Path) -> None:
    folder = saved(tmp_path, dtype=torch.float16)
    change(folder, {"model.norm.weight": torch.full((16,), 1.5)})
    model = load_model(folder)
    assert model.final_norm.weight.dtype == torch.float32
    assert model.embedding.tokens.weight.dtype == torch.float16


def test_weights_are_read_when_they_are_asked_for(tmp_path: Path) -> None:
    folder = saved(tmp_path, TINY_GPT)
    weights = read_weights(folder)
    model = build(TINY_GPT, seed=4)
    assert set(weights) == set(model.state_dict())
    assert len(weights) == len(model.state_dict())
    key = "layers.1.attention.k.weight"
    assert torch.equal(weights[key], model.state_dict()[key])
    assert not weights.keys() & {"lm_head.weight"}


def test_what_is_loaded_does_not_hang_on_the_file(tmp_path: Path) -> None:
    folder = saved(tmp_path)
    model, tokens = load_model(folder), tokens_for(TINY)
    before = model(tokens)
    shutil.rmtree(folder)
    assert torch.equal(model(tokens), before)


# --- writing ----------------------------------------------------------------------------


def test_nothing_is_written_over(tmp_path: Path) -> None:
    folder = saved(tmp_path)
    with pytest.raises(InputError, match="nothing is overwritten"):
        save_model(build(TINY), folder)
    (tmp_path / "empty").mkdir()
    save_model(build(TINY), tmp_path / "empty")
    with pytest.raises(InputError, match="max_shard_bytes=0"):
        save_model(build(TINY), tmp_path / "new", max_shard_bytes=0)


def test_a_link_to_an_empty_folder_is_followed(tmp_path: Path) -> None:
    (tmp_path / "there").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "there")
    save_model(build(TINY), tmp_path / "link")
    assert (tmp_path / "there" / "config.json").is_file()


def test_a_name_that_no_disk_takes_is_said(tmp_path: Path) -> None:
    with pytest.raises(WriteFailed, match="name too long"):
        save_model(build(TINY), tmp_path / ("x" * 300))


def test_weights_are_for_whoever_may_read_a_new_file(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        save_model(build(TINY), tmp_path / "out")
    finally:
        os.umask(before)
    modes = {path.name: path.stat().st_mode & 0o777 for path in (tmp_path / "out").iterdir()}
    assert set(modes.values()) == {0o640}, modes
    assert (tmp_path / "out").stat().st_mode & 0o777 == 0o750


@pytest.mark.parametrize("name", ["save_file", "_write_text", "sync_folder"])
def test_a_full_disk_leaves_no_folder(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(writing, name, full)
    with pytest.raises(WriteFailed, match="No space left"):
        save_model(build(TINY), tmp_path / "model")
    assert not list(tmp_path.iterdir())


def test_a_spec_that_no_family_says_is_refused(tmp_path: Path) -> None:
    padded = gpt(
        "p", d_model=16, n_layers=1, n_heads=4, vocab_size=31, n_rows=32, max_seq_len=16
    )  # fmt: skip
    with pytest.raises(InputError, match=r"embedding\.n_rows=32"):
        save_model(build(padded), tmp_path / "model")


def test_opt_with_a_narrow_embedding_is_named_whole() -> None:
    """Its head projects before it is tied: no model of ours is needed for its names."""
    shape = BARE | {"ffn_dim": 50, "word_embed_proj_dim": 20, "do_layer_norm_before": False}
    arch = read_hf({"model_type": "opt"} | shape, "x").arch
    paired = pairs(table_of({"model_type": "opt"}, arch), arch, counted_shapes(arch))
    theirs = {name: shape for pair in paired for name, shape in pair.theirs.items()}
    assert theirs["model.decoder.project_in.weight"] == (48, 20)
    assert theirs["model.decoder.project_out.weight"] == (20, 48)
