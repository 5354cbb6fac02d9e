"""Gemma 1 to 3: Llama with large heads, scaled embeddings and norms that train weight - 1."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Unpack

from isoflop.arch.families.common import attend, each, every, with_norm, with_window
from isoflop.arch.families.llama import Numbers, llama
from isoflop.arch.spec import Arch, QkNorm, RmsNorm, Rope, Wiring


def gemma(name: str, **numbers: Unpack[Numbers]) -> Arch:
    """Gemma 1: GeGLU, heads of 256, embeddings times sqrt(d_model), tied.

    Source: Mesnard 2024 (2403.08295), section 2 and table 1.
    """
    numbers["activation"] = numbers.get("activation", "gelu_tanh")
    numbers["tied"] = numbers.get("tied", True)
    plain = llama(name, **numbers)
    norm = RmsNorm(numbers.get("eps", 1e-6), unit_offset=True)
    scaled = replace(plain.embedding, scale=math.sqrt(plain.d_model))
    return replace(with_norm(plain, norm), embedding=scaled)


def gemma2(
    name: str,
    *,
    query_scalar: float = 256.0,
    window: int = 4096,
    local: Sequence[bool] | None = None,
    softcap_scores: float | None = 50.0,
    softcap_logits: float | None = 30.0,
    **numbers: Unpack[Numbers],
) -> Arch:
    """Gemma 2: a sandwich of norms, soft caps, every other layer local.

    Scores are scaled by query_scalar ** -0.5. Source: Riviere 2024 (2408.00118), section 2.
    """
    plain = gemma(name, **numbers)
    capped = each(
        plain,
        lambda layer: replace(
            attend(layer, scale=_power(query_scalar), logit_softcap=softcap_scores),
            wiring=Wiring.SANDWICH,
        ),
    )
    headed = replace(capped, head=replace(plain.head, softcap=softcap_logits))
    return with_window(headed, window, every(plain.n_layers, 2) if local is None else local)


def gemma3(
    name: str,
    *,
    query_scalar: float = 256.0,
    window: int = 1024,
    local: Sequence[bool] | None = None,
    theta_local: float = 10_000.0,
    softcap_scores: float | None = None,
    softcap_logits: float | None = None,
    **numbers: Unpack[Numbers],
) -> Arch:
    """Gemma 3, its text model: norms on queries and keys, five local layers to a global one.

    Local layers turn by `theta_local`, unscaled. Source: Kamath 2025 (2503.19786), section 2.
    """
    numbers["theta"] = numbers.get("theta", 1_000_000.0)
    plain = gemma(name, **numbers)
    norm = plain.layers[0].norm
    changed = each(
        plain,
        lambda layer: replace(
            attend(
                layer,
                qk_norm=QkNorm(norm),
                scale=_power(query_scalar),
                logit_softcap=softcap_scores,
            ),
            wiring=Wiring.SANDWICH,
        ),
    )
    headed = replace(changed, head=replace(plain.head, softcap=softcap_logits))
    where = every(plain.n_layers, 6) if local is None else local
    near = with_window(headed, window, where)
    turned = tuple(
        attend(layer, position=Rope(theta_local)) if is_local else layer
        for layer, is_local in zip(near.layers, where, strict=True)
    )
    return replace(near, layers=turned)


def _power(query_scalar: float) -> float:
    """What scores are multiplied by; 0, which no rule allows, where there is no such number."""
    return query_scalar**-0.5 if query_scalar > 0 else 0.0
