"""Rotary positions in Hugging Face configs: the keys of transformers 4 and of 5.

Version 4 keeps `rope_theta` beside a table `rope_scaling` whose kind is under "type" or
"rope_type"; version 5 keeps all of it in `rope_parameters`. Both are read, with version
5's order of precedence; the older form is written, for every tool reads that.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from isoflop.arch.hf.config import Config
from isoflop.arch.spec import (
    DynamicScaling,
    LinearScaling,
    Llama3Scaling,
    LongRopeScaling,
    Rope,
    RopeScaling,
    YarnScaling,
)

#: The default of transformers 5 (RotaryEmbeddingConfigMixin.default_theta).
DEFAULT_THETA = 10_000.0

#: The kinds of scaling by name; "su" is the first name of longrope (Phi-3), and "mrope" gives
#: pixels three coordinates (Qwen2-VL) where text has the usual one.
KINDS = {kind: kind for kind in ("default", "linear", "dynamic", "llama3", "yarn", "longrope")} | {
    "su": "longrope",
    "mrope": "default",
}


@dataclass(frozen=True, slots=True)
class RopeKeys:
    """How a family says its rotary positions.

    `share` is its class's share of a head that is rotated; None where the family always
    turns the whole head. `original` is the length before scaling where the config keeps
    it beside the table, with its class's default (Phi-3).
    """

    theta: float = DEFAULT_THETA
    theta_key: str = "rope_theta"
    share: float | None = None
    share_key: str = "partial_rotary_factor"
    original: int | None = None


def read_rope(keys: Config, usual: RopeKeys, numbers: dict[str, Any]) -> dict[str, Any]:
    """The builder's `theta`, `scaling` and, where a share is turned, `d_rotary`.

    Raises:
        InputError: a rule of the scaling broken; wrong types are noted in `keys`.
    """
    table = keys.table("rope_scaling") or keys.table("rope_parameters")
    keys.has(usual.theta_key)  # read, even where the table's own takes its place
    inner = table or keys
    theta = (
        inner.real("rope_theta", usual.theta)
        if table is not None and table.has("rope_theta")
        else keys.real(usual.theta_key, usual.theta)
    )
    said: dict[str, Any] = {"theta": theta, "scaling": None}
    if usual.share is None:
        inner.only("partial_rotary_factor", 1.0, "this family turns the whole head")
    else:
        said["d_rotary"] = _turned(keys, table, usual, numbers)
    original = numbers["max_seq_len"]
    if usual.original is not None:
        original = keys.size("original_max_position_embeddings", usual.original)
    if table is not None:
        said["scaling"] = read_scaling(table, numbers["max_seq_len"], original)
    return said


def _turned(
    keys: Config, table: Config | None, usual: RopeKeys, numbers: dict[str, Any]
) -> int | None:
    """The rotated dimensions of a head; None where that is all of them."""
    keys.has(usual.share_key)
    inside = table is not None and table.has("partial_rotary_factor")
    share = (
        table.real("partial_rotary_factor", 1.0)
        if table is not None and inside
        else keys.real(usual.share_key, usual.share or 1.0)
    )
    d_head = numbers.get("d_head") or numbers["d_model"] // numbers["n_heads"]
    return None if share == 1 else int(d_head * share)


def write_rope(rope: Rope, usual: RopeKeys, d_head: int) -> dict[str, Any]:
    """The keys of a config that say `rope`."""
    said = {usual.theta_key: float(rope.theta), "rope_scaling": write_scaling(rope.scaling)}
    if usual.share is not None:
        share = 1.0 if rope.d_rotary is None else rope.d_rotary / d_head
        if int(d_head * share) != (rope.d_rotary or d_head):
            share = math.nextafter(share, 1.0)  # the quotient was rounded down
        said[usual.share_key] = share
    return said


def write_scaling(scaling: RopeScaling | None) -> dict[str, Any] | None:
    """A scaling as the table `rope_scaling`."""
    if scaling is None:
        return None
    renamed = {"original_max_seq_len": "original_max_position_embeddings"}
    table: dict[str, Any] = {"rope_type": scaling.kind}
    for name in scaling.__dataclass_fields__:
        value = getattr(scaling, name)
        if name != "kind" and value is not None:
            table[renamed.get(name, name)] = list(value) if isinstance(value, tuple) else value
    return table


def read_scaling(
    table: Config, max_seq_len: int, original: int | None = None
) -> RopeScaling | None:
    """The scaling that a table says; `original` is the length before it where the table is silent."""
    kind = "type" if table.has("type") and not table.has("rope_type") else "rope_type"
    original = max_seq_len if original is None else original
    return _scaling(table.choice(kind, KINDS, "default"), table, max_seq_len, original)


def _scaling(kind: str, table: Config, max_seq_len: int, original: int) -> RopeScaling | None:
    match kind:
        case "linear":
            return LinearScaling(table.needed("factor"))
        case "dynamic":
            return DynamicScaling(table.needed("factor"))
        case "llama3":
            return _llama3(table, original)
        case "yarn":
            return _yarn(table, max_seq_len, original)
        case "longrope":
            return _longrope(table, original)
    return None


def _llama3(table: Config, original: int) -> Llama3Scaling:
    return Llama3Scaling(
        factor=table.needed("factor"),
        low_freq_factor=table.needed("low_freq_factor"),
        high_freq_factor=table.needed("high_freq_factor", instead=2.0),
        original_max_seq_len=table.size("original_max_position_embeddings", original),
    )


def _yarn(table: Config, max_seq_len: int, original: int) -> YarnScaling:
    original = table.size("original_max_position_embeddings", original)
    # A null factor means the ratio of the two lengths (transformers' yarn).
    ratio = max_seq_len / original if original > 0 else 1.0
    return YarnScaling(
        factor=table.real("factor", ratio) if table.has("factor") else ratio,
        original_max_seq_len=original,
        beta_fast=table.real_or_none("beta_fast") or 32.0,
        beta_slow=table.real_or_none("beta_slow") or 1.0,
        attention_factor=table.real_or_none("attention_factor"),
        mscale=table.real_or_none("mscale"),
        mscale_all_dim=table.real_or_none("mscale_all_dim"),
        truncate=not table.has("truncate") or table.flag("truncate", True),
    )


def _longrope(table: Config, original: int) -> LongRopeScaling:
    original = table.size("original_max_position_embeddings", original)
    attention_factor = table.real_or_none("attention_factor")
    factor = table.real_or_none("factor")
    if attention_factor is None and factor is not None and factor > 1 and original > 1:
        # A stated factor takes the place of the ratio of lengths (transformers' longrope).
        attention_factor = math.sqrt(1 + math.log(factor) / math.log(original))
    return LongRopeScaling(
        short_factor=table.reals("short_factor"),
        long_factor=table.reals("long_factor"),
        original_max_seq_len=original,
        attention_factor=attention_factor,
    )
