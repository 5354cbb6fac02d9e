"""Folders of weights from anywhere: refused with a place, never run, never followed outside."""

from __future__ import annotations

import json
import os
import pickle
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from isoflop.arch import llama, read_hf
from isoflop.errors import InputError
from isoflop.model import build
from isoflop.model.weights import header as header_module
from isoflop.model.weights import load_model, save_model
from isoflop.model.weights.header import BOUNDS, read_header
from isoflop.model.weights.table import pairs
from isoflop.model.weights.tables.registry import table_of

TINY = llama(
    "tiny", d_model=8, n_layers=2, n_heads=2, d_ff=12, vocab_size=11, max_seq_len=8, tied=True
)
QUIET = settings(deadline=None, suppress_health_check=list(HealthCheck), max_examples=60)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    save_model(build(TINY), tmp_path / "model")
    return tmp_path / "model"


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    save_model(build(TINY), tmp_path / "model", max_shard_bytes=1_000)
    return tmp_path / "model"


def refused(folder: Path) -> str:
    with pytest.raises(InputError) as caught:
        load_model(folder)
    return str(caught.value)


def edit(path: Path, **keys: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | keys))


def with_header(path: Path, header: bytes, n_bytes: int = 0) -> None:
    path.write_bytes(len(header).to_bytes(8, "little") + header + bytes(n_bytes))


# --- what kind of folder it is ----------------------------------------------------------


class Trap:
    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return os.mkdir, ("sprung",)


def test_pickled_weights_are_refused_unread_with_how_to_convert_them(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(folder.parent)
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps(Trap()))
    said = refused(folder)
    assert "pytorch_model.bin" in said
    assert "save_pretrained" in said
    assert not Path("sprung").exists()


def test_what_is_no_folder_of_weights_is_said(folder: Path, tmp_path: Path) -> None:
    assert "be a folder" in refused(tmp_path / "absent")
    assert "be a folder" in refused(folder / "config.json")
    (folder / "model.safetensors").unlink()
    assert "model.safetensors is missing" in refused(folder)
    (folder / "config.json").unlink()
    assert "config.json" in refused(folder)


@pytest.mark.parametrize("key", ["quantization_config", "compression_config"])
def test_quantized_weights_are_refused_with_the_reason(folder: Path, key: str) -> None:
    edit(folder / "config.json", **{key: {"quant_method": "mxfp4"}})
    said = refused(folder)
    assert "mxfp4" in said
    assert "quantized" in said


def test_an_unknown_type_and_an_unknown_key_are_refused(folder: Path) -> None:
    edit(folder / "config.json", n_future_experts=3)
    assert "n_future_experts" in refused(folder)
    load_model(folder, ignored_keys=["n_future_experts"])
    edit(folder / "config.json", model_type="lama")
    assert "did you mean llama" in refused(folder)


def test_a_type_that_has_no_table_is_refused() -> None:
    with pytest.raises(InputError, match="be a type whose tensors are read"):
        table_of({"model_type": "whisper"}, TINY)


# --- tensors that do not fit the config -------------------------------------------------


def test_all_that_does_not_fit_is_listed_with_near_names(folder: Path) -> None:
    state = load_file(folder / "model.safetensors")
    state["model.layers.0.self_attn.q_porj.weight"] = state.pop(
        "model.layers.0.self_attn.q_proj.weight"
    )
    state["model.norm.weight"] = torch.zeros(9)
    state["model.layers.1.mlp.up_proj.weight"] = torch.zeros(12, 8, dtype=torch.int8)
    state["lm_head.bias\x1b[31m"] = torch.zeros(3)
    save_file(state, folder / "model.safetensors")
    lines = refused(folder).splitlines()
    assert len(lines) == 5
    assert "q_proj.weight is missing" in lines[0]
    assert "did you mean model.layers.0.self_attn.q_porj.weight?" in lines[0]
    assert "q_porj.weight=[8, 8]: must be a tensor of the model" in "\n".join(lines)
    assert "model.norm.weight=[9]: must have the shape [8]" in "\n".join(lines)
    assert "up_proj.weight=I8" in "\n".join(lines)
    assert "\x1b" not in "\n".join(lines)


def test_a_long_list_is_cut_and_counted(folder: Path) -> None:
    edit(folder / "config.json", num_hidden_layers=9)
    lines = refused(folder).splitlines()
    assert len(lines) == 21
    assert "43 more" in lines[-1]  # 7 layers of 9 tensors, 20 of them listed


def test_more_layers_than_there_are_tensors_are_refused_before_they_are_built(folder: Path) -> None:
    edit(folder / "config.json", num_hidden_layers=9_999)
    assert "layers=9999: must be at most 20, the tensors" in refused(folder)


