"""The header of a safetensors file: what it says it holds, checked against what is there.

A file is 8 bytes that say the length of a JSON object, the object, and the tensors' bytes, end
to end (github.com/huggingface/safetensors, README, "Format"). The library checks most of this
too, but not that a name is given once, and it does not say which file was cut and where.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from isoflop.arch.foreign import Bounds, open_file, parse_json
from isoflop.errors import InputError, Problem

#: DeepSeek-V3's largest shard names 600 tensors in 70 kB; one file of all would take 10 MB.
BOUNDS = Bounds(n_bytes=1 << 24, n_keys=500_000, n_pieces=5_000_000)
#: Those that weights are kept in. Others are quantized, or no weights.
DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
#: Bytes of each kind, the others' too, so that a file which holds some is measured right.
BYTES = {kind: dtype.itemsize for kind, dtype in DTYPES.items()} | {
    **dict.fromkeys(("BOOL", "U8", "I8", "F8_E4M3", "F8_E5M2"), 1),
    **dict.fromkeys(("U16", "I16"), 2),
    **dict.fromkeys(("U32", "I32"), 4),
    **dict.fromkeys(("U64", "I64"), 8),
}
MAX_AXES = 8
LENGTH = 8  # bytes of the header's length


@dataclass(frozen=True, slots=True)
class Entry:
    """A tensor of a file."""

    path: Path
    kind: str
    shape: torch.Size

    @property
    def dtype(self) -> torch.dtype | None:
        """None where it is no number that weights are kept in."""
        return DTYPES.get(self.kind)


def bytes_of_file(tensors: Mapping[str, torch.Tensor]) -> int:
    """The size of the file that `save_file` writes of tensors, which need not be anywhere.

    The library writes wider kinds first, then by name, and fills the header up with spaces to a
    multiple of 8 bytes (github.com/huggingface/safetensors, safetensors/src/tensor.rs, prepare).
    """
    kinds = {dtype: kind for kind, dtype in DTYPES.items()}
    said: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, tensor in sorted(tensors.items(), key=lambda x: (-x[1].element_size(), x[0])):
        begin, end = end, end + tensor.numel() * tensor.element_size()
        place = {"shape": list(tensor.shape), "data_offsets": [begin, end]}
        said[name] = {"dtype": kinds[tensor.dtype], **place}
    header = len(json.dumps(said, separators=(",", ":"), ensure_ascii=False).encode())
    return LENGTH + -(-header // LENGTH) * LENGTH + end


def read_header(path: Path) -> dict[str, Entry]:
    """The tensors that a file says it holds, all of whose bytes are there.

    Raises:
        InputError: not a safetensors file, one that was cut, or one that contradicts itself.
    """
    with open_file(path) as file:
        n_bytes = os.fstat(file.fileno()).st_size
        length = int.from_bytes(file.read(LENGTH), "little")
        most = min(n_bytes - LENGTH, BOUNDS.n_bytes)
        if not 2 <= length <= most:
            rule = f"is from 2 to {max(most, 2):,}: the file has {n_bytes:,} bytes"
            raise InputError(str(path), [Problem("length of the header", length, rule)])
        table = parse_json(file.read(length), str(path), BOUNDS)
    table.pop("__metadata__", None)
    spans = {name: _span(said) for name, said in table.items()}
    problems = [
        Problem(name, table[name], "has a dtype, a shape, and data_offsets that fit them")
        for name, span in spans.items()
        if span is None
    ]
    problems = problems or list(_misfits(spans, n_bytes - LENGTH - length))
    if problems:
        raise InputError(str(path), problems[:20])
    return {name: Entry(path, x["dtype"], torch.Size(x["shape"])) for name, x in table.items()}


def _span(said: Any) -> tuple[int, int] | None:
    """Where a tensor's bytes begin and end; None where its entry does not hold together."""
    if not isinstance(said, dict) or said.keys() != {"dtype", "shape", "data_offsets"}:
        return None
    kind, shape, offsets = said["dtype"], said["shape"], said["data_offsets"]
    if not (_are_counts(shape) and _are_counts(offsets) and len(offsets) == 2):
        return None
    size = BYTES.get(kind) if isinstance(kind, str) else None
    if size is None or offsets[1] - offsets[0] != math.prod(shape) * size:
        return None
    return offsets[0], offsets[1]


def _are_counts(value: Any) -> bool:
    return (
        isinstance(value, list)
        and len(value) <= MAX_AXES
        and all(isinstance(x, int) and not isinstance(x, bool) and x >= 0 for x in value)
    )


def _misfits(spans: Mapping[str, tuple[int, int] | None], n_bytes: int) -> Iterator[Problem]:
    """Tensors that do not lie end to end, or a file of another length than they have."""
    end = 0
    for name, span in sorted(spans.items(), key=lambda item: item[1] or (0, 0)):
        if span is None or span[0] != end:
            yield Problem(name, span, f"begins at byte {end:,}, where the one before it ends")
            return
        end = span[1]
    if end != n_bytes:
        rule = f"is {end:,}: the header says so; the file was cut, or is another one"
        yield Problem("bytes of tensors", f"{n_bytes:,}", rule)
