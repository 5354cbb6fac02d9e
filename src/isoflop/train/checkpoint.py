"""Checkpoints: whole or absent, and never silently damaged.

    checkpoints/step-00000100/model.safetensors      weights and buffers, by their names
                              optimizer.safetensors  AdamW's moments, as moment:weight
                              checkpoint.json        step, run, SHA-256 and bytes of each file

safetensors loads a flipped bit without a word, so every file is checked against its SHA-256
before it is loaded, and checkpoint.json against its own. A folder is written beside under
another name, forced to the disk, and renamed; the newest `KEPT` stay. Nothing is unpickled.

No random state is saved: the loop seeds each step from (seed, step).
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import tempfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors.torch import load_file
from safetensors.torch import save as to_safetensors
from torch import Tensor, nn
from torch.optim import Optimizer

from isoflop.errors import Fault, InputError, Problem
from isoflop.runs.durable import UNFINISHED, WriteFailed, sweep, sync_folder, write_whole
from isoflop.runs.run import SCHEMA
from isoflop.runs.text import Json, decode, encode

FOLDER = "checkpoints"
MODEL, OPTIMIZER, MANIFEST = "model.safetensors", "optimizer.safetensors", "checkpoint.json"
KEPT = 2
_NAME = re.compile(r"step-([0-9]{8,12})")


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A checkpoint whose bytes have been checked.

    `run` is the fingerprint of the run's identity; `counters` are the loop's own few numbers.
    """

    path: Path
    step: int
    run: str
    counters: Mapping[str, int]


@dataclass(frozen=True, slots=True)
class Latest:
    """The newest checkpoint that is whole, and why each newer one is not."""

    checkpoint: Checkpoint | None
    damaged: Mapping[Path, str] = field(default_factory=dict)


class Damaged(InputError):
    """A checkpoint is not what was written."""

    def __init__(self, path: Path, name: str, rule: str) -> None:
        super().__init__(str(path), [Problem(name, "damaged", rule)])


def save(
    run_dir: Path,
    *,
    step: int,
    run: str,
    model: nn.Module,
    optimizer: Optimizer,
    counters: Mapping[str, int],
) -> Path:
    """Write a checkpoint, then remove all but the newest `KEPT`.

    Raises:
        WriteFailed: no room; the checkpoints before are intact.
    """
    folder = run_dir / FOLDER
    target = folder / f"step-{step:08}"
    try:
        folder.mkdir(mode=0o700, exist_ok=True)
        unfinished = Path(tempfile.mkdtemp(prefix=UNFINISHED, dir=folder))
    except OSError as error:
        raise WriteFailed(target, 0, error) from error
    try:
        files = _write(unfinished, model, optimizer)
        manifest = {"schema": SCHEMA, "step": step, "run": run, "files": files,
                    "counters": dict(counters)}  # fmt: skip
        write_whole(unfinished / MANIFEST, encode(_sealed(manifest)))
        if target.exists():  # a damaged one that was not set aside
            shutil.rmtree(target)
        os.rename(unfinished, target)  # noqa: PTH104 - the call a crash test intercepts
        sync_folder(folder)
    except OSError as error:
        raise WriteFailed(target, 0, error) from error
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    for old in _by_step(folder)[KEPT:]:
        shutil.rmtree(old)
    return target


def latest(run_dir: Path) -> Latest:
    """Find the newest whole checkpoint; every byte of it is read and checked."""
    damaged: dict[Path, str] = {}
    for path in _by_step(run_dir / FOLDER):
        try:
            return Latest(verify(path), damaged)
        except Damaged as error:
            damaged[path] = str(error)
    return Latest(None, damaged)


def verify(path: Path) -> Checkpoint:
    """Check all files of a checkpoint against what was written.

    Raises:
        Damaged: names the file that is missing, cut or changed.
    """
    manifest = _read_manifest(path)
    for name in (MODEL, OPTIMIZER):
        written = manifest["files"][name]
        try:
            with (path / name).open("rb") as file:
                n_bytes = os.fstat(file.fileno()).st_size
                digest = hashlib.file_digest(file, "sha256").hexdigest()
        except OSError as error:
            raise Damaged(path, name, f"can be read: {error.strerror}") from None
        if n_bytes != written["bytes"]:
            raise Damaged(path, name, f"has {written['bytes']:,} bytes, not {n_bytes:,}")
        if digest != written["sha256"]:
            raise Damaged(
                path, name, f"has the SHA-256 {written['sha256'][:16]}… it was written with"
            )
    return Checkpoint(path, manifest["step"], manifest["run"], manifest["counters"])


