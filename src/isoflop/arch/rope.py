"""Rotary positions in Hugging Face configs: the keys of transformers 4 and of 5.

Version 4 keeps `rope_theta` beside a table `rope_scaling` whose kind is under "type" or
"rope_type"; version 5 keeps all of it in `rope_parameters`. Both are read, with version
5's order of precedence; the older form is written, for every tool reads that.
"""

from __future__ import annotations

import math
from typing import Any

from isoflop.arch.config import Config
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

#: The kinds of scaling by name; "su" is the first name of longrope (Phi-3).
KINDS = {kind: kind for kind in ("default", "linear", "dynamic", "llama3", "yarn", "longrope")} | {
    "su": "longrope"
}


def read_rope(keys: Config, max_seq_len: int, theta: float = DEFAULT_THETA) -> Rope:
    """The rotary positions of a config; `theta` is its class's default.

    Raises:
        InputError: a rule of the scaling broken; wrong types are noted in `keys`.
    """
    table = keys.table("rope_scaling") or keys.table("rope_parameters")
    keys.has("rope_theta")  # read, even where the table's own takes its place
    inner = table or keys
    inner.only("partial_rotary_factor", 1.0, "this family turns the whole head")
    theta = (inner if inner.has("rope_theta") else keys).real("rope_theta", theta)
    if table is None:
        return Rope(theta)
    kind = "type" if table.has("type") and not table.has("rope_type") else "rope_type"
    scaling = _scaling(table.choice(kind, KINDS, "default"), table, max_seq_len)
    return Rope(theta, scaling=scaling)


def write_rope(rope: Rope) -> dict[str, Any]:
    """The keys `rope_theta` and `rope_scaling` of a config."""
    scaling = rope.scaling
    table: dict[str, Any] | None = None
    if scaling is not None:
        renamed = {"original_max_seq_len": "original_max_position_embeddings"}
        table = {"rope_type": scaling.kind}
        for name in scaling.__dataclass_fields__:
            value = getattr(scaling, name)
            if name != "kind" and value is not None:
                table[renamed.get(name, name)] = list(value) if isinstance(value, tuple) else value
    return {"rope_theta": float(rope.theta), "rope_scaling": table}


def _scaling(kind: str, table: Config, max_seq_len: int) -> RopeScaling | None:
    match kind:
        case "linear":
            return LinearScaling(table.needed("factor"))
        case "dynamic":
            return DynamicScaling(table.needed("factor"))
        case "llama3":
            return _llama3(table, max_seq_len)
        case "yarn":
            return _yarn(table, max_seq_len)
        case "longrope":
            return _longrope(table, max_seq_len)
    return None


def _llama3(table: Config, max_seq_len: int) -> Llama3Scaling:
    return Llama3Scaling(
        factor=table.needed("factor"),
        low_freq_factor=table.needed("low_freq_factor"),
        high_freq_factor=table.needed("high_freq_factor", instead=2.0),
        original_max_seq_len=table.whole("original_max_position_embeddings", max_seq_len),
    )


def _yarn(table: Config, max_seq_len: int) -> YarnScaling:
    original = table.whole("original_max_position_embeddings", max_seq_len)
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


def _longrope(table: Config, max_seq_len: int) -> LongRopeScaling:
    original = table.whole("original_max_position_embeddings", max_seq_len)
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
