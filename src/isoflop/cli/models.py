"""isoflop models · isoflop show"""

from __future__ import annotations

import tomllib
from typing import Annotated, Any

from cyclopts import Parameter

from isoflop.arch import Arch
from isoflop.cli.options import Json, load_model
from isoflop.cli.output import emit, say
from isoflop.quantity.units import format_exact
from isoflop.report.text import table


def models(*, as_json: Json = False) -> None:
    """List the named models: our count beside the published one."""
    rows = [_row(name) for name in _names()]
    if as_json:
        return emit("models", {"models": rows})
    shown = [
        [r["name"], format_exact(r["params"]), _published(r["published"]), r["source"]]
        for r in rows
    ]
    return say(table(shown, ["model", "params", "published", "source"], "lrrl"))


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
    lines = [
        f"{arch.name}: {arch.n_layers} layers, d_model {arch.d_model}, "
        f"vocabulary {format_exact(arch.vocab_size)}, context {format_exact(arch.max_seq_len)}",
        f"  embedding     {_words(arch.embedding)}",
    ]
    for name, layer in arch.kinds.items():
        lines += [
            f"  {name} x{arch.times(name)}",
            f"    wiring        {layer.wiring.value} {_words(layer.norm)}",
            f"    attention     {_words(layer.attention)}",
            f"    feed-forward  {_words(layer.feed_forward)}",
        ]
    return "\n".join([*lines, f"  head          {head}"])


def _words(value: Any) -> str:
    """A dataclass in one line: its kind, then every field that is not at rest."""
    fields = {f: getattr(value, f) for f in value.__dataclass_fields__}
    kind = str(fields.pop("kind", "")).replace("_", " ")
    told = [
        f"{name}={_words(v).strip() if hasattr(v, '__dataclass_fields__') else v}"
        for name, v in fields.items()
        if v not in (None, False, 0.0, 1.0) or name == "n_kv_heads"
    ]
    return f"{kind}({', '.join(told)})" if kind else ", ".join(told)
