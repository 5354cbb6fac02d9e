"""What a user typed, as an `Arch`.

    llama-3-8b                     a name of the zoo
    path/config.json, path/        a Hugging Face config, or the folder that holds it
    path/spec.toml                 our own spec file
    hf:ORG/NAME[@REVISION]         a model on the hub: fetched, because the user asked

Nothing is guessed: a text that is none of these is refused, with what was tried.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from isoflop.arch.foreign import parse_json, read_file
from isoflop.arch.hub import HUB, fetch_config
from isoflop.arch.spec import Arch
from isoflop.arch.toml import read_spec
from isoflop.arch.zoo import entry, names
from isoflop.errors import InputError, Problem, nearest

MAX_TEXT = 4096
#: What people write for a size: 7B, 1.5b, 350M.
SIZE = re.compile(r"[0-9.]+[mbt]", re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class Loaded:
    """A spec, where it came from, and what the reader should know about it."""

    arch: Arch
    origin: str
    notes: tuple[str, ...] = ()


def load(text: str, hub: str = HUB) -> Loaded:
    """The model that `text` names; the forms are listed at the top of this module.

    A zoo name comes before a file of that name; write `./NAME` for the file.

    Raises:
        InputError: it names nothing, or what it names is broken.

    >>> load("llama-3-8b").origin
    'zoo'
    """
    if not 1 <= len(text) <= MAX_TEXT or not text.isprintable():
        rule = f"is 1 to {MAX_TEXT:,} printable characters"
        raise InputError("model", [Problem("name", text or '""', rule)])
    if text.startswith("hf:"):
        name = text.removeprefix("hf:")
        config = parse_json(fetch_config(name, hub), text)
        return _from_config(config, name.partition("@")[0], text)
    if text in names():
        known = entry(text)
        return Loaded(known.arch, "zoo", () if known.confirmed else (f"{text}: {known.note}",))
    return _from_file(text)


def _from_file(text: str) -> Loaded:
    path = Path(text)
    try:
        if path.is_dir():
            path = path / "config.json"
            if not path.exists():
                raise InputError(text, [Problem("path", text, "is a folder with a config.json")])
        if not path.exists():
            raise _missing(text) if path.suffix in (".json", ".toml") else _unknown(text)
    except OSError as error:  # a name longer than the file system takes, a folder not ours
        raise InputError(
            text, [Problem("path", text, "can be read", str(error.strerror))]
        ) from None
    match path.suffix.casefold():
        case ".json":
            config = parse_json(read_file(path), str(path))
            return _from_config(config, _name_of(path), str(path))
        case ".toml":
            return Loaded(read_spec(path), str(path))
    raise InputError(text, [Problem("path", text, "ends in .json or .toml, or is a folder")])


def _name_of(path: Path) -> str:
    """What to call a config found at `path`: its folder, or the file if that says more."""
    name = path.resolve().parent.name if path.name == "config.json" else path.stem
    return name[:128] if name and name.isprintable() else "config"


def _from_config(config: dict[str, Any], name: str, origin: str) -> Loaded:
    from isoflop.arch.hf import read_hf  # thirty types of config: loaded when there is one

    reading = read_hf(config, name)
    notes = []
    if reading.unknown:
        left = ", ".join(reading.unknown)
        notes.append(f"{origin}: not understood, and left out of every count: {left}")
    if reading.defaulted:
        taken = ", ".join(reading.defaulted)
        notes.append(f"{origin}: keys that are absent take their class's default: {taken}")
    return Loaded(reading.arch, origin, tuple(notes))


def _missing(text: str) -> InputError:
    return InputError("model", [Problem("file", text, "is a file that exists")])


def _unknown(text: str) -> InputError:
    near = nearest(text, names())
    hint = f"did you mean {' or '.join(near)}?" if near else "`isoflop models` lists the zoo"
    if SIZE.fullmatch(text):
        hint = (
            "a size is no model: `isoflop models` lists the zoo, `isoflop plan budget` finds shapes"
        )
    rule = "is a zoo name, a config.json or its folder, a .toml spec, or hf:ORG/NAME (tried each)"
    return InputError("model", [Problem("name", text, rule, hint)])