def test_a_billion_experts_are_not_made_for_a_list_of_names() -> None:
    said = {"model_type": "mixtral", "num_local_experts": 10**9, "num_hidden_layers": 2}
    arch = read_hf(said, "x").arch
    name = "layers.0.feed_forward.experts.gate.weight"
    with pytest.raises(InputError, match="1,000,000,000 or more"):
        pairs(
            table_of({"model_type": "mixtral"}, arch),
            arch,
            {name: torch.Size([10**9, 2, 2])},
            most=1_000,
        )


def test_a_config_that_claims_a_huge_model_allocates_nothing(folder: Path) -> None:
    edit(folder / "config.json", vocab_size=10**9, hidden_size=10**9)
    assert "have the shape [1000000000, 1000000000]" in refused(folder)
    edit(folder / "config.json", vocab_size=10**12)
    assert "a tensor that can be stored" in refused(folder)


# --- the header -------------------------------------------------------------------------


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_weights_that_are_no_numbers_are_named(folder: Path, value: float) -> None:
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.0.self_attn.q_proj.weight"][0, 0] = value
    save_file(tensors, folder / "model.safetensors")
    assert "layers.0.attention.q.weight=not finite" in refused(folder)


def test_weights_are_not_cast_to_whole_numbers(folder: Path) -> None:
    with pytest.raises(InputError, match="floating"):
        load_model(folder, dtype=torch.int8)


def entry(shape: list[int], begin: int, end: int, dtype: str = "F32") -> str:
    return json.dumps({"dtype": dtype, "shape": shape, "data_offsets": [begin, end]})


HEADERS = {
    "empty": b"",
    "not JSON": b"{]    ",
    "a list": b"[1, 2]",
    "NaN": b'{"a": NaN}',
    "an entry that is no table": b'{"a": 3}',
    "a name twice": f'{{"a": {entry([1], 0, 4)}, "a": {entry([1], 4, 8)}}}'.encode(),
    "an overlap": f'{{"a": {entry([2], 0, 8)}, "b": {entry([1], 4, 8)}}}'.encode(),
    "a hole": f'{{"a": {entry([1], 0, 4)}, "b": {entry([1], 5, 9)}}}'.encode(),
    "a huge shape": f'{{"a": {entry([2**40, 2**40], 0, 8)}}}'.encode(),
    "a shape that fits but is not there": f'{{"a": {entry([2**40], 0, 2**42)}}}'.encode(),
    "a negative shape": f'{{"a": {entry([-2, -1], 0, 8)}}}'.encode(),
    "offsets backwards": f'{{"a": {entry([2], 8, 0)}}}'.encode(),
    "a boolean shape": b'{"a": {"dtype": "F32", "shape": [true], "data_offsets": [0, 4]}}',
    "too many axes": f'{{"a": {entry([1] * 40, 0, 4)}}}'.encode(),
    "an unknown dtype": f'{{"a": {entry([2], 0, 8, "F3")}}}'.encode(),
    "a dtype that is a list": b'{"a": {"dtype": ["F32"], "shape": [2], "data_offsets": [0, 8]}}',
    "another key": b'{"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8], "x": 1}}',
    "depth": b'{"a": ' + b"[" * 100_000 + b"]" * 100_000 + b"}",
    "digits": b'{"a": ' + b"9" * 100_000 + b"}",
    "bytes left over": f'{{"a": {entry([1], 0, 4)}}}'.encode(),
}


@pytest.mark.parametrize("what", HEADERS)
def test_a_header_that_contradicts_itself_is_refused(folder: Path, what: str) -> None:
    with_header(folder / "model.safetensors", HEADERS[what], 8)
    assert "model.safetensors" in refused(folder)


@pytest.mark.parametrize("length", [0, 1, 2**24 + 1, 2**63, 2**64 - 1])
def test_a_header_of_absurd_length_is_not_read(folder: Path, length: int) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(length.to_bytes(8, "little") + b"{}")
    os.truncate(path, 2**40)  # a hole: the file claims a terabyte and takes nothing
    assert "length of the header" in refused(folder)


