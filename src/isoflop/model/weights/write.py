"""A model to a Hugging Face folder, which is there whole or not at all."""

from __future__ import annotations

import errno
import json
import os
import shutil
import tempfile
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from isoflop.arch.hf import to_hf
from isoflop.errors import InputError, Problem
from isoflop.model.decoder import Decoder
from isoflop.model.encoder_decoder import EncoderDecoder
from isoflop.model.weights.folder import CONFIG, INDEX, SINGLE
from isoflop.model.weights.read import shapes_of
from isoflop.model.weights.table import Pair, pairs
from isoflop.model.weights.tables.registry import table_of
from isoflop.runs.durable import UNFINISHED, WriteFailed, sync_folder

#: transformers' own default.
MAX_SHARD_BYTES = 5_000_000_000
#: The spec knows no special tokens; a class's own defaults may lie beyond a small vocabulary.
NO_TOKENS = {"pad_token_id": None, "bos_token_id": None, "eos_token_id": None}


def save_model(
    model: Decoder | EncoderDecoder,
    folder: Path | str,
    *,
    dtype: torch.dtype | None = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    beside: Mapping[str, str] | None = None,
) -> None:
    """Write config.json and safetensors that transformers' `from_pretrained` reads.

    A tied head is left out, as transformers leaves it. One shard is held in memory at a time.

    Args:
        folder: new or empty; it appears when all of it is on the disk.
        dtype: what to cast every trained weight to; None keeps each as it is.
        max_shard_bytes: a file's tensors have at most so many bytes, or are one tensor.
        beside: the text of further files, by name.

    Raises:
        InputError: no family can say the model's spec, or the folder is not empty.
        WriteFailed: the disk is full; nothing is left of what was written.
    """
    config = to_hf(model.arch)
    table = table_of(config, model.arch)
    paired = pairs(table, model.arch, shapes_of(model))
    trained = [] if dtype is None else [name for name, _ in model.named_parameters()]
    tensors = model.state_dict()
    kept = tensors["embedding.tokens.weight"].dtype if dtype is None else dtype
    said = without_tokens(config) | {"torch_dtype": str(kept).removeprefix("torch.")}
    dtypes = {name: x.dtype for name, x in tensors.items()} | dict.fromkeys(trained, kept)
    write_folder(Path(folder), said, paired, tensors, dtypes, max_shard_bytes, beside)


def without_tokens(config: Mapping[str, Any]) -> dict[str, Any]:
    """A config that names no special tokens, nor does that of its language model."""
    said = {**config, **NO_TOKENS}
    if "text_config" in config:
        said["text_config"] = config["text_config"] | NO_TOKENS
    return said


def tensors_of_files(
    model: Decoder | EncoderDecoder, *, max_shard_bytes: int = MAX_SHARD_BYTES
) -> list[dict[str, Tensor]]:
    """The tensors of each file that `save_model` would write, without their numbers.

    Raises:
        InputError: no family can say the model's spec.
    """
    table = table_of(to_hf(model.arch), model.arch)
    paired = pairs(table, model.arch, shapes_of(model))
    dtypes = {name: x.dtype for name, x in model.state_dict().items()}
    unborn = {
        name: torch.empty(shape, dtype=dtypes[next(iter(pair.ours))], device="meta")
        for pair in paired
        for name, shape in pair.theirs.items()
    }
    shards = _shards(paired, dtypes, max_shard_bytes)
    return [{name: unborn[name] for name in names} for names in shards]


