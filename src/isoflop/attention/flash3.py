"""FlashAttention-3, where its own package is installed: the fastest plain kernel on Hopper.

Letters: B batch · T query tokens · S key tokens · N heads · K kv heads · H d_head.
"""

from __future__ import annotations

from importlib import import_module

from torch import Tensor

from isoflop.attention.options import Options

#: The module that FlashAttention's `hopper` folder installs.
PACKAGE = "flash_attn_interface"


def attend(q_BTNH: Tensor, k_BSKH: Tensor, v_BSKH: Tensor, options: Options) -> tuple[Tensor, None]:
    """As `reference.attend`, for causality, a window and a softcap."""
    window = (-1, -1) if options.window is None else (options.window - 1, 0)
    made = import_module(PACKAGE).flash_attn_func(
        q_BTNH,
        k_BSKH,
        v_BSKH,
        softmax_scale=options.scale,
        causal=options.causal,
        window_size=window,
        softcap=options.softcap or 0.0,
    )
    # Some versions return the log beside the output.
    out_BTNH: Tensor = made[0] if isinstance(made, tuple) else made
    return out_BTNH, None
