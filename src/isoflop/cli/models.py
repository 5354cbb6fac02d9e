"""isoflop models · isoflop show"""

from __future__ import annotations

import re
import tomllib
from collections import Counter
from collections.abc import Sequence
from typing import Annotated, Any

from cyclopts import Parameter

from isoflop.arch import Arch, Layer
from isoflop.cli.options import Json, load_model
from isoflop.cli.output import emit, say
from isoflop.errors import UnknownName
from isoflop.quantity.units import format_exact
from isoflop.report.text import table

#: The first word of a name, its version left out where it is not part of the word.
FAMILY = re.compile("t5|mt-nlg|[a-z]+")


def models(text: str | None = None, /, *, as_json: Json = False) -> None:
    """List the named models: our count beside the published one.

    Parameters
    ----------
    text
        Only models with this in their names, such as llama.
    """
    rows = [_row(name) for name in _wanted(text)]
    if as_json:
        return emit("models", {"models": rows})
    shown = [
        [r["name"], format_exact(r["params"]), _published(r["published"]), r["source"]]
        for r in rows
    ]
    listed = table(shown, ["model", "params", "published", "source"], "lrrl")
    return say(f"{listed}\n\n{_families([r['name'] for r in rows])}")


def _wanted(text: str | None) -> list[str]:
    """The names that hold the text.

    Raises:
        UnknownName: none does.
    """
    found = [name for name in _names() if (text or "").casefold() in name]
    if not found:
        hint = "`isoflop models` lists all names"
        raise UnknownName("model with", text or "", _names(), hint)
    return found


def _families(names: Sequence[str]) -> str:
    """How many models of each family, by the letters that their names begin with.

    >>> _families(["gpt2", "gpt2-xl", "gpt-j-6b", "llama-3-8b"])
    '4 models: gpt 3, llama 1'
    """
    count = Counter(FAMILY.match(name)[0] for name in names)  # type: ignore[index]  # every name begins with a letter
    return f"{len(names)} models: {', '.join(f'{f} {n}' for f, n in sorted(count.items()))}"


def _names() -> tuple[str, ...]:
    from isoflop.arch import zoo

    return tuple(zoo.names())


def _row(name: str) -> dict[str, Any]:
    from isoflop.arch import zoo
    from isoflop.count import params

    entry = zoo.entry(name)
    return {
        "name": name,
        "params": int(params(entry.arch).value),
        "published": entry.published,
        "source": entry.source,
        "published_source": entry.published_source,
        "note": entry.note,
    }


def _published(count: int | None) -> str:
    return "not stated" if count is None else format_exact(count)


def show(
    model: str,
    /,
    *,
    toml: Annotated[bool, Parameter(negative="")] = False,
    as_json: Json = False,
) -> None:
    """Show a model's spec.

    Parameters
    ----------
    model
        A zoo name, a config.json or its folder, a TOML spec, or hf:ORG/NAME.
    toml
        Print the spec as a TOML file that isoflop reads back.
    """
    from isoflop.arch.toml import write_spec

    arch = load_model(model)
    if as_json:
        return emit("show", {"model": arch.name, "spec": tomllib.loads(write_spec(arch))})
    return say(write_spec(arch).rstrip() if toml else f"{describe_arch(arch)}{_sources(model)}")


def _sources(model: str) -> str:
    """Where a named model's shape is from, and what its source leaves open."""
    from isoflop.arch import zoo

    if model not in _names():
        return ""
    entry = zoo.entry(model)
    note = f"\n  note          {entry.note}" if entry.note else ""
    return f"\n  source        {entry.source}{note}"


def describe_arch(arch: Arch) -> str:
    """A spec as a person reads it: the sizes, then one block per kind of layer."""
    head = "tied to the embedding" if arch.head.tied else "its own matrix"
    encoder, vision = arch.encoder, arch.vision
    lines = [
        str(arch),
        f"  embedding     {_words(arch.embedding)}",
    ]
    if vision is not None:
        read = "" if vision.feature_layer is None else f", read after layer {vision.feature_layer}"
        lines.append(f"  vision        {vision.image} x {vision.image} pixels in patches of "
                     f"{vision.patch} x {vision.patch}, d_model {vision.d_model}{read}")  # fmt: skip
        lines += _blocks(vision.layers, "vision/")
    if encoder is not None:
        lines += _blocks(encoder.layers, "encoder/")
    return "\n".join([*lines, *_blocks(arch.layers), f"  head          {head}"])


def _blocks(layers: Sequence[Layer], under: str = "") -> list[str]:
    """One block per kind of layer, called as trees call it."""
    lines = []
    for name, times in Counter(layer.name for layer in layers).items():
        layer = next(layer for layer in layers if layer.name == name)
        lines += [
            f"  {under}{name} x{times}",
            f"    wiring        {layer.wiring.value} {_words(layer.norm)}",
            f"    attention     {_words(layer.attention)}",
            *([f"    cross         {_words(layer.cross)}"] if layer.cross else []),
            f"    feed-forward  {_words(layer.feed_forward)}",
        ]
    return lines


def _words(value: Any) -> str:
    """A dataclass in one line: its kind, then every field that is not at rest."""
    fields = {f: getattr(value, f) for f in value.__dataclass_fields__}
    kind = str(fields.pop("kind", "")).replace("_", " ")
    told = [
        name if v is True else f"{name}={_word(v)}"
        for name, v in fields.items()
        if v is True or v not in (None, False, 0.0, 1.0) or name == "n_kv_heads"
    ]
    return f"{kind}({', '.join(told)})" if kind and told else kind or ", ".join(told)


def _word(value: Any) -> str:
    """A field's value; what has no kind of its own stands in brackets."""
    if isinstance(value, float):
        return f"{value:.0f}" if value.is_integer() else f"{value:.6g}"
    if not hasattr(value, "__dataclass_fields__"):
        return str(value)
    return _words(value) if hasattr(value, "kind") else f"({_words(value)})"