def write_folder(
    folder: Path,
    config: Mapping[str, Any],
    paired: Collection[Pair],
    tensors: Mapping[str, Tensor],
    dtypes: Mapping[str, torch.dtype],
    max_shard_bytes: int = MAX_SHARD_BYTES,
    beside: Mapping[str, str] | None = None,
) -> None:
    """Write a config and our tensors under the family's names, each as its `dtypes` says.

    `beside` is the text of further files, by name.

    Raises:
        InputError, WriteFailed: as `save_model`.
    """
    folder = _checked_target(folder, max_shard_bytes)
    n_bytes = sum(tensor.nbytes for tensor in tensors.values())
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        unfinished = Path(tempfile.mkdtemp(prefix=UNFINISHED, dir=folder.parent))
    except OSError as error:
        raise WriteFailed(folder, n_bytes, error) from error
    try:
        _write_tensors(unfinished, paired, tensors, dtypes, max_shard_bytes)
        _write_text(unfinished / CONFIG, _json(config))
        for name, text in (beside or {}).items():
            _write_text(unfinished / name, text)
        _open_as(unfinished, unfinished / CONFIG)
        sync_folder(unfinished)
        os.replace(unfinished, folder)  # noqa: PTH105 - the call a crash test intercepts
        sync_folder(folder.parent)
    except SafetensorError as error:
        raise WriteFailed(folder, n_bytes, OSError(errno.EIO, str(error))) from error
    except OSError as error:
        raise WriteFailed(folder, n_bytes, error) from error
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def _open_as(folder: Path, plain: Path) -> None:
    """For whoever may read a plain new file: temporary folders and safetensors are their owner's."""
    mode = plain.stat().st_mode & 0o666
    for file in folder.iterdir():
        file.chmod(mode)
    folder.chmod(mode | 0o300 | (mode & 0o444) >> 2)


def _checked_target(folder: Path, max_shard_bytes: int) -> Path:
    """The folder, or where a link leads: no folder can be put in a link's place."""
    problems = []
    if max_shard_bytes < 1:
        problems.append(Problem("max_shard_bytes", max_shard_bytes, "is at least 1"))
    try:
        target = folder.resolve() if folder.is_symlink() else folder
        free = not target.exists() or (target.is_dir() and not any(target.iterdir()))
    except OSError as error:
        raise WriteFailed(folder, 0, error) from error
    if not free:
        problems.append(Problem("folder", str(folder), "is new or empty: nothing is overwritten"))
    if problems:
        raise InputError(str(folder), problems)
    return target


def _write_tensors(
    folder: Path,
    paired: Collection[Pair],
    tensors: Mapping[str, Tensor],
    dtypes: Mapping[str, torch.dtype],
    max_shard_bytes: int,
) -> None:
    """One file, or shards of at most so many bytes and the index that places every tensor."""
    shards = list(_shards(paired, dtypes, max_shard_bytes))
    if len(shards) == 1:
        files = [SINGLE]
    else:
        files = [f"model-{i + 1:05}-of-{len(shards):05}.safetensors" for i in range(len(shards))]
    stored = _stored(paired, tensors, dtypes)
    for file, names in zip(files, shards, strict=True):
        held = dict(next(stored) for _ in names)
        save_file(held, folder / file, metadata={"format": "pt"})
        _sync(folder / file)
    if len(shards) > 1:
        total = sum(size for names in shards for size in names.values())
        places = {name: file for file, names in zip(files, shards, strict=True) for name in names}
        index = {"metadata": {"total_size": total}, "weight_map": places}
        _write_text(folder / INDEX, _json(index))


def _shards(
    paired: Collection[Pair],
    dtypes: Mapping[str, torch.dtype],
    max_shard_bytes: int,
) -> Iterator[dict[str, int]]:
    """Each shard's tensors with their bytes, in the order in which they are written."""
    shard: dict[str, int] = {}
    for pair in paired:
        kept = dtypes[next(iter(pair.ours))]
        for name, shape in pair.theirs.items():
            size = shape.numel() * kept.itemsize
            if shard and sum(shard.values()) + size > max_shard_bytes:
                yield shard
                shard = {}
            shard[name] = size
    yield shard


def _stored(
    paired: Collection[Pair], tensors: Mapping[str, Tensor], dtypes: Mapping[str, torch.dtype]
) -> Iterator[tuple[str, Tensor]]:
    """The family's tensors, in the order of the table."""
    for pair in paired:
        ours = tuple(tensors[name].detach().to("cpu", dtypes[name]) for name in pair.ours)
        for name, tensor in zip(pair.theirs, pair.join(ours), strict=True):
            yield name, tensor.contiguous()


def _json(value: Mapping[str, Any]) -> str:
    return json.dumps(value, indent=2) + "\n"


def _write_text(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8")
    _sync(path)


def _sync(path: Path) -> None:
    with path.open("rb") as file:
        os.fsync(file.fileno())
