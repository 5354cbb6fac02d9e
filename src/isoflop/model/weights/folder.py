"""A folder of safetensors: its config, and which file holds which tensor.

A folder may come from anywhere. Nothing in it is unpickled, no weights outside of it are read,
and nothing is allocated for what it merely claims.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import Any

from isoflop.arch.foreign import Bounds, parse_json, read_file
from isoflop.errors import MISSING, InputError, Problem
from isoflop.model.weights.header import Entry, read_header

CONFIG = "config.json"
SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
#: DeepSeek-V3's index has 92,000 names in 9 MB.
BOUNDS = Bounds(n_bytes=1 << 26, n_keys=1_000_000, n_pieces=5_000_000)
#: Files that only unpickling reads, which runs what code they hold.
PICKLED = ("*.bin", "*.bin.index.json", "*.pt", "*.pth", "*.ckpt")
#: Keys of a config that say that its weights are not kept as numbers of their own.
QUANTIZED = ("quantization_config", "compression_config")
LISTED = 20


@dataclass(frozen=True, slots=True)
class Folder:
    """A folder as its config and its files' headers say; no tensor has been read."""

    path: Path
    config: Mapping[str, Any]
    entries: Mapping[str, Entry]


def open_folder(path: Path | str) -> Folder:
    """Read the config and the headers, and check that all files are there and whole.

    Raises:
        InputError: no folder of weights, quantized ones, or one that contradicts itself.
    """
    folder = Path(path)
    if not folder.is_dir():
        raise InputError(str(folder), [Problem("path", str(folder), "is a folder")])
    config = parse_json(read_file(folder / CONFIG), str(folder / CONFIG))
    _refuse_quantized(config, str(folder / CONFIG))
    if (folder / SINGLE).is_file():
        entries = read_header(_confined(folder, SINGLE, str(folder)))
    elif (folder / INDEX).is_file():
        entries = _read_shards(folder)
    else:
        raise InputError(str(folder), [_no_weights(folder)])
    return Folder(folder, config, entries)


def _refuse_quantized(config: Mapping[str, Any], where: str) -> None:
    for place, table in (("", config), ("text_config.", config.get("text_config"))):
        for key in QUANTIZED:
            if isinstance(table, Mapping) and table.get(key):
                how = table[key].get("quant_method") if isinstance(table[key], Mapping) else None
                rule = "is absent: quantized weights are packed with scales, and not read"
                hint = "take the model's weights in bf16, fp16 or fp32"
                raise InputError(where, [Problem(f"{place}{key}", how or "given", rule, hint)])


def _no_weights(folder: Path) -> Problem:
    pickled = sorted(x.name for pattern in PICKLED for x in folder.glob(pattern))
    if not pickled:
        return Problem(SINGLE, MISSING, f"is in the folder, or {INDEX} with its shards")
    rule = "is safetensors: a pickled file runs the code in it when it is read"
    hint = "where you trust it: load it with transformers, and save_pretrained writes safetensors"
    return Problem("weights", pickled[0], rule, hint)


def _read_shards(folder: Path) -> dict[str, Entry]:
    where = str(folder / INDEX)
    index = parse_json(read_file(folder / INDEX, BOUNDS.n_bytes), where, BOUNDS)
    places = index.get("weight_map")
    if not isinstance(places, dict) or not all(isinstance(x, str) for x in places.values()):
        problem = Problem("weight_map", type(places).__name__, "names each tensor's file")
        raise InputError(where, [problem])
    names = sorted(set(places.values()))
    paths = {name: _confined(folder, name, where) for name in names}
    if missing := [name for name, path in paths.items() if not path.is_file()]:
        problems = [Problem(name, MISSING, "is in the folder") for name in missing[:LISTED]]
        raise InputError(where, problems)
    shards = {name: read_header(path) for name, path in paths.items()}
    if problems := list(_contradictions(places, shards)):
        raise InputError(where, problems[:LISTED])
    return {name: shards[file][name] for name, file in places.items()}


def _confined(folder: Path, name: str, where: str) -> Path:
    """A file of the folder itself, by its plain name.

    In Hugging Face's cache a folder `snapshots/REVISION` holds links into the `blobs` beside
    `snapshots`; those are followed.

    Raises:
        InputError: the name leads elsewhere, or the file is a link to elsewhere.
    """
    path = folder / PurePath(name).name
    plain = PurePath(name).name == name and name.endswith(".safetensors") and name.isprintable()
    if not plain or "\\" in name:
        rule = "is the plain name of a .safetensors file in the folder"
        raise InputError(where, [Problem("weight_map", name, rule)])
    whole = folder.resolve()
    blobs = [whole.parents[1] / "blobs"] if whole.parent.name == "snapshots" else []
    if path.resolve().parent not in (whole, *blobs):
        rule, hint = "is a file in the folder itself", "it is a link to elsewhere: copy it (cp -L)"
        raise InputError(where, [Problem("file", name, rule, hint)])
    return path


def _contradictions(
    places: Mapping[str, str], shards: Mapping[str, Mapping[str, Entry]]
) -> Iterator[Problem]:
    """Tensors that the index and the shards place differently."""
    for name, file in places.items():
        if name not in shards[file]:
            yield Problem(name, MISSING, f"is in {file}, where the index places it")
    for file, held in shards.items():
        for name in held:
            if places.get(name) != file:
                yield Problem(name, file, f"is in {places.get(name, 'the index, or in no shard')}")
