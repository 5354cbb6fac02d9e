"""`Arch` to a Hugging Face `config.json`.

A family only lays out the facts; whether it can say the spec is decided by reading the
result back and comparing.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import fields, is_dataclass, replace
from typing import Any

from isoflop.arch.hf.family import Facts, Family
from isoflop.arch.hf.read import from_hf
from isoflop.arch.hf.registry import FAMILIES
from isoflop.arch.spec import (
    Arch,
    Attention,
    Dense,
    Experts,
    LatentAttention,
    LayerNorm,
    Learned,
    Rope,
    Window,
)
from isoflop.errors import InputError, Problem


def to_hf(arch: Arch) -> dict[str, Any]:
    """A `config.json` that says this spec, so that `from_hf(to_hf(a), a.name) == a`.

    Raises:
        InputError: no family can say it; lists the fields that the nearest one cannot.
    """
    found = facts(arch) | _text_config(arch)
    refused: list[InputError] = []
    unfit: list[InputError] = []  # of families in which the facts do not fit together
    for family in FAMILIES.values():
        config = family.write(arch, found)
        if config is None:
            continue
        try:
            said = from_hf(config, arch.name)
        except InputError as error:
            unfit.append(error)
            continue
        problems = list(_unsaid(config, arch, said, family))
        if not problems:
            return config
        refused.append(InputError(arch.name, problems))
    if nearest := refused or unfit:
        raise min(nearest, key=lambda error: len(error.problems))
    written = ", ".join(sorted(name for name, f in FAMILIES.items() if f.more is not None))
    rule = f"is a kind of layer that a family writes ({written})"
    raise InputError(arch.name, [Problem("layers", arch.layers[0].name, rule)])


def _text_config(arch: Arch) -> Facts:
    """The config of a language model behind a tower, where a family of its own can say it."""
    if arch.vision is None:
        return {}
    try:
        return {"text_config": to_hf(replace(arch, vision=None))}
    except InputError:
        return {}


# --- the facts of a spec under the builders' names --------------------------------------


def facts(arch: Arch) -> Facts:
    """What a spec says, under the names of the builders' arguments.

    A fact is taken from the first layer that has it; reading back finds out whether it
    holds in all of them.
    """
    layer = arch.layers[0]
    found: Facts = {
        "d_model": arch.d_model,
        "n_layers": arch.n_layers,
        "vocab_size": arch.vocab_size,
        "max_seq_len": arch.max_seq_len,
        "d_embed": arch.embedding.d_embed,
        "embedding_scale": arch.embedding.scale,
        "dropout_embedding": arch.embedding.dropout,
        "tied": arch.head.tied,
        "logits_scale": arch.head.scale,
        "logits_divisor": inverse(arch.head.scale, lambda x: 1 / x, 1 / arch.head.scale),
        "softcap_logits": arch.head.softcap,
        "dropout": layer.dropout,
        "residual_scale": layer.residual_scale,
        "wiring": layer.wiring,
        "eps": layer.norm.eps,
    }
    if isinstance(layer.norm, LayerNorm):
        found["norm_weights"] = layer.norm.weight
    if isinstance(arch.embedding.position, Learned):
        found["position_offset"] = arch.embedding.position.offset
    kinds = list(reversed(arch.kinds.values()))
    for kind in kinds:
        found |= _of_attention(kind.attention)
    # A dense feed-forward's width goes before that of experts, wherever it stands.
    for kind in sorted(kinds, key=lambda kind: isinstance(kind.feed_forward, Dense)):
        found |= _of_feed_forward(kind.feed_forward)
    windows = [kind.attention.span.window for kind in arch.kinds.values()
               if isinstance(kind.attention, Attention) and isinstance(kind.attention.span, Window)]  # fmt: skip
    return found | {"window": windows[0] if windows else None}


def _of_attention(attention: Attention | LatentAttention) -> Facts:
    found: Facts = {
        "n_heads": attention.n_heads,
        "bias_attention": attention.bias_qkv,
        "bias_qkv": attention.bias_qkv,
        "dropout_attention": attention.dropout,
    }
    if isinstance(attention.position, Rope):
        rope = attention.position
        found |= {"rope": rope, "d_rotary": rope.d_rotary, "interleaved": rope.interleaved}
    if isinstance(attention, LatentAttention):
        names = ("d_kv_latent", "d_q_latent", "d_head_nope", "d_head_rope", "d_head_value")
        latent = {name: getattr(attention, name) for name in names}
        return found | latent | {"d_head": attention.d_head_rope}
    scale = attention.scale
    if scale is not None:
        found["query_scalar"] = inverse(scale, lambda x: x**-0.5, 1 / scale / scale)
    return found | {
        "n_kv_heads": attention.n_kv_heads,
        "d_head": attention.d_head,
        "scale": scale,
        "softcap_scores": attention.logit_softcap,
        "qk_norm": attention.qk_norm is not None,
    }


def _of_feed_forward(block: Dense | Experts) -> Facts:
    if isinstance(block, Dense):
        named = {"d_ff": block.d_ff, "activation": block.activation, "gated": block.gated}
        return {
            **named,
            "bias": block.bias,
            "bias_feed_forward": block.bias,
            "bias_dense": block.bias,
        }
    return {
        "d_ff": block.expert.d_ff,
        "activation": block.expert.activation,
        "bias_dense": block.shared.bias if block.shared else False,
        "n_experts": block.n_experts,
        "n_active": block.n_active,
        "d_ff_expert": block.expert.d_ff,
        "d_ff_shared": block.shared.d_ff if block.shared else 0,
        "expert_activation": block.expert.activation,
        "normalize": block.normalize,
        "routed_scale": block.scale,
        "n_groups": block.n_groups,
        "n_active_groups": block.n_active_groups,
    }


def inverse(value: float, function: Callable[[float], float], guess: float) -> float:
    """The x near `guess` with function(x) == value, whole if it can be; else the guess."""
    if not math.isfinite(guess):
        return guess
    near = (float(round(guess)), guess, math.nextafter(guess, 0), math.nextafter(guess, math.inf))
    return next((x for x in near if x > 0 and function(x) == value), guess)


# --- what came of it --------------------------------------------------------------------


def _unsaid(config: dict[str, Any], arch: Arch, said: Arch, family: Family) -> Iterator[Problem]:
    """What of `arch` a config read back as `said` leaves out, and what transformers refuses."""
    for path, ours, theirs in differences(arch, said):
        rule = f"is {_show(theirs)}: all that a {family.model_type} config can say here"
        yield Problem(path, _show(ours), rule)
    if not family.square:
        return
    n_heads = next(config[name] for name, key in family.keys.items() if key.says == "n_heads")
    if arch.d_model % n_heads:  # its config's validate_architecture
        rule = f"divides d_model={arch.d_model}: transformers' {family.model_type} asks for it"
        yield Problem("n_heads", n_heads, rule)


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
