"""The lecture's memory calculator, with the right arithmetic.

The lecture scales GPT-3's width and depth linearly with the number of parameters, so that
a model of 70B is given a thousandth of its layers' area, and takes 10 % of the weights for
activations. Here a family's published sizes are counted exactly, and a size between two of
them is interpolated.
"""

from __future__ import annotations

import math
import re
from bisect import bisect_left
from dataclasses import dataclass

from isoflop.arch import Arch, zoo
from isoflop.count.memory import memory_inference
from isoflop.count.memory_cache import bytes_kv_cache
from isoflop.count.memory_weights import FORMATS, bytes_weights
from isoflop.count.params import CONVENTIONS, params
from isoflop.count.workload import Precision, Workload
from isoflop.errors import InputError, Problem, UnknownName
from isoflop.quantity.units import parse_count

GIB = 2**30


def calculate_llm_memory(
    num_params: float,
    precision: str = "fp16",
    batch_size: int = 1,
    seq_len: int = 2048,
    like: str = "gpt3",
) -> dict[str, float]:
    """Memory of inference in GiB: weights, key-value cache, activations with logits, total.

    `like` names a family of the zoo (gpt2, gpt3, llama-2, llama-3, palm, ...). At a size
    that the family publishes, by its count or by its name (70e9 for llama-2-70b), the
    numbers are those of that very model; between two sizes they are interpolated in the
    logarithm of the size, and beyond all of them the shape of the nearest is kept. `seq_len`
    tokens of each sequence are read and cached.

    Raises:
        InputError: a size, batch or length that is no positive number; a family that
            publishes one size only.
        UnknownName: a family or a precision that is not known.

    >>> {name: round(gib, 2) for name, gib in calculate_llm_memory(175e9).items()}
    {'weights': 325.23, 'kv_cache': 9.0, 'activations': 0.47, 'total': 334.69}
    """
    _check(num_params, precision, batch_size, seq_len)
    members = members_of(like)
    work = Workload.train(batch_size, seq_len)
    exact = next((m for m in members if num_params in m.sizes), None)
    bytes_by_part = (
        exact.parts(precision, work) if exact else between(members, num_params, precision, work)
    )
    gib = {name: float(size) / GIB for name, size in bytes_by_part.items()}
    return {**gib, "total": sum(gib.values())}


@dataclass(frozen=True, slots=True)
class Member:
    """One size of a family; `sizes` are the counts by which it may be called."""

    arch: Arch
    n_params: int
    sizes: frozenset[float]

    @property
    def n_inside(self) -> int:
        """Parameters of the layers: what depth and width multiply to."""
        return int(CONVENTIONS["kaplan"].count(params(self.arch)).value)

    @property
    def n_cached(self) -> float:
        """Numbers that a layer caches of each token."""
        token = bytes_kv_cache(self.arch, Workload.decode(1, 1), Precision.INT8)
        return float(token.value) / self.arch.n_layers

    def parts(self, precision: str, work: Workload) -> dict[str, float]:
        """Bytes, by the lecture's names."""
        working = Precision(precision) if precision in ("fp32", "fp16", "bf16") else Precision.BF16
        tree = memory_inference(self.arch, work, working)
        return {
            "weights": float(bytes_weights(self.arch, precision).value),
            "kv_cache": float(bytes_kv_cache(self.arch, work, working).value),
            "activations": float(
                tree.find("bytes_activations").value + tree.find("bytes_logits").value
            ),
        }


def between(
    members: list[Member], num_params: float, precision: str, work: Workload
) -> dict[str, float]:
    """Bytes at a size that no member has.

    Bytes per weight, the layers' share of the weights, the cache and the activations follow
    powers of the size between the two nearest members; the cache's is taken over the size
    of the layers alone, since an embedding caches nothing. Beyond the members see `_cache`
    and `_activations`.

    Raises:
        InputError: fewer than two members.
    """
    # Two with the same layers and another vocabulary (Mistral 7B v0.1 and v0.3) are one size.
    members = list({member.n_inside: member for member in members}.values())
    if len(members) < 2:
        rule = "is a published size: this family has no second one to interpolate with"
        raise InputError("calculate_llm_memory", [Problem("num_params", num_params, rule)])
    sizes = [m.n_params for m in members]
    first = min(max(bisect_left(sizes, num_params) - 1, 0), len(sizes) - 2)
    low, high = members[first], members[first + 1]
    ends = low.parts(precision, work), high.parts(precision, work)

    def outside(member: Member) -> float:
        return member.n_params - member.n_inside

    n_outside = _power(num_params, (low.n_params, outside(low)), (high.n_params, outside(high)))
    inside = max(num_params - n_outside, 0.01 * num_params)
    return {
        "weights": num_params
        * _power(num_params, (low.n_params, ends[0]["weights"] / low.n_params),
                 (high.n_params, ends[1]["weights"] / high.n_params)),
        "kv_cache": _cache(inside, (low, ends[0]["kv_cache"]), (high, ends[1]["kv_cache"])),
        "activations": _activations(num_params, (low, ends[0]["activations"]),
                                    (high, ends[1]["activations"])),
    }  # fmt: skip


