"""Bytes to train on: a corpus that two machines can compare, and samples without state.

Tokens are bytes (vocabulary 256). A document is a file; each is followed by one byte 0, the
separator. The corpus is split once, by its documents, and its fingerprint is the SHA-256 of
exactly the bytes of both halves.

A sample is a pure function of (seed, step, slot): `Batches` keeps no position, so a run
resumes anywhere, and any number of workers share a batch by taking slots.
"""

from __future__ import annotations

import hashlib
import os
import sysconfig
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import islice
from pathlib import Path

import torch
from torch import Tensor

from isoflop.errors import InputError, Problem
from isoflop.train.recipe import PYTHON_LIBRARY

VOCAB_SIZE = 256
SEPARATOR = b"\0"

#: One document in 20, or the last twentieth of the bytes, is for validation.
TWENTIETH = 20

#: The default corpus stops after the document that passes this many bytes.
BYTES_DEFAULT_CORPUS = 16_000_000

#: Folders of the standard library that are not its own source.
NOT_LIBRARY = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"}


@dataclass(frozen=True, slots=True, eq=False)
class ByteCorpus:
    """Training and validation bytes, each a one-dimensional uint8 tensor.

    `split` says in words how they were told apart.
    """

    name: str
    train: Tensor
    validation: Tensor
    n_documents: int
    split: str

    @classmethod
    def from_documents(cls, name: str, documents: Sequence[bytes]) -> ByteCorpus:
        """Every 20th document is for validation (the 10th, the 30th, ...), so no document is
        in both halves. With fewer than 20, the last 5 % of the joined bytes is.

        Raises:
            InputError: there are no bytes at all.
        """
        if not any(documents):
            problem = Problem("data", name, "has at least one byte of text")
            raise InputError("corpus", [problem])
        if len(documents) < TWENTIETH:
            whole = _join(documents)
            cut = len(whole) - len(whole) // TWENTIETH
            split = f"the last 5 % of the bytes of {len(documents)} documents"
            return cls(name, whole[:cut], whole[cut:], len(documents), split)
        held_out = range(TWENTIETH // 2 - 1, len(documents), TWENTIETH)
        kept = [document for i, document in enumerate(documents) if i not in held_out]
        split = f"every {TWENTIETH}th of {len(documents)} documents"
        validation = _join(documents[held_out.start :: TWENTIETH])
        return cls(name, _join(kept), validation, len(documents), split)

    @classmethod
    def python_library(cls, bytes_most: int = BYTES_DEFAULT_CORPUS) -> ByteCorpus:
        """The source of this Python's standard library, in order of path; present everywhere.

        Tests and installed packages are left out. It differs between versions of Python:
        compare `fingerprint` before comparing losses.
        """
        root = Path(sysconfig.get_path("stdlib"))
        files = [path for path in _files(root, NOT_LIBRARY) if path.suffix == ".py"]
        documents, bytes_read = [], 0
        for document in map(_read, files):
            if bytes_read >= bytes_most:
                break
            documents.append(document)
            bytes_read += len(document)
        return cls.from_documents("python standard library", documents)

    @classmethod
    def from_path(cls, path: Path | str) -> ByteCorpus:
        """A text file, or every file of a folder in order of path, hidden ones left out.

        Raises:
            InputError: missing, unreadable or empty; each bad file is named.
        """
        root = Path(path)
        if not root.exists():
            raise InputError("corpus", [Problem("data", str(path), "is a file or a folder")])
        files = list(_files(root, set())) if root.is_dir() else [root]
        problems, documents = [], []
        for file in files:
            try:
                if not file.is_file():  # a pipe would wait for a writer, a device never end
                    problems.append(Problem("data", str(file), "is an ordinary file"))
                    continue
                documents.append(_read(file))
            except OSError as error:
                problems.append(Problem("data", str(file), "can be read", error.strerror or ""))
        if problems:
            raise InputError("corpus", problems)
        return cls.from_documents(root.name, documents)

    @property
    def fingerprint(self) -> str:
        """SHA-256 of both halves and where they part."""
        digest = hashlib.sha256(f"{len(self.train)} {len(self.validation)} ".encode())
        digest.update(self.train.numpy().data)
        digest.update(self.validation.numpy().data)
        return digest.hexdigest()

    def summary(self) -> dict[str, str | int]:
        """What a run's manifest keeps of its data."""
        return {
            "name": self.name,
            "bytes_train": len(self.train),
            "bytes_validation": len(self.validation),
            "n_documents": self.n_documents,
            "split": self.split,
            "sha256": self.fingerprint,
        }


def read_corpus(data: str) -> ByteCorpus:
    """The corpus that a recipe names: `python-library`, or the path of a file or folder."""
    return ByteCorpus.python_library() if data == PYTHON_LIBRARY else ByteCorpus.from_path(data)


@dataclass(frozen=True, slots=True, eq=False)
class Batches:
    """The training batches of a run: step -> tokens and targets.

    The text is cut into windows of `seq_len` + 1 bytes that overlap by one; an epoch takes
    each window once, in an order drawn from (seed, epoch), from a start drawn the same way.
    Sample number `step * batch_size + slot` says which epoch and which window.

    >>> batches = Batches(torch.arange(100, dtype=torch.uint8), seq_len=4, batch_size=2, seed=0)
    >>> tokens_BT, targets_BT = batches(3)
    >>> tokens_BT.shape, bool((targets_BT == tokens_BT + 1).all())
    (torch.Size([2, 4]), True)
    """

    text: Tensor
    seq_len: int
    batch_size: int
    seed: int

    def __post_init__(self) -> None:
        if self.n_windows < 1:
            rule = f"has at least {2 * self.seq_len:,} bytes for seq_len={self.seq_len}"
            hint = "give more text or a shorter seq_len"
            raise InputError("corpus", [Problem("data", f"{len(self.text)} bytes", rule, hint)])

    @property
    def n_windows(self) -> int:
        """Windows in an epoch; one fewer than fit, so that every start leaves room."""
        return (len(self.text) - self.seq_len) // self.seq_len

    def starts(self, step: int, slots: Iterable[int] | None = None) -> list[int]:
        """Where in the text each sample of a step begins; `slots` picks a worker's share."""
        chosen = range(self.batch_size) if slots is None else slots
        return [self._start(step * self.batch_size + slot) for slot in chosen]

    def __call__(self, step: int, slots: Iterable[int] | None = None) -> tuple[Tensor, Tensor]:
        """tokens_BT and targets_BT (int64), the targets one byte later."""
        return _windows(self.text, self.starts(step, slots), self.seq_len)

    def _start(self, sample: int) -> int:
        epoch, place = divmod(sample, self.n_windows)
        order, offset = _epoch(self.seed, epoch, self.n_windows, self.seq_len)
        return offset + int(order[place]) * self.seq_len


def validation_batches(
    corpus: ByteCorpus, *, eval_bytes: int, seq_len: int, batch_size: int
) -> list[tuple[Tensor, Tensor]]:
    """Fixed batches that predict `eval_bytes` validation bytes, rounded down to whole windows.

    The windows are spread evenly over the validation text and never overlap.

    Raises:
        InputError: the validation text is shorter, or eval_bytes holds no window.
    """
    starts = iter(validation_starts(corpus, eval_bytes=eval_bytes, seq_len=seq_len))
    groups = iter(lambda: list(islice(starts, batch_size)), [])
    return [_windows(corpus.validation, group, seq_len) for group in groups]


def validation_starts(corpus: ByteCorpus, *, eval_bytes: int, seq_len: int) -> list[int]:
    """Where each validation window begins; it predicts the `seq_len` bytes after that one."""
    n_wanted, room = eval_bytes // seq_len, (len(corpus.validation) - 1) // seq_len
    if not 1 <= n_wanted <= room:
        rule = f"lies from seq_len={seq_len} to the {room * seq_len:,} validation bytes there are"
        raise InputError("corpus", [Problem("eval_bytes", eval_bytes, rule)])
    return [(i * room // n_wanted) * seq_len for i in range(n_wanted)]


@lru_cache(maxsize=4)
def _epoch(seed: int, epoch: int, n_windows: int, seq_len: int) -> tuple[Tensor, int]:
    """The order of an epoch's windows and the offset of the first: drawn, then remembered."""
    generator = torch.Generator().manual_seed(derive_seed(seed, "epoch", epoch))
    offset = int(torch.randint(seq_len, (), generator=generator))
    return torch.randperm(n_windows, generator=generator), offset


def derive_seed(seed: int, purpose: str, number: int) -> int:
    """A seed of 63 bits for one purpose, unrelated to that of any other.

    >>> derive_seed(0, "epoch", 1) == derive_seed(0, "epoch", 1) != derive_seed(1, "epoch", 0)
    True
    """
    digest = hashlib.sha256(f"{seed} {purpose} {number}".encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1


def _windows(text: Tensor, starts: Sequence[int], seq_len: int) -> tuple[Tensor, Tensor]:
    index = torch.tensor(starts)[:, None] + torch.arange(seq_len + 1)
    window = text[index].long()
    return window[:, :-1].contiguous(), window[:, 1:].contiguous()


def _join(documents: Iterable[bytes]) -> Tensor:
    joined = bytearray(b"".join(document + SEPARATOR for document in documents))
    return torch.frombuffer(joined, dtype=torch.uint8)


def _files(root: Path, left_out: set[str]) -> Iterator[Path]:
    """The files below a folder, in an order that no file system changes."""
    found = []
    for folder, folders, names in os.walk(root):
        folders[:] = [f for f in folders if f not in left_out and not f.startswith(".")]
        found += [Path(folder, name) for name in names if not name.startswith(".")]
    return iter(sorted(found, key=lambda path: path.relative_to(root).as_posix()))


def _read(path: Path) -> bytes:
    return path.read_bytes()
