"""A sensible shape for "about N parameters": what a scaling law's N looks like as a model.

Loss depends on the number of parameters far more than on how they are spread: over a wide
range of width, depth and d_ff it moves by a few percent (Kaplan 2020, 2001.08361, section 3.1
and figure 5). So the shapes that work in practice decide:

* width over depth 120 from d_model 2048 on (Llama 7B: 4096 / 32, 65B: 8192 / 80, 405B:
  16384 / 126), 64 below (GPT-2: 768 / 12);
* heads of 64 up to d_model 2048, of 128 beyond, then in eights, so that eight accelerators
  share them evenly; up to eight key-value heads (Llama 3, 2407.21783, table 3);
* d_ff 3.5 times d_model (Llama 3 8B, 70B), 4 times for gpt; other usual multiples where they come nearer;
* an even number of layers from 16 on, for pipelines;
* embedding and head tied below 4e9 parameters, as in Llama 3.2 1B and 3B.

The rules choose; the parameters are then those of the spec, counted.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import TypeAlias

from isoflop.arch import Arch, gpt, llama
from isoflop.count.params import params
from isoflop.errors import InputError, Problem, UnknownName
from isoflop.quantity.units import format_count

#: How far the count may lie from what was asked: first tried, and at most.
CLOSE, CLOSEST = 0.025, 0.05
SMALLEST, LARGEST = 1e6, 1e13
TIED_BELOW = 4e9
#: d_ff / d_model by family, the usual one first: Llama 3 8B and 70B, and GPT-2.
WIDENINGS = {"llama": (3.5, 3.0, 4.0, 8 / 3), "gpt": (4.0, 3.5, 3.0, 8 / 3)}


@dataclass(frozen=True, slots=True)
class Sizes:
    """The few numbers that a shape is chosen by."""

    d_model: int
    n_layers: int
    widening: float
    vocab_size: int
    max_seq_len: int
    tied: bool

    @property
    def n_heads(self) -> int:
        return self.d_model // (64 if self.d_model <= 2048 else 128)

    @property
    def d_ff(self) -> int:
        return 64 * round(self.widening * self.d_model / 64)

    def oddness(self, widening: float) -> float:
        """How far from the usual ratios, in logs."""
        usual = 120 if self.d_model >= 2048 else 64
        narrow = abs(math.log(self.d_model / self.n_layers / usual))
        return narrow + abs(math.log(self.widening / widening))


def _llama(name: str, sizes: Sizes) -> Arch:
    return llama(
        name,
        d_model=sizes.d_model,
        n_layers=sizes.n_layers,
        n_heads=sizes.n_heads,
        n_kv_heads=math.gcd(sizes.n_heads, 8),
        d_ff=sizes.d_ff,
        vocab_size=sizes.vocab_size,
        max_seq_len=sizes.max_seq_len,
        tied=sizes.tied,
    )


def _gpt(name: str, sizes: Sizes) -> Arch:
    return gpt(
        name,
        d_model=sizes.d_model,
        n_layers=sizes.n_layers,
        n_heads=sizes.n_heads,
        d_ff=sizes.d_ff,
        vocab_size=sizes.vocab_size,
        max_seq_len=sizes.max_seq_len,
    )


Build: TypeAlias = Callable[[str, Sizes], Arch]
BUILDERS: dict[str, Build] = {"llama": _llama, "gpt": _gpt}


def shape(
    n_params: float,
    *,
    family: str = "llama",
    vocab_size: int = 32_000,
    max_seq_len: int = 4096,
    name: str = "",
) -> Arch:
    """The model of `family` (llama or gpt) whose count is within 5 % of `n_params`.

    Raises:
        InputError: `n_params` is out of 1e6 to 2e12, or no shape comes near, as where the
            embedding alone is larger.
        UnknownName: no rules for this family.

    >>> model = shape(8.0e9, vocab_size=128256)
    >>> model.n_layers, model.d_model, params(model).value
    (32, 4096, 8030261248)
    """
    if family not in BUILDERS:
        raise UnknownName("family with rules of shape", family, BUILDERS, ", ".join(BUILDERS))
    if not SMALLEST <= n_params <= LARGEST:
        rule = f"lies between {SMALLEST:g} and {LARGEST:g}"
        raise InputError("shape", [Problem("n_params", float(f"{n_params:.4g}"), rule)])
    build, usual = BUILDERS[family], WIDENINGS[family][0]
    found = list(_candidates(n_params, family, vocab_size, max_seq_len))
    for most in (CLOSE, CLOSEST):
        near = [sizes for count, sizes in found if abs(count / n_params - 1) <= most]
        if near:
            about = format_count(n_params).replace(" ", "").lower()
            return build(
                name or f"{family}-shape-{about}", min(near, key=lambda s: s.oddness(usual))
            )
    rule = f"has a shape within 5 % with vocab_size={vocab_size:,}"
    raise InputError("shape", [Problem("n_params", n_params, rule, "give another vocabulary")])


def _candidates(
    n_params: float, family: str, vocab_size: int, max_seq_len: int
) -> Iterator[tuple[int, Sizes]]:
    """The nearest depth at each width and widening, with its count.

    The count is linear in the number of layers: two counts give it for all.
    """
    build = BUILDERS[family]
    for d_model in _widths(n_params):
        for widening in WIDENINGS[family]:
            sizes = [
                Sizes(d_model, n, widening, vocab_size, max_seq_len, n_params < TIED_BELOW)
                for n in (1, 2)
            ]
            one, two = (int(params(build("candidate", s)).value) for s in sizes)
            layers = _whole((n_params - one) / (two - one) + 1)
            if 1 <= layers <= Arch.MAX_LAYERS:
                yield one + (layers - 1) * (two - one), replace(sizes[0], n_layers=layers)


def _widths(n_params: float) -> Iterator[int]:
    """Widths worth a look: about where 12 d_model^2 n_layers = N at the usual depth."""
    usual = (120 * n_params / 12) ** (1 / 3)
    steps = (*range(64, 512, 64), *range(512, 2048, 256), *range(2048, 65_536, 1024))
    return (d for d in steps if usual / 5 <= d <= 1.8 * usual)


def _whole(layers: float) -> int:
    return 2 * round(layers / 2) if layers >= 16 else round(layers)