def _activations(num_params: float, low: tuple[Member, float], high: tuple[Member, float]) -> float:
    """Bytes of the activations: a power between two members.

    Beyond them the nearest's grow with the width, by the cube root of the size. Their trend
    would not do: it differs with the tokens, so that more tokens could take less.
    """
    sizes = low[0].n_params, high[0].n_params
    if sizes[0] <= num_params <= sizes[1]:
        return _power(num_params, (sizes[0], low[1]), (sizes[1], high[1]))
    member, size = low if num_params < sizes[0] else high
    return size * math.pow(num_params / member.n_params, 1 / 3)


def _cache(inside: float, low: tuple[Member, float], high: tuple[Member, float]) -> float:
    """Bytes of the cache at a size of the layers: a power between two members.

    Beyond them the nearest's shape is kept: depth and width grow together, each with the
    cube root of the size, and key-value heads with the width, unless both members have as
    many. The trend of two members would not do: Llama 2's cache shrinks from 13B to 70B.
    """
    sizes = low[0].n_inside, high[0].n_inside
    if sizes[0] <= inside <= sizes[1]:
        return _power(inside, (sizes[0], low[1]), (sizes[1], high[1]))
    member, size = low if inside < sizes[0] else high
    power = 1 / 3 if low[0].n_cached == high[0].n_cached else 2 / 3
    return size * math.pow(inside / member.n_inside, power)


def _power(x: float, low: tuple[float, float], high: tuple[float, float]) -> float:
    """The power law through two points, at x."""
    slope = math.log(high[1] / low[1]) / math.log(high[0] / low[0])
    return low[1] * math.exp(slope * math.log(x / low[0]))


def members_of(like: str) -> list[Member]:
    """The members of a family by size, each size once.

    Raises:
        UnknownName: no model of the zoo belongs to it.
    """
    names = [n for n in zoo.names() if n == like or n.startswith((f"{like}-", f"{like}."))]
    if not names:
        known = {n.split("-")[0] for n in zoo.names()} | {
            n.rsplit("-", maxsplit=1)[0] for n in zoo.names()
        }
        raise UnknownName("family", like, known, f"known are {', '.join(sorted(known))}")
    found: dict[int, Member] = {}
    for name in names:
        entry = zoo.entry(name)
        count = int(params(entry.arch).value)
        published = {float(size) for size in (entry.published, _named(name)) if size}
        before = found[count].sizes if count in found else frozenset()
        found[count] = Member(entry.arch, count, before | {float(count)} | published)
    return [found[count] for count in sorted(found)]


def _named(name: str) -> int | None:
    """The size that a model is called by: 7B for llama-2-7b, whatever it counts."""
    last = name.rsplit("-", maxsplit=1)[-1]
    return parse_count(last) if re.fullmatch(r"[0-9.]+[mb]", last) else None


def _check(num_params: float, precision: str, batch_size: int, seq_len: int) -> None:
    real = isinstance(num_params, (int, float)) and not isinstance(num_params, bool)
    bad = []
    if not (real and math.isfinite(num_params) and num_params >= 1):
        bad.append(Problem("num_params", num_params, "is a finite number of at least 1"))
    for name, value in (("batch_size", batch_size), ("seq_len", seq_len)):
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            bad.append(Problem(name, value, "is a whole number of at least 1"))
    if bad:
        raise InputError("calculate_llm_memory", bad)
    if precision not in FORMATS:
        raise UnknownName("precision", precision, FORMATS, f"choose one of {', '.join(FORMATS)}")
