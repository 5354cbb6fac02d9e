"""Hugging Face `config.json` to `Arch`, and back.

One small function per `model_type`, in a registry: `reads` marks those that read,
`WRITERS` lists those that write. A key absent from the config takes the default of
the transformers class (5.x), and the reading says so. A config is data: no class is
imported from it and `auto_map` is ignored.

A writer only lays out the fields; whether the family can say the spec is decided by
reading the result back and comparing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, fields, is_dataclass
from typing import Any, TypeAlias

from isoflop.arch.config import Config
from isoflop.arch.families import gpt, llama
from isoflop.arch.hf_keys import ACTIVATION_WORDS, ACTIVATIONS, HARMLESS
from isoflop.arch.rope import read_rope, write_rope
from isoflop.arch.spec import Arch, Attention, Dense, Layer, Rope
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


@dataclass(frozen=True, slots=True)
class Reader:
    """How one model_type is read: the class it names, its second names for keys, the reading."""

    model_class: str
    read: Callable[[str, Config], Arch]
    second_names: Mapping[str, str]


READERS: dict[str, Reader] = {}
Read: TypeAlias = Callable[[str, Config], Arch]


def reads(model_type: str, model_class: str, **second_names: str) -> Callable[[Read], Read]:
    """Register the reader of a `model_type`. `second_names` maps an alias to the key it means."""

    def register(read: Read) -> Read:
        READERS[model_type] = Reader(model_class, read, second_names)
        return read

    return register


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
    reader = _reader(config, name)
    keys = Config(_canonical(config, reader, name), where=name)
    try:
        arch = reader.read(name, keys)
    except InputError as error:
        keys.close()  # a wrong type comes first: what it was replaced by may break rules
        raise keys.rename(error) from None
    keys.close()
    unread = keys.unread()
    ignored = tuple(sorted(key for key in unread if key in HARMLESS))
    unknown = tuple(sorted(key for key in unread if key not in HARMLESS))
    return Reading(arch, ignored, unknown, tuple(keys.defaulted))


def to_hf(arch: Arch) -> dict[str, Any]:
    """A `config.json` that says this spec, so that `from_hf(to_hf(a), a.name) == a`.

    Raises:
        InputError: no family can say it; lists the fields that the nearest one cannot.
    """
    refused: list[InputError] = []
    for write in WRITERS:
        config = write(arch)
        if config is None:
            continue
        try:
            _check_says(config, arch)
        except InputError as error:
            refused.append(error)
        else:
            return config
    if refused:
        raise min(refused, key=lambda error: len(error.problems))
    rule = "has learned positions (gpt2) or rotary ones (llama), attention and a dense feed-forward"
    raise InputError(arch.name, [Problem("layers", arch.layers[0].name, rule)])


# --- the families -----------------------------------------------------------------------


@reads(
    "gpt2",
    "GPT2LMHeadModel",
    hidden_size="n_embd",
    max_position_embeddings="n_positions",
    num_attention_heads="n_head",
    num_hidden_layers="n_layer",
)
def _read_gpt2(name: str, keys: Config) -> Arch:
    keys.only("scale_attn_weights", True, "the spec scales scores by 1 / sqrt(d_head)")
    keys.only("scale_attn_by_inverse_layer_idx", False, "the spec has no scale per layer")
    keys.only("add_cross_attention", False, "a gpt2 spec has no encoder")
    return gpt(
        name,
        d_model=keys.whole("n_embd", 768),
        n_layers=keys.whole("n_layer", 12),
        n_heads=keys.whole("n_head", 12),
        d_ff=keys.whole_or_none("n_inner"),
        vocab_size=keys.whole("vocab_size", 50257),
        max_seq_len=keys.whole("n_positions", 1024),
        activation=keys.choice("activation_function", ACTIVATIONS, "gelu_new"),
        eps=keys.real("layer_norm_epsilon", 1e-5),
        tied=keys.flag("tie_word_embeddings", True),
        dropout=keys.real("resid_pdrop", 0.1),
        dropout_attention=keys.real("attn_pdrop", 0.1),
        dropout_embedding=keys.real("embd_pdrop", 0.1),
    )


def _write_gpt2(arch: Arch) -> dict[str, Any] | None:
    match arch.layers[0]:
        case Layer(attention=Attention(position=None) as attention, feed_forward=Dense() as dense):
            pass
        case _:
            return None
    return {
        "architectures": ["GPT2LMHeadModel"],
        "model_type": "gpt2",
        "activation_function": ACTIVATION_WORDS[dense.activation],
        "attn_pdrop": float(attention.dropout),
        "embd_pdrop": float(arch.embedding.dropout),
        "layer_norm_epsilon": _eps(arch),
        "n_embd": arch.d_model,
        "n_head": attention.n_heads,
        "n_inner": dense.d_ff,
        "n_layer": arch.n_layers,
        "n_positions": arch.max_seq_len,
        "resid_pdrop": float(arch.layers[0].dropout),
        "tie_word_embeddings": arch.head.tied,
        "vocab_size": arch.vocab_size,
    }


@reads("llama", "LlamaForCausalLM")
def _read_llama(name: str, keys: Config) -> Arch:
    rope = read_rope(keys, max_seq_len=keys.whole("max_position_embeddings", 2048))
    return llama(
        name,
        d_model=keys.whole("hidden_size", 4096),
        n_layers=keys.whole("num_hidden_layers", 32),
        n_heads=keys.whole("num_attention_heads", 32),
        n_kv_heads=keys.whole_or_none("num_key_value_heads"),
        d_head=keys.whole_or_none("head_dim"),
        d_ff=keys.whole("intermediate_size", 11008),
        vocab_size=keys.whole("vocab_size", 32000),
        max_seq_len=keys.whole("max_position_embeddings", 2048),
        theta=rope.theta,
        scaling=rope.scaling,
        activation=keys.choice("hidden_act", ACTIVATIONS, "silu"),
        eps=keys.real("rms_norm_eps", 1e-6),
        tied=keys.flag("tie_word_embeddings", False),
        bias_attention=keys.flag("attention_bias", False),
        bias_feed_forward=keys.flag("mlp_bias", False),
        dropout_attention=keys.real("attention_dropout", 0.0),
    )


def _write_llama(arch: Arch) -> dict[str, Any] | None:
    match arch.layers[0]:
        case Layer(
            attention=Attention(position=Rope() as rope) as attention, feed_forward=Dense() as dense
        ):
            pass
        case _:
            return None
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "attention_bias": attention.bias_qkv,
        "attention_dropout": float(attention.dropout),
        "head_dim": attention.d_head,
        "hidden_act": ACTIVATION_WORDS[dense.activation],
        "hidden_size": arch.d_model,
        "intermediate_size": dense.d_ff,
        "max_position_embeddings": arch.max_seq_len,
        "mlp_bias": dense.bias,
        "num_attention_heads": attention.n_heads,
        "num_hidden_layers": arch.n_layers,
        "num_key_value_heads": attention.n_kv_heads,
        "rms_norm_eps": _eps(arch),
        "tie_word_embeddings": arch.head.tied,
        "vocab_size": arch.vocab_size,
        **write_rope(rope),
    }


#: Each lays a spec out in its family's keys, or gives None where the kind of layer is another.
WRITERS: tuple[Callable[[Arch], dict[str, Any] | None], ...] = (_write_gpt2, _write_llama)

# --- below the families -----------------------------------------------------------------


def _reader(config: dict[str, Any], name: str) -> Reader:
    if not isinstance(config, dict) or not all(isinstance(key, str) for key in config):
        raise InputError(name, [Problem("config", config, "is a table of keys and values")])
    model_type = config.get("model_type")
    known = f"known: {', '.join(sorted(READERS))}"
    if not isinstance(model_type, str):
        shown = "nothing" if model_type is None else model_type
        raise InputError(name, [Problem("model_type", shown, "is given, a word", known)])
    if model_type not in READERS:
        raise UnknownName("model_type", model_type, READERS, known)
    return READERS[model_type]


def _canonical(config: dict[str, Any], reader: Reader, name: str) -> dict[str, Any]:
    """The config under first names, without an `architectures` that names the usual class."""
    keys = {key: value for key, value in config.items() if key != "model_type"}
    if keys.get("architectures") == [reader.model_class]:
        del keys["architectures"]
    for second, first in reader.second_names.items():
        if second in keys:
            value = keys.pop(second)
            if keys.setdefault(first, value) != value:
                problem = Problem(second, value, f"equals {first}, which means the same")
                raise InputError(name, [problem])
    return keys


def _check_says(config: dict[str, Any], arch: Arch) -> None:
    """`config` reads back as `arch` and transformers accepts it, or what it cannot say."""
    family = config["model_type"]
    said = from_hf(config, arch.name)
    problems = [
        Problem(path, _show(ours), f"is {_show(theirs)}: all that a {family} config can say here")
        for path, ours, theirs in differences(arch, said)
    ]
    n_heads = config["n_head" if family == "gpt2" else "num_attention_heads"]
    if arch.d_model % n_heads:  # LlamaConfig.validate_architecture and GPT2Attention both refuse
        rule = f"divides d_model={arch.d_model}: transformers' {family} asks for it"
        problems.append(Problem("n_heads", n_heads, rule))
    if problems:
        raise InputError(arch.name, problems)


def _show(value: object) -> str:
    kind = getattr(value, "kind", None)
    return str(kind) if kind is not None else str(value)


def differences(a: Any, b: Any, path: str = "") -> Iterator[tuple[str, Any, Any]]:
    """The fields in which two values of one type differ, as (path, in a, in b).

    >>> list(differences(Dense(8), Dense(9)))
    [('d_ff', 8, 9)]
    """
    if a == b:
        return
    if is_dataclass(a) and type(a) is type(b):
        for field in fields(a):
            inner = f"{path}.{field.name}" if path else field.name
            yield from differences(getattr(a, field.name), getattr(b, field.name), inner)
    elif isinstance(a, tuple) and isinstance(b, tuple) and len(a) == len(b):
        first = next(i for i, pair in enumerate(zip(a, b, strict=True)) if pair[0] != pair[1])
        yield from differences(a[first], b[first], f"{path}[{first}]")
    else:
        yield path, a, b


def _eps(arch: Arch) -> float:
    return float(arch.layers[0].norm.eps)
