"""How a family's config is said: a table of keys, and what a table cannot say.

One table serves both ways: reading takes each key's value (or its class's default) as
an argument of the family's builder, writing puts the same fact of the spec under it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, TypeAlias

from isoflop.arch.hf.config import Config
from isoflop.arch.hf.rope import RopeKeys, read_rope, write_rope
from isoflop.arch.hf.words import ACTIVATIONS
from isoflop.arch.spec import Arch

Kind: TypeAlias = Literal[
    "size", "size_or_none", "count", "layers", "real", "real_or_none", "flag", "word"
]
Facts: TypeAlias = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Key:
    """One key of a config.

    Attributes:
        says: the builder's argument that it is.
        default: what its class takes where it is absent.
        words: what each word means, for the kind `word`.
    """

    says: str
    kind: Kind
    default: Any = None
    words: Mapping[str, Any] = field(default_factory=dict)

    def read(self, keys: Config, name: str) -> Any:
        if self.kind == "word":
            return keys.choice(name, self.words, self.default)
        return getattr(keys, self.kind)(name, self.default)

    def write(self, facts: Facts) -> Any:
        """The value that says this fact.

        Raises:
            KeyError: the spec has no such fact, or the family no word for it.
        """
        fact = facts[self.says]
        if self.kind == "word":
            # Of several words for one meaning the default goes first, then the table's first.
            words = [self.default, *self.words]
            return {self.words[word]: word for word in reversed(words)}[fact]
        if not self.kind.startswith("real") or fact is None:
            return fact
        # Where their class's default is a whole number it takes no other.
        whole = isinstance(self.default, int) and float(fact).is_integer()
        return int(fact) if whole else float(fact)


def size(field: str, default: int) -> Key:
    return Key(field, "size", default)


def size_or_none(field: str, default: int | None = None) -> Key:
    """Null means what the builder makes of None; so does absence, unless there is a default."""
    return Key(field, "size_or_none", default)


def count(field: str, default: int) -> Key:
    return Key(field, "count", default)


def real(field: str, default: float) -> Key:
    return Key(field, "real", default)


def real_or_none(field: str, default: float | None = None) -> Key:
    return Key(field, "real_or_none", default)


def flag(field: str, default: bool) -> Key:
    return Key(field, "flag", default)


def word(field: str, default: str, words: Mapping[str, Any] = ACTIVATIONS) -> Key:
    return Key(field, "word", default, words)


def layers(default: int, field: str = "n_layers") -> Key:
    return Key(field, "layers", default)


def llama_keys(
    d_model: int,
    n_layers: int,
    n_heads: int,
    n_kv_heads: int | None,
    d_ff: int,
    vocab_size: int,
    max_seq_len: int,
    *,
    d_head: int | None = None,
    act: tuple[str, str] = ("hidden_act", "silu"),
    eps: tuple[str, float] = ("rms_norm_eps", 1e-6),
    tied: bool = False,
) -> dict[str, Key]:
    """The keys that nearly all configs since Llama share, with one class's defaults."""
    return {
        "hidden_size": size("d_model", d_model),
        "num_hidden_layers": layers(n_layers),
        "num_attention_heads": size("n_heads", n_heads),
        "num_key_value_heads": size_or_none("n_kv_heads", n_kv_heads),
        "head_dim": size_or_none("d_head", d_head),
        "intermediate_size": size("d_ff", d_ff),
        "vocab_size": size("vocab_size", vocab_size),
        "max_position_embeddings": size("max_seq_len", max_seq_len),
        act[0]: word("activation", act[1]),
        eps[0]: real("eps", eps[1]),
        "tie_word_embeddings": flag("tied", tied),
        "attention_dropout": real("dropout_attention", 0.0),
    }


def _nothing_more(_keys: Config, _numbers: Facts) -> None:
    """Reading is done when the table is read."""


def _no_more_keys(_arch: Arch, _facts: Facts) -> dict[str, Any]:
    """Writing is done when the table is written."""
    return {}


@dataclass(frozen=True, slots=True)
class Family:
    """A `model_type`.

    Attributes:
        build: makes the spec from the numbers read.
        keys: its table.
        rope: the words and defaults of its rotary positions; None where it has none, or
            where `finish` reads them.
        fixed: keys of which the spec can say one value only, and why.
        square: whether its class refuses a width that n_heads does not divide, even where
            the head's size is given.
        ignored: keys of its own that change no count and no product (`clip_qkv` clamps what
            comes out of one).
        finish: reads what no table can say, and settles the builder's arguments.
        more: the keys beside the table, or in place of its own, when writing; None where the
            family is not written.
    """

    model_type: str
    model_class: str
    build: Callable[..., Arch]
    keys: Mapping[str, Key]
    rope: RopeKeys | None = None
    second_names: Mapping[str, str] = field(default_factory=dict)
    fixed: Mapping[str, tuple[object, str]] = field(default_factory=dict)
    square: bool = False
    ignored: frozenset[str] = frozenset()
    finish: Callable[[Config, Facts], None] = _nothing_more
    more: Callable[[Arch, Facts], dict[str, Any]] | None = _no_more_keys

    def read(self, name: str, keys: Config) -> Arch:
        """The spec that a config of this family says."""
        numbers = {key.says: key.read(keys, said) for said, key in self.keys.items()}
        for key, (value, why) in self.fixed.items():
            keys.only(key, value, why)
        if self.rope is not None:
            numbers |= read_rope(keys, self.rope, numbers)
        self.finish(keys, numbers)
        return self.build(name, **numbers)

    def write(self, arch: Arch, facts: Facts) -> dict[str, Any] | None:
        """The config that lays out the spec's facts; None where it lacks one that is asked."""
        if self.more is None:
            return None
        try:
            said = self.more(arch, facts)
            table = {n: key.write(facts) for n, key in self.keys.items() if n not in said}
            if self.rope is not None:
                table |= write_rope(facts["rope"], self.rope, facts["d_head"])
        except KeyError:
            return None
        return {"architectures": [self.model_class], "model_type": self.model_type, **table, **said}

    def their_names(self) -> dict[str, str]:
        """Our fields and the keys that say them, so that a broken rule names the user's word."""
        names = {key.says: said for said, key in self.keys.items()}
        if self.rope is not None:
            names["theta"] = self.rope.theta_key
        return {**names, "n_rows": names.get("vocab_size", "vocab_size"), "local": "layer_types"}