def load(checkpoint: Checkpoint, model: nn.Module, optimizer: Optimizer | None = None) -> None:
    """Put a checked checkpoint's bits into a model of the same arch, and into its optimizer."""
    weights = load_file(checkpoint.path / MODEL)
    own = tensors_of(model)
    if {n: t.shape for n, t in weights.items()} != {n: t.shape for n, t in own.items()}:
        odd = sorted(weights.keys() ^ own.keys()) or [
            n for n in own if own[n].shape != weights[n].shape
        ]
        problem = Problem("model", odd[0], "has the names and shapes of the checkpoint")
        raise InputError(str(checkpoint.path), [problem])
    with torch.no_grad():
        for name, tensor in own.items():
            tensor.copy_(weights[name])
    if optimizer is not None:
        moments = load_file(checkpoint.path / OPTIMIZER)
        parameters = dict(model.named_parameters())
        for key, tensor in moments.items():
            moment, _, name = key.partition(":")
            parameter = parameters[name]
            optimizer.state[parameter][moment] = tensor.to(parameter.device)


def set_aside(paths: Iterable[Path]) -> None:
    """Rename damaged checkpoints, so that they are neither loaded nor counted as kept."""
    for path in paths:
        aside = path.with_name(f"damaged-{path.name}")
        shutil.rmtree(aside, ignore_errors=True)
        path.rename(aside)


def clean(run_dir: Path) -> None:
    """Remove what a killed save left; only while holding the run's lock."""
    sweep(run_dir / FOLDER)


def tensors_of(model: nn.Module) -> dict[str, Tensor]:
    """Weights and lasting buffers by name; a tied weight once, under its first name."""
    lasting = model.state_dict(keep_vars=True)
    buffers = {name: b for name, b in model.named_buffers() if name in lasting}
    return {name: p.detach() for name, p in model.named_parameters()} | buffers


def moments_of(model: nn.Module, optimizer: Optimizer) -> dict[str, Tensor]:
    """The optimizer's state tensors, named moment:weight."""
    return {
        f"{moment}:{name}": tensor
        for name, parameter in model.named_parameters()
        for moment, tensor in optimizer.state.get(parameter, {}).items()
    }


def _write(folder: Path, model: nn.Module, optimizer: Optimizer) -> Json:
    """Write the tensors; returns each file's size and SHA-256, taken before it was written."""
    files: Json = {}
    for name, tensors in (
        (MODEL, tensors_of(model)),
        (OPTIMIZER, moments_of(model, optimizer)),
    ):
        data = to_safetensors({key: tensor.contiguous() for key, tensor in tensors.items()})
        write_whole(folder / name, data)
        files[name] = {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    return files


def _sealed(manifest: Json) -> Json:
    """A manifest with the SHA-256 of its own text."""
    plain = {key: value for key, value in manifest.items() if key != "sha256"}
    return plain | {"sha256": hashlib.sha256(encode(plain)).hexdigest()}


def _read_manifest(path: Path) -> Json:
    try:
        data = (path / MANIFEST).read_bytes()
        manifest = decode(data)
        whole = encode(_sealed(manifest)) == data
    except OSError as error:
        raise Damaged(path, MANIFEST, f"can be read: {error.strerror}") from None
    except ValueError:
        raise Damaged(path, MANIFEST, "is JSON") from None
    if not whole:
        raise Damaged(path, MANIFEST, "has the SHA-256 it was written with")
    if manifest.get("schema") != SCHEMA:
        raise Fault(f"{path}: a checkpoint of schema {manifest.get('schema')}, this is {SCHEMA}")
    return manifest


def _by_step(folder: Path) -> list[Path]:
    """Checkpoints, newest first; other names are not ours and are left alone."""
    if not folder.is_dir():
        return []
    found = [(int(m[1]), p) for p in folder.iterdir() if (m := _NAME.fullmatch(p.name))]
    return [path for _, path in sorted(found, reverse=True)]
