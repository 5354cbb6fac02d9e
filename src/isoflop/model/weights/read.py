"""A Hugging Face folder to a model: tensor by tensor, so that no second copy of it is held."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from isoflop.arch import Arch
from isoflop.arch.hf import read_hf
from isoflop.errors import MISSING, Fault, InputError, Problem, nearest
from isoflop.model.build import build
from isoflop.model.decoder import Decoder
from isoflop.model.encoder_decoder import EncoderDecoder
from isoflop.model.weights.folder import CONFIG, LISTED, Folder, open_folder
from isoflop.model.weights.header import DTYPES, Entry
from isoflop.model.weights.table import Pair, Table, pairs
from isoflop.model.weights.tables.registry import table_of

#: Near names are looked for among so many: their time grows with it.
COMPARED = 2_000


class Weights(Mapping[str, Tensor]):
    """A folder's tensors under our names. Each is read when it is asked for, and not kept."""

    def __init__(self, folder: Folder, paired: Collection[Pair], files: Mapping[str, str]) -> None:
        """`files` are the names that a file has for the family's, where they differ."""
        self.folder = folder
        self.pairs = tuple(paired)
        self._files = files
        self._pair_of = {name: pair for pair in self.pairs for name in pair.ours}

    def __getitem__(self, name: str) -> Tensor:
        return self.read(self._pair_of[name])[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._pair_of)

    def __len__(self) -> int:
        return len(self._pair_of)

    def read(self, pair: Pair) -> dict[str, Tensor]:
        """All that is stored together; each stored tensor is read once."""
        theirs = self.stored(self._files.get(name, name) for name in pair.theirs)
        return dict(zip(pair.ours, pair.split(theirs), strict=True))

    def stored(self, names: Iterable[str]) -> tuple[Tensor, ...]:
        """Tensors as files have them, under the files' own names.

        A file is mapped for as long as its tensors are used, so that what was read counts no
        longer as this process's memory.
        """
        with ExitStack() as stack:
            files: dict[Path, safe_open] = {}
            return tuple(self._stored(name, files, stack) for name in names)

    def _stored(self, name: str, files: dict[Path, safe_open], stack: ExitStack) -> Tensor:
        path = self.folder.entries[name].path
        try:
            if path not in files:
                files[path] = stack.enter_context(safe_open(path, framework="pt", device="cpu"))
            tensor: Tensor = files[path].get_tensor(name)  # type: ignore[no-untyped-call]  # safetensors has no types
        except (OSError, SafetensorError) as error:
            raise InputError(str(path), [Problem(name, str(error), "can be read")]) from None
        return tensor


def read_weights(folder: Path | str, arch: Arch | None = None) -> Weights:
    """The weights in a Hugging Face folder, under the names of the model that `arch` builds.

    Names, shapes and kinds of numbers are checked by the files' headers; no weight is read but
    the copies of tied ones, which are to equal the token vectors bit for bit.

    Args:
        arch: what to read it as; what its config.json says where it is not given.

    Raises:
        InputError: no folder of safetensors, or not the tensors of that model; all that are
            missing, superfluous or of another shape are listed.
    """
    opened = open_folder(folder)
    said = read_hf(dict(opened.config), _name_of(opened.path)).arch if arch is None else arch
    return weights_of(opened, said, shapes_of(_unborn(opened, said)))


def load_model(
    folder: Path | str,
    *,
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
    ignored_keys: Collection[str] = (),
) -> Decoder | EncoderDecoder:
    """The model in a Hugging Face folder: config.json, and safetensors in one file or sharded.

    Args:
        dtype: what floats to cast every trained weight to; None keeps each as it is stored.
        ignored_keys: keys of the config that are not understood, and are known to change nothing.

    Raises:
        InputError: as `read_weights`; or a key of the config is not understood, so that the
            model might compute something else; or the model is not built yet; or weights
            are no numbers.
    """
    if dtype is not None and not dtype.is_floating_point:
        raise InputError(str(folder), [Problem("dtype", dtype, "is a floating one")])
    opened = open_folder(folder)
    reading = read_hf(dict(opened.config), _name_of(opened.path))
    if unknown := [key for key in reading.unknown if key not in ignored_keys]:
        rule = "is a key whose meaning for the model is known"
        problems = [Problem(key, "given", rule) for key in unknown[:LISTED]]
        raise InputError(str(opened.path / CONFIG), problems)
    model = _unborn(opened, reading.arch)
    _fill(model, weights_of(opened, reading.arch, shapes_of(model)), dtype, device)
    return model


@torch.no_grad()
def _fill(
    model: Decoder | EncoderDecoder,
    weights: Weights,
    dtype: torch.dtype | None,
    device: torch.device | str,
) -> None:
    """Put a copy of every weight in its place; what is read is let go before the next.

    Raises:
        InputError: weights that are no numbers: attention's kernels may take them for nothing.
    """
    broken = []
    for pair in weights.pairs:
        for name, read in weights.read(pair).items():
            path, _, leaf = name.rpartition(".")
            module = model.get_submodule(path)
            trained = isinstance(getattr(module, leaf), nn.Parameter)
            kept = dtype if trained and dtype is not None else read.dtype
            copied = torch.empty(read.shape, dtype=kept, device=device).copy_(read)
            setattr(module, leaf, nn.Parameter(copied) if trained else copied)
            if not _are_numbers(read):
                broken.append(Problem(name, "not finite", "has finite numbers alone"))
    if broken:
        raise InputError(str(weights.folder.path), broken[:LISTED])


