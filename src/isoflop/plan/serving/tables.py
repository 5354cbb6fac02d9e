"""The neighbours of a serving plan, side by side: batches, formats of weights, kinds of attention.

Every row is a plan of its own on the same cluster with the same tensor parallelism. Where
no batch was asked for, formats and kinds are compared each at its own largest batch.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from isoflop.arch import Arch, Attention, LatentAttention
from isoflop.arch.spec import Full, Rope
from isoflop.count import Workload, bytes_kv_cache, bytes_weights, params
from isoflop.count.memory_weights import FORMATS
from isoflop.errors import Infeasible, InputError
from isoflop.plan.roofline import bytes_decode
from isoflop.plan.serving.asked import Asked
from isoflop.plan.serving.plan import ServePlan
from isoflop.plan.serving.step import Server, placed
from isoflop.quantity.node import ONE, plain

#: Rotated size and latent of DeepSeek-V2 and V3 (2405.04434, section 3.1.2).
D_KV_LATENT, D_HEAD_ROPE = 512, 64
#: Key-value heads of the grouped kind (Ainslie 2023, 2305.13245, recommend 8).
GROUPS = 8


@dataclass(frozen=True, slots=True)
class Alternative:
    """The model stored or built in another way; `server` None where it does not fit."""

    name: str
    asked: Asked
    server: Server | None
    own: bool

    @property
    def bytes_weights(self) -> int:
        return int(bytes_weights(self.asked.arch, self.asked.stored.weights).value)

    @property
    def bytes_kv_per_token(self) -> float:
        """One more token of one sequence, in every layer that keeps it."""
        return bytes_kv(self.asked, Workload.decode(1, 1), 1)

    @property
    def accelerators_min(self) -> int:
        return int(self.asked.request.accelerators_min(self.asked.batch or 1).value)

    def to_json(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "params": int(params(self.asked.arch).value),
            "bytes_weights": self.bytes_weights,
            "bytes_kv_per_token": self.bytes_kv_per_token,
            "accelerators_min": self.accelerators_min,
            "own": self.own,
            "plan": None if self.server is None else row_json(self.server),
        }


@dataclass(frozen=True, slots=True)
class AttentionRow(Alternative):
    """`gain` is by bytes of a step at the plan's batch and context: see `attentions`."""

    gain: float

    def to_json(self) -> dict[str, Any]:
        # The plain super() finds no class cell in a dataclass with slots.
        return {**Alternative.to_json(self), "gain_by_bytes": self.gain}


def batches(plan: ServePlan) -> tuple[Server, ...]:
    """The same server at powers of two up to what fits, at that, and at the plan's own batch."""
    powers = {1 << i for i in range(plan.batch_max.bit_length())}
    return tuple(plan.server.at(n) for n in sorted(powers | {plan.batch_max, plan.batch}))


def knee(servers: Sequence[Server]) -> Server:
    """The smallest batch that makes 95 % of the most tokens per second of any."""
    rates = [float(server.tokens_per_second.value) for server in servers]
    return next(s for s, rate in zip(servers, rates, strict=True) if rate >= 0.95 * max(rates))


def quantizations(plan: ServePlan) -> tuple[Alternative, ...]:
    """Weights in 16 bits, fp8 where the chip computes in it, int8, and int4 with group scales."""
    peaks, own = plan.cluster.chip.peaks, plan.precision
    half, eight = "bf16" if "bf16" in peaks else "fp16", ["fp8"] if "fp8" in peaks else []
    formats = {name: FORMATS[name] for name in (half, *eight, "int8", "int4")} | {own.name: own}
    # The cache stays as it is in the plan: only the weights change.
    kept = replace(plan.asked, tp=plan.tp, kv_precision=plan.asked.stored.kv_cache)
    order = sorted(formats.values(), key=lambda how: -how.bits_per_weight)
    rows = [(how, replace(kept, precision=how)) for how in order]
    return tuple(
        Alternative(how.name, asked, plan.server if how == own else _tried(asked), how == own)
        for how, asked in rows
    )


def attentions(plan: ServePlan) -> tuple[AttentionRow, ...]:
    """The model's own attention, and the same model with others in every layer.

    All else is kept, so the number of parameters changes. The gain is the bytes that a step
    of decoding moves with multi-head attention over those with this kind, at the plan's
    batch and mean context, the weights held at the model's own: only the cache differs, and
    what of it each of several accelerators must hold counts for each.
    """
    asked, own = plan.asked, kind_of(plan.asked.arch)
    work = Workload.decode(plan.batch, asked.request.mean_context)
    moved = float(bytes_decode(asked.arch, work, asked.stored).value)
    other = moved - bytes_kv(asked, work, 1)
    kinds = {name: replace(asked, arch=arch, tp=plan.tp) for name, arch in _variants(asked.arch)}
    step = {name: other + bytes_kv(kind, work, plan.tp) for name, kind in kinds.items()}
    return tuple(
        AttentionRow(name, kind, plan.server if name == own else _tried(kind), name == own,
                     step["MHA"] / step[name])
        for name, kind in kinds.items()
    )  # fmt: skip


