"""What the parity tests share: names of weights, copying them, and the comparison itself."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from isoflop.arch import Arch
from isoflop.model import Decoder, build

V, T_MAX = 61, 32

# Llama's names, and those of the families that took them over. A name with "+" is one tensor of
# theirs and several of ours.
LLAMA_NAMES = {
    r"model\.embed_tokens": "embedding.tokens",
    r"model\.norm": "final_norm",
    r"lm_head": "head",
    r"model\.layers\.(\d+)": r"layers.\1",
    r"self_attn\.(q|k|v)_proj": r"attention.\1",
    r"self_attn\.qkv_proj": "attention.q+k+v",
    r"self_attn\.o_proj": "attention.out",
    r"self_attn\.(q|k)_norm": r"attention.\1_norm",
    r"mlp\.(gate|up|down)_proj": r"feed_forward.\1",
    r"mlp\.gate_up_proj": "feed_forward.gate+up",
    r"input_layernorm": "norm_attention",
    r"post_attention_layernorm": "norm_feed_forward",
}
GPT2_NAMES = {
    r"transformer\.(wte|tokens_embed)": "embedding.tokens",
    r"transformer\.(wpe|positions_embed)": "embedding.positions",
    r"transformer\.ln_f": "final_norm",
    r"lm_head": "head",
    r"transformer\.h\.(\d+)": r"layers.\1",
    r"attn\.c_attn": "attention.q+k+v",
    r"attn\.c_proj": "attention.out",
    r"attn\.(q|k|v)_proj": r"attention.\1",
    r"attn\.out_proj": "attention.out",
    r"ln_1": "norm_attention",
    r"ln_2": "norm_feed_forward",
    r"mlp\.(c_fc|fc_in)": "feed_forward.up",
    r"mlp\.(c_proj|fc_out)": "feed_forward.down",
}

Cut = Callable[[Tensor, int], tuple[Tensor, ...]]


def renamed(name: str, names: Mapping[str, str]) -> str:
    for pattern, path in names.items():
        name = re.sub(pattern, path, name)
    return name


def renamed_state(
    theirs: nn.Module, names: Mapping[str, str], *, transposed: bool = False
) -> dict[str, Tensor]:
    """Their weights under our names; `transposed` where stored [in, out] (GPT's Conv1D)."""
    state = {}
    for name, weight in theirs.state_dict().items():
        conv = transposed and weight.dim() == 2 and re.search(r"\.(attn|mlp)\.", name)
        state[renamed(name, names)] = weight.T if conv else weight
    return state


def in_parts(weight: Tensor, n: int) -> tuple[Tensor, ...]:
    """Equal parts, one below the other."""
    return weight.chunk(n)


def in_rows(*rows: int) -> Cut:
    """Parts of so many rows."""
    return lambda weight, _: weight.split(rows)


def per_head(n_heads: int) -> Cut:
    """Stored head by head: its q, its k, its v."""
    return lambda weight, n: tuple(
        part.flatten(0, 1) for part in weight.unflatten(0, (n_heads, n, -1)).unbind(1)
    )


def cut(state: Mapping[str, Tensor], how: Cut = in_parts) -> dict[str, Tensor]:
    """Each tensor called `q+k+v` cut into its parts; two names take halves."""
    done = {}
    for name, weight in state.items():
        if joined := re.search(r"\w+(\+\w+)+", name):
            parts = joined[0].split("+")
            pieces = how(weight, len(parts)) if len(parts) > 2 else in_parts(weight, 2)
            for part, piece in zip(parts, pieces, strict=True):
                done[name.replace(joined[0], part)] = piece
        else:
            done[name] = weight
    return done


def load(ours: Decoder, state: dict[str, Tensor]) -> None:
    """Every weight of ours, and none besides."""
    if ours.arch.head.tied:
        state.pop("head.weight", None)
    ours.load_state_dict(state, strict=True)


def shake(theirs: nn.Module) -> None:
    """Give every weight, biases and norms too, a value that matters."""
    stream = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for weight in theirs.parameters():
            noise = torch.randn(weight.shape, generator=stream)
            weight.copy_(weight + noise * (0.15 if weight.dim() == 2 else 0.3))


def decoder_for(
    theirs: nn.Module,
    arch: Arch,
    names: Mapping[str, str],
    how: Cut = in_parts,
    *,
    transposed: bool = False,
) -> Decoder:
    """Our decoder with their weights, shaken first."""
    shake(theirs)
    ours = build(arch, seed=5)
    load(ours, cut(renamed_state(theirs, names, transposed=transposed), how))
    return ours


def assert_same_logits(theirs, ours: Decoder, n_tokens: int = 23, **their_keys) -> None:
    """The same logits, and the same gradient down to the token vectors."""
    stream = torch.Generator().manual_seed(1)
    tokens = torch.randint(1, V, (2, n_tokens), generator=stream)  # 0 is a padding row to some
    weights = torch.randn(2, n_tokens, V, generator=stream)
    expected, got = theirs.eval()(tokens, **their_keys).logits, ours.eval()(tokens)
    assert_close(got, expected, reach=expected.max() - expected.min())
    table = theirs.get_input_embeddings().weight
    (slope,) = torch.autograd.grad((expected * weights).sum(), table)
    (our_slope,) = torch.autograd.grad((got * weights).sum(), ours.embedding.tokens.weight)
    assert (our_slope - slope).abs().max() <= 2e-5 * slope.abs().max()


def assert_close(got: Tensor, expected: Tensor, reach: Tensor) -> None:
    """Within a hundred-thousandth of what the values span."""
    assert reach > 1
    assert (got - expected).abs().max() <= 1e-5 * reach
