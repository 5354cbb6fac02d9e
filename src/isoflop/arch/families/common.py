"""What the families share: the whole around a layer, and changes to a family's layers.

Most families are another one with a difference; a builder here says the difference.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

from isoflop.arch.rules import LARGEST_SIZE
from isoflop.arch.spec import (
    Arch,
    Attention,
    Embedding,
    Head,
    Layer,
    Norm,
    Position,
    Span,
    Window,
)
from isoflop.errors import InputError, Problem


def repeat(name: str, layer: Layer, n_layers: int) -> tuple[Layer, ...]:
    """`n_layers` equal layers, at least one."""
    whole = isinstance(n_layers, int) and not isinstance(n_layers, bool)
    if not whole or not 1 <= n_layers <= Arch.MAX_LAYERS:
        rule = f"is a whole number from 1 to {Arch.MAX_LAYERS:,}"
        raise InputError(name, [Problem("n_layers", n_layers, rule)])
    return (layer,) * n_layers


def head_size(name: str, d_model: int, n_heads: int, d_head: int | None = None) -> int:
    """The head size given, or d_model / n_heads where that is whole."""
    if d_head is not None:
        return d_head
    sizes = {"d_model": d_model, "n_heads": n_heads}
    bad = [
        Problem(field, value, f"is a whole number from 1 to {LARGEST_SIZE:,}")
        for field, value in sizes.items()
        if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= LARGEST_SIZE
    ]
    if not bad and d_model % n_heads:
        rule = f"divides d_model={d_model} when no head size is given"
        bad = [Problem("n_heads", n_heads, rule, "set d_head")]
    if bad:
        raise InputError(name, bad)
    return d_model // n_heads


def decoder(
    name: str,
    *,
    d_model: int,
    n_layers: int,
    vocab_size: int,
    max_seq_len: int,
    layer: Layer,
    tied: bool,
    n_rows: int | None = None,
    embedding: Embedding | None = None,
    head: Head | None = None,
) -> Arch:
    """A stack of one kind of layer whose norm is the final one too."""
    return Arch(
        name=name,
        d_model=d_model,
        vocab_size=vocab_size,
        max_seq_len=max_seq_len,
        embedding=embedding or Embedding(n_rows=vocab_size if n_rows is None else n_rows),
        layers=repeat(name, layer, n_layers),
        head=head or Head(tied=tied),
        final_norm=layer.norm,
    )


def each(arch: Arch, change: Callable[[Layer], Layer]) -> Arch:
    """The same change made to every kind of layer; names stay."""
    changed = {name: change(layer) for name, layer in arch.kinds.items()}
    return replace(arch, layers=tuple(changed[layer.name] for layer in arch.layers))


def with_norm(arch: Arch, norm: Norm) -> Arch:
    """Another norm in every layer and at the end."""
    return replace(each(arch, lambda layer: replace(layer, norm=norm)), final_norm=norm)


def split(
    arch: Arch, chosen: Sequence[bool], change: Callable[[Layer], Layer], names: tuple[str, str]
) -> Arch:
    """The `chosen` layers changed. Where two kinds result, `names` has the chosen one's first.

    Raises:
        InputError: not one choice per layer.
    """
    if len(chosen) != arch.n_layers:
        rule = f"has one entry for each of {arch.n_layers} layers"
        raise InputError(arch.name, [Problem(names[0], len(chosen), rule)])
    if not any(chosen):
        return arch
    if all(chosen):
        return each(arch, change)
    kinds = {
        name: (
            replace(change(layer), name=_joined(name, names[0])),
            replace(layer, name=_joined(name, names[1])),
        )
        for name, layer in arch.kinds.items()
    }
    layers = [
        kinds[layer.name][0 if picked else 1]
        for layer, picked in zip(arch.layers, chosen, strict=True)
    ]
    return replace(arch, layers=tuple(layers))


def _joined(old: str, new: str) -> str:
    """A kind's name after a split: the usual name `layer` gives way, another one is kept."""
    return new if old == "layer" else f"{old}_{new}"


def attend(layer: Layer, **changes: object) -> Layer:
    """The layer with fields of its attention replaced."""
    return replace(layer, attention=replace(layer.attention, **changes))  # type: ignore[arg-type]


def at_position(position: Position) -> Callable[[Layer], Layer]:
    """A change: attention told its positions in another way."""
    return lambda layer: attend(layer, position=position)


def with_window(arch: Arch, window: int | None, local: Sequence[bool] | None = None) -> Arch:
    """Attention to the `window` latest keys in the `local` layers (None: in all)."""
    if window is None:
        return arch
    span: Span = Window(window)
    where = (True,) * arch.n_layers if local is None else local
    return split(arch, where, lambda layer: attend(layer, span=span), ("local", "global"))


def every(n_layers: int, period: int) -> tuple[bool, ...]:
    """All layers but each `period`-th.

    >>> every(5, 2)
    (True, False, True, False, True)
    """
    return tuple((i + 1) % period != 0 for i in range(n_layers))


def grouped(layer: Layer) -> Attention:
    """A layer's attention where the family has no other kind."""
    assert isinstance(layer.attention, Attention)
    return layer.attention