def test_a_header_of_more_names_than_any_model_is_refused(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert BOUNDS.n_keys == 500_000
    monkeypatch.setattr(header_module, "BOUNDS", replace(BOUNDS, n_keys=500))
    header = b"{" + b",".join(b'"%d":[]' % i for i in range(600)) + b"}"
    with_header(folder / "model.safetensors", header)
    assert "be among at most 500 keys" in refused(folder)


def test_a_file_that_was_cut_is_told_by_its_bytes(folder: Path) -> None:
    path = folder / "model.safetensors"
    whole = path.read_bytes()
    path.write_bytes(whole[:-100])
    said = refused(folder)
    assert "the file was cut" in said
    held = sum(tensor.nbytes for tensor in load_file_of(whole).values())
    assert f"{held:,}" in said
    assert f"{held - 100:,}" in said
    path.write_bytes(whole[:5])
    assert "length of the header" in refused(folder)


def load_file_of(data: bytes) -> dict[str, torch.Tensor]:
    from safetensors.torch import load

    return load(data)


@QUIET
@given(st.data())
def test_any_change_of_a_header_is_refused_or_reads(tmp_path_factory: Any, data: Any) -> None:
    """No other exception, whatever single bytes of the first few hundred are changed."""
    path = tmp_path_factory.mktemp("fuzz") / "x.safetensors"
    save_file({"a": torch.zeros(2, 3), "b": torch.zeros(4)}, path)
    raw = bytearray(path.read_bytes())
    for _ in range(data.draw(st.integers(1, 3))):
        raw[data.draw(st.integers(0, len(raw) - 41))] = data.draw(st.integers(0, 255))
    path.write_bytes(raw)
    try:
        entries = read_header(path)
    except InputError:
        return
    assert sum(entry.shape.numel() for entry in entries.values()) <= 40


# --- the index --------------------------------------------------------------------------


def place(folder: Path, file: object, name: str = "model.norm.weight") -> None:
    path = folder / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    index["weight_map"][name] = file
    path.write_text(json.dumps(index))


def test_a_sharded_folder_loads(sharded: Path) -> None:
    assert len(list(sharded.glob("*.safetensors"))) > 2
    load_model(sharded)


@pytest.mark.parametrize(
    "file",
    ["../outside.safetensors", "/outside.safetensors", "sub/in.safetensors", "..", ".", "",
     "..\\outside.safetensors", "model.bin", "a\x00.safetensors", "a\n.safetensors", "~"],
)  # fmt: skip
def test_an_index_that_leads_out_of_the_folder_is_refused(sharded: Path, file: str) -> None:
    save_file({"model.norm.weight": torch.ones(8)}, sharded.parent / "outside.safetensors")
    (sharded / "sub").mkdir()
    save_file({"model.norm.weight": torch.ones(8)}, sharded / "sub" / "in.safetensors")
    place(sharded, file)
    assert "be the plain name of a .safetensors file in the folder" in refused(sharded)


def test_a_link_out_of_the_folder_is_refused(sharded: Path) -> None:
    outside = sharded.parent / "outside.safetensors"
    save_file({"model.norm.weight": torch.ones(8)}, outside)
    (sharded / "linked.safetensors").symlink_to(outside)
    place(sharded, "linked.safetensors")
    assert "it is a link to elsewhere" in refused(sharded)


def test_one_file_that_is_a_link_to_elsewhere_is_refused(folder: Path) -> None:
    moved = (folder / "model.safetensors").rename(folder.parent / "moved.safetensors")
    (folder / "model.safetensors").symlink_to(moved)
    assert "it is a link to elsewhere" in refused(folder)


def cached_as(folder: Path, blobs: Path) -> Path:
    """The folder as Hugging Face's cache keeps it: links of a revision into `blobs`."""
    revision = folder.parent / "cache" / "snapshots" / "abc"
    revision.mkdir(parents=True)
    blobs.mkdir()
    for file in folder.iterdir():
        (revision / file.name).symlink_to(file.rename(blobs / f"{file.name}.blob"))
    return revision


def test_the_links_of_hugging_faces_cache_are_followed(folder: Path) -> None:
    load_model(cached_as(folder, folder.parent / "cache" / "blobs"))


def test_links_to_other_blobs_than_the_caches_own_are_refused(folder: Path) -> None:
    assert "it is a link to elsewhere" in refused(cached_as(folder, folder.parent / "blobs"))


def test_a_named_pipe_is_not_waited_for(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    os.mkfifo(folder / "model.safetensors")
    assert "model.safetensors is missing" in refused(folder)


def test_a_shard_that_is_missing_or_holds_other_tensors_is_named(sharded: Path) -> None:
    placed = json.loads((sharded / "model.safetensors.index.json").read_text())["weight_map"]
    place(sharded, "model-00001-of-00001.safetensors")
    assert "model-00001-of-00001.safetensors is missing" in refused(sharded)
    first = min(sharded.glob("model-*.safetensors")).name
    place(sharded, placed["model.norm.weight"])
    place(sharded, first, "model.layers.1.mlp.up_proj.weight")
    said = refused(sharded)
    assert f"model.layers.1.mlp.up_proj.weight is missing: must be in {first}" in said


@pytest.mark.parametrize("value", [None, [], 3, {"model.norm.weight": 3}])
def test_an_index_of_another_form_is_refused(sharded: Path, value: object) -> None:
    edit(sharded / "model.safetensors.index.json", weight_map=value)
    assert "weight_map" in refused(sharded)


def test_a_tensor_that_no_index_names_is_refused(sharded: Path) -> None:
    path = min(sharded.glob("model-*.safetensors"))
    save_file(load_file(path) | {"stray": torch.zeros(1)}, path)
    assert "stray" in refused(sharded)
