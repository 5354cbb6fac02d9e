"""Hugging Face `config.json` to `Arch`.

A key absent from the config takes the default of the transformers class (5.x), and the
reading says so. A config is data: no class is imported from it and `auto_map` is ignored.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from isoflop.arch.hf.config import Config
from isoflop.arch.hf.family import Family
from isoflop.arch.hf.registry import FAMILIES
from isoflop.arch.hf.words import HARMLESS
from isoflop.arch.spec import Arch
from isoflop.errors import InputError, Problem, UnknownName


@dataclass(frozen=True, slots=True)
class Reading:
    """What a config says.

    Attributes:
        ignored: keys known to change neither a count nor the forward pass.
        unknown: keys not understood, which might.
        defaulted: `key=value` for each key that was absent and took its class's default.
    """

    arch: Arch
    ignored: tuple[str, ...] = ()
    unknown: tuple[str, ...] = ()
    defaulted: tuple[str, ...] = ()


def from_hf(config: dict[str, Any], name: str) -> Arch:
    """The `Arch` that a parsed `config.json` describes; `name` is what to call it.

    Raises:
        InputError: a value of the wrong type, a rule broken, or something the spec cannot say.
        UnknownName: a `model_type` without a reader.

    >>> from_hf({"model_type": "gpt2", "n_layer": 2}, "small").n_layers
    2
    """
    return read_hf(config, name).arch


def read_hf(config: dict[str, Any], name: str) -> Reading:
    """As `from_hf`, with the keys that were ignored, not understood, or filled in.

    >>> read_hf({"model_type": "gpt2", "use_cache": True, "n_experts": 8}, "odd").unknown
    ('n_experts',)
    """
    family = _family(config, name)
    keys = Config(_canonical(config, family, name), where=name)
    try:
        arch = family.read(name, keys)
    except InputError as error:
        keys.close()  # a wrong type comes first: what it was replaced by may break rules
        raise keys.rename(error, family.their_names()) from None
    keys.close()
    harmless = HARMLESS | family.ignored
    unread = {key: key.rpartition(".")[2] in harmless or key in harmless for key in keys.unread()}
    return Reading(
        arch,
        ignored=tuple(sorted(key for key, known in unread.items() if known)),
        unknown=tuple(sorted(key for key, known in unread.items() if not known)),
        defaulted=tuple(keys.defaulted),
    )


def _family(config: dict[str, Any], name: str) -> Family:
    if not isinstance(config, dict) or not all(isinstance(key, str) for key in config):
        raise InputError(name, [Problem("config", config, "is a table of keys and values")])
    model_type = config.get("model_type")
    known = f"known: {', '.join(sorted(FAMILIES))}"
    if not isinstance(model_type, str):
        shown = "nothing" if model_type is None else model_type
        raise InputError(name, [Problem("model_type", shown, "is given, a word", known)])
    if model_type not in FAMILIES:
        raise UnknownName("model_type", model_type, FAMILIES, known)
    return FAMILIES[model_type]


def _canonical(config: dict[str, Any], family: Family, name: str) -> dict[str, Any]:
    """The config under first names, without an `architectures` that names the usual class."""
    keys = {key: value for key, value in config.items() if key != "model_type"}
    if keys.get("architectures") == [family.model_class]:
        del keys["architectures"]
    for second, first in family.second_names.items():
        if second in keys:
            value = keys.pop(second)
            if keys.setdefault(first, value) != value:
                problem = Problem(second, value, f"equals {first}, which means the same")
                raise InputError(name, [problem])
    return keys