def kind_of(arch: Arch) -> str:
    """The field's name for a model's attention; own where its layers differ.

    >>> from isoflop.arch.zoo import entry
    >>> [kind_of(entry(n).arch) for n in ("gpt2", "llama-3-8b", "qwen2.5-7b", "deepseek-v3")]
    ['MHA', 'GQA-8', 'GQA-4', 'MLA']
    """
    names = {_kind(layer.attention) for layer in arch.layers}
    return names.pop() if len(names) == 1 else "own"


def _kind(attention: Attention | LatentAttention) -> str:
    if isinstance(attention, LatentAttention):
        return "MLA"
    n = attention.n_kv_heads
    return {attention.n_heads: "MHA", 1: "MQA"}.get(n, f"GQA-{n}")


def bytes_kv(asked: Asked, work: Workload, tp: int) -> float:
    """The cache, unpaged, as `tp` accelerators together read it: copies count."""
    cache = bytes_kv_cache(asked.arch, work, asked.stored.kv_cache)
    copies = asked.request.copies_kv(tp)
    return sum(float(kind.value * copies.get(kind.name, ONE).value) for kind in cache.children)


def _variants(arch: Arch) -> Iterator[tuple[str, Arch]]:
    """The model's own kind in the place of the same one of the others, or before them."""
    heads = [layer.attention.n_heads for layer in arch.kinds.values()]
    grouped = all(n % GROUPS == 0 and n > GROUPS for n in heads)
    others = {
        "MHA": _with_attention(arch, None),
        **({f"GQA-{GROUPS}": _with_attention(arch, GROUPS)} if grouped else {}),
        "MQA": _with_attention(arch, 1),
        "MLA": replace(arch, layers=tuple(map(_latent, arch.layers))),
    }
    own = kind_of(arch)
    if own not in others:
        yield own, arch
    yield from (others | ({own: arch} if own in others else {})).items()


def _with_attention(arch: Arch, n_kv_heads: int | None) -> Arch:
    """Every layer with so many key-value heads, None as many as query heads."""
    layers = []
    for layer in arch.layers:
        own = layer.attention
        n = n_kv_heads or own.n_heads
        match own:
            case Attention():
                attention = replace(own, n_kv_heads=n)
            case LatentAttention():
                attention = Attention(own.n_heads, n, own.d_head_value, own.position)
        layers.append(replace(layer, attention=attention))
    return replace(arch, layers=tuple(layers))


def _latent(layer: Any) -> Any:
    """A layer with DeepSeek's latent; one that sees a window keeps what it has."""
    own = layer.attention
    if isinstance(own, LatentAttention) or not isinstance(own.span, Full):
        return layer
    position = own.position if isinstance(own.position, Rope) else Rope()
    position = replace(position, d_rotary=None)
    latent = LatentAttention(own.n_heads, D_KV_LATENT, own.d_head, D_HEAD_ROPE, own.d_head, None,
                             position)  # fmt: skip
    return replace(layer, attention=latent)


def _tried(asked: Asked) -> Server | None:
    try:
        return placed(asked)
    except (Infeasible, InputError):
        return None


def tables_json(plan: ServePlan) -> dict[str, Any]:
    """All three tables as plain data."""
    return {
        "batch": [row_json(row) for row in batches(plan)],
        "quantization": [row.to_json() for row in quantizations(plan)],
        "attention": [row.to_json() for row in attentions(plan)],
    }


def row_json(server: Server) -> dict[str, Any]:
    """The numbers of a server that tables compare, with the range of the price."""
    money = server.dollars_per_million_tokens
    return {
        "batch": server.batch,
        "batch_max": server.place.batch_max,
        "tp": server.place.tp,
        "pp": server.place.pp,
        "seconds_first_tokens": plain(server.first_tokens.value),
        "seconds_per_token": plain(server.decode.value),
        "tokens_per_second": plain(server.tokens_per_second.value),
        "tokens_per_second_copy": float(server.tokens_per_second.value) / server.n_copies,
        "dollars_per_million_tokens": plain(money.value),
        "dollars_interval": None if money.interval is None else money.interval.to_json(),
        "share_weights": float(server.memory.children[0].value / server.memory.value),
    }
