"""Our own spec file: an `Arch` as TOML, read and written.

    name = "tiny"                      # [layer] is the usual single kind of layer;
    d_model = 64                       # several kinds: pattern = ["local", "global"],
    n_layers = 2                       # repeated to n_layers, and [layers.local], ...
    vocab_size = 256                   # "dense*3" stands for three in a row
    max_seq_len = 128
    final_norm = { kind = "rms_norm" }
    [layer]
    norm = { kind = "rms_norm" }
    [layer.attention]
    kind = "attention"
    ...

A field left out has the default of its dataclass in spec.py; in a union `kind` chooses.
The text is foreign: foreign.py bounds it and pydantic checks the types. pydantic is
loaded by the first read only.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import MISSING, fields, is_dataclass, replace
from itertools import cycle, groupby, islice
from pathlib import Path
from typing import Any

from isoflop.arch.foreign import check_table, parse_toml, read_file
from isoflop.arch.spec import (
    Arch,
    Attention,
    Dense,
    Embedding,
    Encoder,
    Experts,
    Head,
    LatentAttention,
    Layer,
    Projector,
    VisionTower,
)
from isoflop.errors import InputError, Problem, nearest

#: What gets a [section] of its own; everything smaller is an inline table.
SECTIONS = (
    Layer, Attention, LatentAttention, Dense, Experts, Embedding, Head, Encoder, VisionTower, Projector,
)  # fmt: skip

_RUN = re.compile(r"(?P<name>[^*]+)(?:\*(?P<times>[1-9][0-9]{0,4}))?")


def read_spec(path: Path | str) -> Arch:
    """The `Arch` of a spec file.

    Raises:
        InputError: the file or anything in it; all problems at once, each with its path.
    """
    return parse_spec(read_file(Path(path)), str(path))


def parse_spec(data: bytes, where: str) -> Arch:
    """As `read_spec`, from the bytes of the file."""
    return spec_from_table(parse_toml(data, where), where)


def spec_from_table(table: Mapping[str, Any], where: str) -> Arch:
    """As `read_spec`, from a table that is already parsed: a recipe may hold its spec."""
    from isoflop.arch.toml_boundary import build  # loads pydantic

    check_table(dict(table), where)  # pydantic cannot print an integer past the digit limit
    return build(dict(table), where)


def write_spec(arch: Arch) -> str:
    """The spec file of an `Arch`: `parse_spec(write_spec(a).encode(), "a") == a`.

    >>> from isoflop.arch.families import gpt
    >>> text = write_spec(gpt("t", d_model=8, n_layers=2, n_heads=2, vocab_size=9, max_seq_len=4))
    >>> text.splitlines()[:3]
    ['name = "t"', 'd_model = 8', 'vocab_size = 9']
    """
    return "\n".join(_section(arch, "")).strip() + "\n"


# --- layers as a pattern ----------------------------------------------------------------


def layers_from(
    n_layers: int, layer: Layer | None, kinds: dict[str, Layer], pattern: Sequence[str] | None
) -> tuple[Layer, ...]:
    """The layers that `[layer]`, or `pattern` and `[layers.NAME]`, describe.

    Raises:
        InputError: both forms or neither, a kind unknown or unused, an unreadable pattern.
    """
    if not 1 <= n_layers <= Arch.MAX_LAYERS:
        rule = f"is a whole number from 1 to {Arch.MAX_LAYERS:,}"
        raise InputError("spec", [Problem("n_layers", n_layers, rule)])
    if (layer is None) == (pattern is None) or (pattern is None) == bool(kinds):
        rule = "is one [layer], or a pattern with a [layers.NAME] for each of its names"
        raise InputError("spec", [Problem("layer", "both or neither", rule)])
    if layer is not None:
        return (layer,) * n_layers
    names = _expand(pattern or (), kinds)
    named = {name: replace(kind, name=name) for name, kind in kinds.items()}
    return tuple(named[name] for name in islice(cycle(names), n_layers))


def _expand(pattern: Sequence[str], kinds: dict[str, Layer]) -> list[str]:
    names: list[str] = []
    broken: list[Problem] = []
    for entry in pattern:
        run = _RUN.fullmatch(entry)
        if run is None:
            broken.append(Problem("pattern", entry, 'is like "name" or "name*3"'))
        elif run["name"] not in kinds:
            near = " or ".join(nearest(run["name"], kinds)) or ", ".join(kinds)
            broken.append(
                Problem("pattern", entry, "names a [layers.NAME]", f"did you mean {near}?")
            )
        elif len(names) <= Arch.MAX_LAYERS:
            names += [run["name"]] * int(run["times"] or 1)
    unused = [name for name in kinds if name not in names]
    broken += [Problem(f"layers.{name}", "unused", "stands in the pattern") for name in unused]
    if broken or not names:
        raise InputError("spec", broken or [Problem("pattern", "[]", "names at least one kind")])
    return names


def pattern_of(names: Sequence[str]) -> list[str]:
    """The shortest pattern that repeats to `names`, runs written as "name*3".

    >>> pattern_of(["local", "local", "global", "local", "local", "global", "local"])
    ['local*2', 'global']
    """
    n = len(names)
    period = next(p for p in range(1, n + 1) if all(names[i] == names[i - p] for i in range(p, n)))
    runs = [(name, len(list(same))) for name, same in groupby(names[:period])]
    return [name if times == 1 else f"{name}*{times}" for name, times in runs]


# --- writing ----------------------------------------------------------------------------


def _section(value: Any, path: str) -> Iterator[str]:
    """The lines of one dataclass: its own values first, then its sections."""
    if path:
        yield f"\n[{path}]"
    sections: dict[str, Any] = {}
    for name, entry in _said(value).items():
        if name == "layers":
            kinds = {layer.name: layer for layer in entry}
            usual = list(kinds) == ["layer"]
            sections |= {
                "layer" if usual else f"layers.{_key(kind)}": kinds[kind] for kind in kinds
            }
            yield f"n_layers = {len(entry)}"
            if not usual:
                yield f"pattern = {_inline(pattern_of([layer.name for layer in entry]))}"
        elif isinstance(entry, SECTIONS):
            sections[name] = entry
        else:
            yield f"{name} = {_inline(entry)}"
    for name, entry in sections.items():
        yield from _section(entry, f"{path}.{name}" if path else name)


def _said(value: Any) -> dict[str, Any]:
    """The fields to write: `kind`, those without a default, and those that deviate."""
    usual = {field.name: field.default for field in fields(value)}
    if isinstance(value, Arch):
        usual |= {"embedding": Embedding(n_rows=value.vocab_size), "head": Head()}
    if isinstance(value, Layer):
        usual["name"] = value.name  # the section's name says it
    said = {"kind": value.kind} if hasattr(value, "kind") else {}
    for name, default in usual.items():
        entry = getattr(value, name)
        if default is MISSING or entry != default:
            said[name] = entry
    return said


def _key(name: str) -> str:
    """A layer's name as a TOML key: bare where it is ASCII, quoted otherwise."""
    return name if name.isascii() else _inline(name)


def _inline(value: Any) -> str:
    if value is None:
        return '"none"'
    if is_dataclass(value):
        return "{ " + ", ".join(f"{k} = {_inline(v)}" for k, v in _said(value).items()) + " }"
    if isinstance(value, (list, tuple)):
        return f"[{', '.join(map(_inline, value))}]"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, (int, float)):
        return repr(value)
    return json.dumps(value, ensure_ascii=False)  # a printable string: TOML's rules are JSON's