def _are_numbers(weight: Tensor) -> bool:
    """Whether all are finite: what is no number is the least and the largest of them."""
    return all(bool(end.isfinite()) for end in torch.aminmax(weight))


def _unborn(folder: Folder, arch: Arch) -> Decoder | EncoderDecoder:
    """The model on the meta device, unless no file can hold it.

    Raises:
        InputError: more layers than there are tensors, or one past what memory can address.
    """
    if arch.n_layers > len(folder.entries):
        rule = f"is at most {len(folder.entries):,}, the tensors in the folder"
        raise InputError(str(folder.path), [Problem("layers", arch.n_layers, rule)])
    try:
        return build(arch, device="meta")
    except RuntimeError as error:  # torch: "Storage size calculation overflowed"
        problem = Problem("sizes", str(error), "are those of a tensor that can be stored")
        raise InputError(str(folder.path), [problem]) from None


def shapes_of(model: nn.Module) -> dict[str, torch.Size]:
    """Parameters and lasting buffers by name; a tied one is named once, where it is stored."""
    lasting = model.state_dict(keep_vars=True)
    if passing := [name for name, _ in model.named_buffers() if name not in lasting]:
        raise Fault(f"buffers that no file keeps: {', '.join(passing)}")
    return {name: tensor.shape for name, tensor in lasting.items()}


def weights_of(folder: Folder, arch: Arch, shapes: Mapping[str, torch.Size]) -> Weights:
    """The weights of a model whose tensors have these names and shapes.

    Raises:
        InputError: as `read_weights`.
    """
    table = table_of(folder.config, arch)
    # As many names as there can be, and more: what is missing is to be listed, not merely counted.
    paired = pairs(table, arch, shapes, most=2 * len(folder.entries) + 1_000)
    files, left = _names_in(folder, table, arch, {name for pair in paired for name in pair.theirs})
    if problems := _problems(folder, paired, files, left):
        more = len(problems) - LISTED
        shown = problems[:LISTED]
        if more > 0:
            shown.append(Problem("tensors", f"{more:,} more", "fit the config"))
        raise InputError(str(folder.path), shown)
    weights = Weights(folder, paired, files)
    _check_copies(weights, table, arch)
    return weights


def _names_in(
    folder: Folder, table: Table, arch: Arch, wanted: Collection[str]
) -> tuple[dict[str, str], list[str]]:
    """The family's names and what the files call them; and names that nothing is known by."""
    found: dict[str, str] = {}
    left = []
    copies = _copies(table, arch)
    known = re.compile("|".join(table.ignored) or r"(?!)")
    for name in folder.entries:
        spelt = table.spelt(name)
        full = next((x for x in spelt if x in wanted), None)
        if full is not None:
            if found.setdefault(full, name) != name:
                left.append(name)
        elif copies.isdisjoint(spelt) and not any(map(known.fullmatch, spelt)):
            left.append(name)
    return found, left


def _copies(table: Table, arch: Arch) -> set[str]:
    """What else files may hold the token vectors under."""
    return {*table.copies, f"{table.whole['head']}.weight"} if arch.head.tied else {*table.copies}


def _problems(
    folder: Folder, paired: Collection[Pair], files: Mapping[str, str], left: list[str]
) -> list[Problem]:
    """Tensors that are missing, superfluous, or not what the model has there."""
    missing = [name for pair in paired for name in pair.theirs if name not in files]
    return [
        *(Problem(x, MISSING, "is in the folder", _near(x, left)) for x in missing),
        *(
            Problem(x, list(folder.entries[x].shape), "is a tensor of the model", _near(x, missing))
            for x in left
        ),
        *(problem for pair in paired for problem in _unfit(pair, files, folder.entries)),
    ]


def _near(name: str, names: list[str]) -> str:
    near = nearest(name, names) if len(names) <= COMPARED else []
    return f"did you mean {' or '.join(near)}?" if near else ""


def _unfit(pair: Pair, files: Mapping[str, str], entries: Mapping[str, Entry]) -> Iterator[Problem]:
    """Another shape than the config says, or numbers that are not read."""
    found = {name: entries[files[name]] for name in pair.theirs if name in files}
    for name, entry in found.items():
        if entry.shape != pair.theirs[name]:
            yield Problem(name, list(entry.shape), f"has the shape {list(pair.theirs[name])}")
        if entry.dtype is None:
            yield Problem(name, entry.kind, f"is kept in {', '.join(DTYPES)}")
    if len({entry.kind for entry in found.values()}) > 1:
        kinds = ", ".join(sorted({entry.kind for entry in found.values()}))
        yield Problem(next(iter(pair.ours)), kinds, "is made of tensors of one dtype")


def _check_copies(weights: Weights, table: Table, arch: Arch) -> None:
    """A tied head that is written out is the token vectors, or the config says too much."""
    tokens = f"{table.whole['embedding.tokens']}.weight"
    copies = _copies(table, arch)
    there = [x for x in weights.folder.entries if not copies.isdisjoint(table.spelt(x))]
    if not there:
        return
    vectors = weights["embedding.tokens.weight"]
    problems = [
        Problem(name, "other numbers", f"equals {tokens}, to which the config ties it")
        for name in there
        if not _same_bits(weights.stored([name])[0], vectors)
    ]
    if problems:
        raise InputError(str(weights.folder.path), problems)


def _same_bits(a: Tensor, b: Tensor) -> bool:
    return a.dtype == b.dtype and torch.equal(a.view(torch.uint8), b.view(torch.uint8))


def _name_of(path: Path) -> str:
    name = path.resolve().name
    return name[:128] if name and name.isprintable() else "model"
