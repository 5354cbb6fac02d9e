"""The model of a row: the zoo's where its shape agrees, otherwise built from the row's shape."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import cache

from isoflop.arch import Arch, Attention, Dense, Experts, gpt, llama
from isoflop.arch.spec.positions import Learned
from isoflop.arch.zoo import entry, names
from isoflop.check.published.table import Cells

#: What publications call models of the zoo, lower case, without what stands in brackets.
ZOO = {
    "llama2-7b": "llama-2-7b",
    "llama2-13b": "llama-2-13b",
    "llama2-70b": "llama-2-70b",
    "llama3-8b": "llama-3-8b",
    "llama3-70b": "llama-3-70b",
    "llama3.1-405b": "llama-3.1-405b",
    "llama-7b": "llama-1-7b",
    "llama-13b": "llama-1-13b",
    "llama-33b": "llama-1-33b",
    "llama-65b": "llama-1-65b",
    "gpt3-175b": "gpt3-175b",
    "gpt-3-175b": "gpt3-175b",
    "gpt-174.6b": "gpt3-175b",
    "deepseekv3": "deepseek-v3",
    "qwen3-30b-a3b": "qwen3-30b-a3b",
    "qwen3-235b-a22b": "qwen3-235b-a22b",
    **{f"gpt-{n}b": f"megatron-{n}b" for n in ("1.7", "3.6", "7.5", "18.4", "39.1", "76.1",
                                               "145.6", "310.1", "529.6")},
}  # fmt: skip

#: Vocabularies that a table rounds.
ROUNDED = {"~250k": 250_880}
#: No size of a model is larger.
LARGEST_SIZE = 10**7
#: Megatron pads GPT-2's 50,257 to a multiple of 128 x 8.
VOCAB_GPT = 51_200


class Skip(Exception):
    """Why a row has no prediction."""


def read_arch(cells: Cells, seq_len: int) -> Arch:
    """The model of a row, made for at least `seq_len` tokens.

    Raises:
        Skip: the zoo does not know the model and the row does not state its shape.
    """
    name = zoo_name(cells.text("model"))
    if name is None:
        return _from_shape(cells, seq_len)
    arch = _zoo(name, seq_len)
    said = _said(cells)
    differs = sorted(column for column, value in said.items() if value not in _has(arch, column))
    if not differs:
        _tell_left_out(name, cells)
        return arch
    cells.assume(f"model: the row's own shape, not {name}'s ({', '.join(differs)} differ)")
    return _from_shape(cells, seq_len)


def zoo_name(text: str) -> str | None:
    """The zoo's name of a model.

    >>> zoo_name("LLAMA3.1_405B"), zoo_name("DeepSeekV3 (w/o MTP)"), zoo_name("GPT-22B")
    ('llama-3.1-405b', 'deepseek-v3', None)
    """
    plain = text.casefold().split(" (")[0].strip().replace("_", "-")
    return ZOO.get(plain, plain if plain in names() else None)


def _tell_left_out(name: str, cells: Cells) -> None:
    if name == "deepseek-v3" and "w/o mtp" not in cells.text("model").casefold():
        cells.assume("model: DeepSeek-V3 without its prediction head, about 4 % of its FLOPs")


@cache
def _zoo(name: str, seq_len: int) -> Arch:
    arch = entry(name).arch
    if seq_len <= arch.max_seq_len:
        return arch
    if isinstance(arch.embedding.position, Learned):
        arch = replace(arch, embedding=replace(arch.embedding, position=Learned(seq_len)))
    return replace(arch, max_seq_len=seq_len)


def _said(cells: Cells) -> dict[str, int]:
    """The sizes that the row states."""
    columns = ("layers", "hidden", "heads", "kv_heads", "ffn")
    found = {c: cells.whole(c, LARGEST_SIZE) for c in columns} | {"vocab": _vocab(cells)}
    return {column: value for column, value in found.items() if value is not None}


def _vocab(cells: Cells) -> int | None:
    rounded = ROUNDED.get(cells.text("vocab"))
    return cells.whole("vocab", LARGEST_SIZE) if rounded is None else rounded


def _has(arch: Arch, column: str) -> set[int]:
    """What the model has of a size; several where its layers differ."""
    match column:
        case "layers":
            return {arch.n_layers}
        case "hidden":
            return {arch.d_model}
        case "vocab":
            return {arch.vocab_size, arch.embedding.n_rows}
    return {size for c, size in _of_layers(arch) if c == column}


def _of_layers(arch: Arch) -> Iterator[tuple[str, int]]:
    for layer in arch.kinds.values():
        attention, feed_forward = layer.attention, layer.feed_forward
        yield "heads", attention.n_heads
        kv = attention.n_kv_heads if isinstance(attention, Attention) else attention.n_heads
        yield "kv_heads", kv
        match feed_forward:
            case Dense(d_ff=width):
                yield "ffn", width
            case Experts(expert=expert):
                yield "ffn", expert.d_ff


def _from_shape(cells: Cells, seq_len: int) -> Arch:
    """A GPT where the feed-forward is four times as wide as the model, otherwise a Llama."""
    said = _said(cells)
    if cells.text("active_params"):
        raise Skip("a mixture of experts whose shape the zoo does not hold")
    if "hidden" not in said:
        raise Skip("the model's shape is not stated")
    heads, layers = _heads(cells, said), _layers(cells, said)
    name, vocab = cells.text("model") or "model", said.get("vocab")
    if vocab is None:
        cells.assume(f"vocab: {VOCAB_GPT}, as Megatron pads GPT-2's")
    elif cells.text("vocab") in ROUNDED:
        cells.assume(f"vocab: {vocab} where the table says {cells.text('vocab')}")
    d_ff, kv_heads = said.get("ffn", 4 * said["hidden"]), said.get("kv_heads", heads)
    return _build(name, said["hidden"], layers, heads, kv_heads, d_ff, vocab or VOCAB_GPT, seq_len)


def _heads(cells: Cells, said: dict[str, int]) -> int:
    """Where they are left out: as many as split evenly and are 128 wide or a little more."""
    if "heads" in said:
        return said["heads"]
    hidden, tp = said["hidden"], cells.whole("tp") or 1
    heads = next((n for n in range(hidden // 128, 0, -1) if n % tp == hidden % n == 0), 1)
    cells.assume(f"heads: of size {hidden // heads}")
    return heads


def _layers(cells: Cells, said: dict[str, int]) -> int:
    """Where it is left out: the multiple of pp nearest to the size label over 12 hidden^2."""
    if "layers" in said:
        return said["layers"]
    label, pp = cells.whole("params", 10**15), cells.whole("pp") or 1
    if label is None:
        raise Skip("neither layers nor parameters are stated")
    cells.assume("layers: from the size label over 12 hidden^2")
    return max(pp, pp * round(label / (12 * said["hidden"] ** 2) / pp))


@cache
def _build(
    name: str, d_model: int, n_layers: int, n_heads: int, n_kv_heads: int, d_ff: int,
    vocab_size: int, seq_len: int,
) -> Arch:  # fmt: skip
    if d_ff == 4 * d_model and n_kv_heads == n_heads and "llama" not in name.casefold():
        return gpt(name, d_model=d_model, n_layers=n_layers, n_heads=n_heads,
                   vocab_size=vocab_size, max_seq_len=seq_len)  # fmt: skip
    return llama(name, d_model=d_model, n_layers=n_layers, n_heads=n_heads, n_kv_heads=n_kv_heads,
                 d_ff=d_ff, vocab_size=vocab_size, max_seq_len=seq_len)  # fmt: skip
