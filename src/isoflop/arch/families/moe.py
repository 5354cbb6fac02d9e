"""Mixtures of experts: Mixtral, Qwen, DeepSeek and GPT-OSS."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Unpack

from isoflop.arch.families.common import (
    attend,
    decoder,
    each,
    every,
    split,
    with_window,
)
from isoflop.arch.families.gpt import gpt
from isoflop.arch.families.llama import Numbers, llama, mistral, qwen2, qwen3
from isoflop.arch.spec import (
    Activation,
    Arch,
    Dense,
    Experts,
    LatentAttention,
    Layer,
    RmsNorm,
    Rope,
    RopeScaling,
)


def mixtral(
    name: str,
    *,
    n_experts: int,
    n_active: int,
    window: int | None = None,
    **numbers: Unpack[Numbers],
) -> Arch:
    """Mixtral: Mistral whose feed-forward is a choice of `n_active` of `n_experts`.

    Source: Jiang 2024 (2401.04088), section 2 and table 1.
    """
    plain = mistral(name, window=window, **numbers)

    def change(layer: Layer) -> Layer:
        assert isinstance(layer.feed_forward, Dense)
        return replace(layer, feed_forward=Experts(n_experts, n_active, layer.feed_forward))

    return each(plain, change)


def qwen2_moe(
    name: str,
    *,
    n_experts: int,
    n_active: int,
    d_ff_expert: int,
    d_ff_shared: int,
    sparse: Sequence[bool] | None = None,
    normalize: bool = False,
    bias_qkv: bool = True,
    window: int | None = None,
    local: Sequence[bool] | None = None,
    **numbers: Unpack[Numbers],
) -> Arch:
    """Qwen 1.5 and 2 MoE: many small experts and a shared one behind a gate.

    `sparse` says which layers have experts (None: all); the others are dense, d_ff wide.
    Source: Yang 2024 (2407.10671), section 2.2.2; Qwen/Qwen1.5-MoE-A2.7B config.json.
    """
    plain = each(qwen2(name, **numbers), lambda layer: attend(layer, bias_qkv=bias_qkv))
    activation = numbers.get("activation", "silu")
    experts = Experts(
        n_experts,
        n_active,
        expert=Dense(d_ff_expert, activation, gated=True),
        shared=Dense(d_ff_shared, activation, gated=True),
        shared_gate=True,
        normalize=normalize,
    )
    return with_window(_sparse(plain, sparse, experts), window, local)


def qwen3_moe(
    name: str,
    *,
    n_experts: int,
    n_active: int,
    d_ff_expert: int,
    sparse: Sequence[bool] | None = None,
    normalize: bool = True,
    window: int | None = None,
    **numbers: Unpack[Numbers],
) -> Arch:
    """Qwen 3 MoE: many small experts, none shared.

    Source: Qwen 2025 (2505.09388), section 2 and table 2.
    """
    expert = Dense(d_ff_expert, numbers.get("activation", "silu"), gated=True)
    experts = Experts(n_experts, n_active, expert, normalize=normalize)
    return with_window(_sparse(qwen3(name, **numbers), sparse, experts), window)


def _sparse(plain: Arch, sparse: Sequence[bool] | None, experts: Experts) -> Arch:
    where = (True,) * plain.n_layers if sparse is None else sparse
    return split(plain, where, lambda layer: replace(layer, feed_forward=experts), ("moe", "dense"))


def deepseek(
    name: str,
    *,
    d_model: int,
    n_layers: int,
    n_heads: int,
    d_ff: int,
    vocab_size: int,
    max_seq_len: int,
    n_experts: int,
    n_active: int,
    d_ff_expert: int,
    n_shared: int,
    n_dense: int,
    d_kv_latent: int = 512,
    d_q_latent: int | None = None,
    d_head_nope: int = 128,
    d_head_rope: int = 64,
    d_head_value: int = 128,
    n_groups: int = 1,
    n_active_groups: int = 1,
    corrected: bool = False,
    normalize: bool = False,
    routed_scale: float = 1.0,
    theta: float = 10_000.0,
    scaling: RopeScaling | None = None,
    interleaved: bool = True,
    activation: Activation = "silu",
    eps: float = 1e-6,
    tied: bool = False,
    bias_attention: bool = False,
    bias_dense: bool = False,
    dropout_attention: float = 0.0,
) -> Arch:
    """DeepSeek V2 and V3: latent attention, `n_dense` dense layers, then experts.

    `n_shared` experts are read by every token. `corrected` is V3's routing: sigmoid scores
    with a correction that is a buffer, not a weight. The prediction head is left out.
    Source: DeepSeek 2024 (2405.04434), sections 2.1 and 3.1; 2412.19437, section 4.2.

    >>> v3 = deepseek("v3", d_model=7168, n_layers=61, n_heads=128, d_ff=18432,
    ...     vocab_size=129280, max_seq_len=4096, n_experts=256, n_active=8, d_ff_expert=2048,
    ...     n_shared=1, n_dense=3, d_q_latent=1536, corrected=True)
    >>> [v3.times(name) for name in ("dense", "moe")]
    [3, 58]
    """
    dense = Dense(d_ff, activation, gated=True, bias=bias_dense)
    layer = Layer(
        attention=LatentAttention(
            n_heads,
            d_kv_latent=d_kv_latent,
            d_head_nope=d_head_nope,
            d_head_rope=d_head_rope,
            d_head_value=d_head_value,
            d_q_latent=d_q_latent,
            position=Rope(theta, interleaved=interleaved, scaling=scaling),
            bias_qkv=bias_attention,
            bias_out=bias_attention,
            dropout=dropout_attention,
        ),
        feed_forward=dense,
        norm=RmsNorm(eps),
    )
    experts = Experts(
        n_experts,
        n_active,
        expert=Dense(d_ff_expert, activation, gated=True),
        shared=Dense(n_shared * d_ff_expert, activation, gated=True, bias=bias_dense)
        if n_shared
        else None,
        score_correction=corrected,
        score="sigmoid" if corrected else "softmax",
        normalize=normalize,
        scale=routed_scale,
        n_groups=n_groups,
        n_active_groups=n_active_groups,
    )
    plain = decoder(
        name,
        d_model=d_model,
        n_layers=n_layers,
        vocab_size=vocab_size,
        max_seq_len=max_seq_len,
        layer=layer,
        tied=tied,
    )
    return _sparse(plain, [i >= n_dense for i in range(n_layers)], experts)


def gpt_moe(
    name: str,
    *,
    d_model: int,
    n_layers: int,
    n_heads: int,
    n_experts: int,
    n_active: int,
    vocab_size: int,
    max_seq_len: int,
    d_head: int | None = None,
    n_rows: int | None = None,
) -> Arch:
    """GPT-3 with experts in place of each feed-forward: what is rumoured of GPT-4."""
    plain = gpt(
        name,
        d_model=d_model,
        n_layers=n_layers,
        n_heads=n_heads,
        d_head=d_head,
        vocab_size=vocab_size,
        n_rows=n_rows,
        max_seq_len=max_seq_len,
    )

    def change(layer: Layer) -> Layer:
        assert isinstance(layer.feed_forward, Dense)
        return replace(layer, feed_forward=Experts(n_experts, n_active, layer.feed_forward))

    return each(plain, change)


def gpt_oss(
    name: str,
    *,
    n_experts: int,
    n_active: int,
    window: int = 128,
    local: Sequence[bool] | None = None,
    **numbers: Unpack[Numbers],
) -> Arch:
    """GPT-OSS: biased experts of the residual's width, sinks, every other layer local.

    Source: OpenAI 2025 (2508.10925), section 2; openai/gpt-oss-120b config.json.
    """
    numbers["bias_attention"] = numbers.get("bias_attention", True)
    numbers["bias_feed_forward"] = True
    numbers["activation"] = "silu_clamped"
    plain = llama(name, **numbers)

    def change(layer: Layer) -> Layer:
        assert isinstance(layer.feed_forward, Dense)
        experts = Experts(n_experts, n_active, layer.feed_forward, router_bias=True)
        return replace(attend(layer, sinks=True), feed_forward=experts)

    return with_window(
        each(plain, change), window, every(plain.n_layers, 2) if local is None else local
    )
