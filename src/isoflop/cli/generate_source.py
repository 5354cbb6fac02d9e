"""What `isoflop generate` writes with: a run, a Hugging Face folder, or a spec with random weights."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from isoflop.arch import Arch
from isoflop.arch.foreign import parse_json, read_file
from isoflop.cli.output import note
from isoflop.count import Precision, Workload
from isoflop.count.memory_cache import bytes_kv_cache
from isoflop.count.memory_weights import bytes_weights
from isoflop.errors import Infeasible, InputError, Problem
from isoflop.infer.read import Model
from isoflop.infer.tokens import TOKENIZER, ByteTokenizer, FileTokenizer, Tokenizer
from isoflop.model import build
from isoflop.quantity.units import format_bytes
from isoflop.runs.run import MANIFEST

DTYPES = {
    Precision.FP32: torch.float32,
    Precision.BF16: torch.bfloat16,
    Precision.FP16: torch.float16,
}
#: What T5 begins its answers with, its padding token (Raffel 2020's code); a spec does not say it.
T5_START = 0


@dataclass(frozen=True, slots=True)
class Source:
    """A model that is not loaded yet, and what is known of its tokens.

    `precision` is what its weights will have; `tokenizer` None where nothing says what tokens mean.
    """

    origin: Literal["run", "folder", "spec"]
    arch: Arch
    load: Callable[[], Model]
    precision: Precision
    tokenizer: Tokenizer | None
    stop_tokens: tuple[int, ...] = ()
    start: tuple[int, ...] = ()


def find_source(text: str, precision: Precision | None) -> Source:
    """A folder is a run or holds weights; whatever else names a model is a spec.

    Raises:
        InputError: it names nothing that can write.
    """
    path = Path(text)
    if (path / MANIFEST).is_file():
        return _run(path, precision)
    return _folder(path, precision) if path.is_dir() else _spec(text, precision)


def check_memory(source: Source, work: Workload) -> None:
    """Refuse what cannot be held: the system would end the process without a word.

    Raises:
        Infeasible: this machine has less memory than weights and cache; the message has both.
    """
    needed = {
        "of weights": bytes_weights(source.arch, source.precision).value,
        "of key-value cache": bytes_kv_cache(source.arch, work, source.precision).value,
    }
    there = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if sum(needed.values()) > there:
        parts = " and ".join(f"{format_bytes(size)} {what}" for what, size in needed.items())
        raise Infeasible(
            f"{source.arch.name} takes {parts}, more than this machine's {format_bytes(there)}; "
            "try a smaller model, or --precision bf16"
        )


def _run(path: Path, precision: Precision | None) -> Source:
    from isoflop.runs.run import Run
    from isoflop.train.data import SEPARATOR
    from isoflop.train.trained import arch_of, load_trained

    def load() -> Model:
        trained = load_trained(path)
        for line in trained.notes:
            note(line)
        note(f"{path}: step {trained.step:,}")
        return trained.model if precision is None else trained.model.to(DTYPES[precision])

    arch = arch_of(Run.read(path).manifest.identity, str(path))
    kept = precision or Precision.FP32
    return Source("run", arch, load, kept, ByteTokenizer(), stop_tokens=tuple(SEPARATOR))


def _folder(path: Path, precision: Precision | None) -> Source:
    from isoflop.arch.hf import read_hf
    from isoflop.model.weights import load_model
    from isoflop.model.weights.folder import open_folder

    opened = open_folder(path)
    arch = read_hf(dict(opened.config), path.resolve().name).arch
    said = _generation_config(path)
    ends, starts = (
        _tokens(said.get(key, opened.config.get(key)), key, path)
        for key in ("eos_token_id", "decoder_start_token_id")
    )
    dtype = None if precision is None else DTYPES[precision]
    tokenizer = FileTokenizer(path) if (path / TOKENIZER).is_file() else None
    return Source(
        "folder",
        arch,
        lambda: load_model(path, dtype=dtype).eval(),
        precision or _stored([entry.dtype for entry in opened.entries.values()]),
        tokenizer,
        ends,
        starts if arch.encoder is not None else (),
    )


def _generation_config(path: Path) -> dict[str, Any]:
    file = path / "generation_config.json"
    return parse_json(read_file(file), str(file)) if file.is_file() else {}


def _tokens(value: object, key: str, path: Path) -> tuple[int, ...]:
    """One token, several or none, as configs say it."""
    listed = value if isinstance(value, list) else [] if value is None else [value]
    if not all(isinstance(x, int) and not isinstance(x, bool) for x in listed):
        problem = Problem(key, value, "is a token, a list of tokens, or null")
        raise InputError(str(path), [problem])
    return tuple(listed)


def _stored(dtypes: list[torch.dtype | None]) -> Precision:
    """What most tensors are kept in."""
    known = Counter(dtype for dtype in dtypes if dtype in DTYPES.values())
    most = known.most_common(1)
    names = {dtype: precision for precision, dtype in DTYPES.items()}
    return names[most[0][0]] if most and most[0][0] is not None else Precision.FP32


def _spec(text: str, precision: Precision | None) -> Source:
    from isoflop.cli.options import load_model

    arch, kept = load_model(text), precision or Precision.FP32
    note(f"{text}: untrained, random weights: what it writes means nothing")
    start = () if arch.encoder is None else (T5_START,)
    if start:
        note(f"{text}: an answer begins with token {T5_START}, as T5's does")

    def load() -> Model:
        return build(arch, dtype=DTYPES[kept]).eval()

    return Source("spec", arch, load, kept, None, start=start)
