"""Multi-head latent attention (DeepSeek-V2, 2405.04434, section 2.1).

Letters: B batch · T tokens, queries and keys alike · D d_model · N n_heads · C d_kv_latent ·
R d_head_rope · H d_head_nope + d_head_rope · W d_head_value.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from isoflop.arch.spec import LatentAttention, YarnScaling
from isoflop.attention import attention
from isoflop.errors import Fault
from isoflop.model.attention.context import Context
from isoflop.model.parts import Linear, make_norm
from isoflop.model.rope_scaling import yarn_temperature
from isoflop.model.rotary import Rotation


class LatentAttentionModule(nn.Module):
    """Causal self-attention whose keys and values are rebuilt from a small latent per token.

    A head's query and key are a part without position and a rotated part, whose key all heads
    share.
    """

    def __init__(self, spec: LatentAttention, d_model: int) -> None:
        super().__init__()
        self.spec = spec
        self.scale = softmax_scale(spec)
        nope, rope, value = spec.d_head_nope, spec.d_head_rope, spec.d_head_value
        width_q, width_kv = spec.n_heads * (nope + rope), spec.n_heads * (nope + value)
        if spec.d_q_latent is None:
            self.q = Linear(d_model, width_q, bias=False)
        else:
            self.q_down = Linear(d_model, spec.d_q_latent, spec.bias_qkv)
            self.q_norm = make_norm(spec.norm, spec.d_q_latent)
            self.q_up = Linear(spec.d_q_latent, width_q, bias=False)
        self.kv_down = Linear(d_model, spec.d_kv_latent + rope, spec.bias_qkv)
        self.kv_norm = make_norm(spec.norm, spec.d_kv_latent)
        self.kv_up = Linear(spec.d_kv_latent, width_kv, bias=False)
        self.out = Linear(spec.n_heads * value, d_model, spec.bias_out)

    def forward(self, x_BTD: Tensor, context: Context) -> Tensor:
        if context.rotation is None:
            raise Fault("latent attention turns a part of each head")
        q_BTNH = self.queries(x_BTD, context.rotation)
        latent_BTC, k_BT1R = self.latents(x_BTD, context.rotation)
        if context.memory is not None:
            both_BT1X = torch.cat((latent_BTC[:, :, None], k_BT1R), dim=-1)
            (kept_BS1X,) = context.memory.extend(both_BT1X)
            if context.unordered:
                read_BTNW = self.attend_latents(q_BTNH, kept_BS1X, context.bias)
                z_BTD: Tensor = self.out(read_BTNW.flatten(-2))
                return z_BTD
        k_BTNH, v_BTNW = self.keys_and_values(latent_BTC, k_BT1R)
        out_BTNW = attention(
            q_BTNH,
            k_BTNH,
            v_BTNW,
            causal=True,
            scale=self.scale,
            dropout_p=self.spec.dropout if self.training else 0.0,
        )
        y_BTD: Tensor = self.out(out_BTNW.flatten(-2))
        return y_BTD

    def queries(self, x_BTD: Tensor, rotation: Rotation) -> Tensor:
        """[B, T, N, H], the end of each head turned."""
        if self.spec.d_q_latent is None:
            q_BTX = self.q(x_BTD)
        else:
            q_BTX = self.q_up(self.q_norm(self.q_down(x_BTD)))
        nope, rope = self.spec.d_head_nope, self.spec.d_head_rope
        q_BTNH = torch.unflatten(q_BTX, -1, (-1, nope + rope))
        return torch.cat((q_BTNH[..., :nope], rotation(q_BTNH[..., nope:])), dim=-1)

    def latents(self, x_BTD: Tensor, rotation: Rotation) -> tuple[Tensor, Tensor]:
        """[B, T, C] and the keys' turned part [B, T, 1, R]: all that later tokens need of these."""
        wide_BTX = self.kv_down(x_BTD)
        latent_BTC, k_BTR = torch.split(
            wide_BTX, [self.spec.d_kv_latent, self.spec.d_head_rope], dim=-1
        )
        return self.kv_norm(latent_BTC), rotation(k_BTR[:, :, None])

    def keys_and_values(self, latent_BTC: Tensor, k_BT1R: Tensor) -> tuple[Tensor, Tensor]:
        """[B, T, N, H] and [B, T, N, W], rebuilt."""
        nope, value = self.spec.d_head_nope, self.spec.d_head_value
        both_BTNX = torch.unflatten(self.kv_up(latent_BTC), -1, (-1, nope + value))
        k_nope, v_BTNW = torch.split(both_BTNX, [nope, value], dim=-1)
        k_BTNR = k_BT1R.expand(-1, -1, k_nope.shape[2], -1)
        # Keys are a copy now; a view of values would keep what they were cut from.
        return torch.cat((k_nope, k_BTNR), dim=-1), v_BTNW.contiguous()

    def attend_latents(self, q_BTNH: Tensor, kept_BS1X: Tensor, bias: Tensor | None) -> Tensor:
        """What the heads read, [B, T, N, W], of latents with the keys' turned part behind each.

        The maps out of the latent are put on queries and results instead, so that no key or value
        is rebuilt (section 2.1.2): all heads then share one key, whose first part is the value.
        """
        nope, value, latent = self.spec.d_head_nope, self.spec.d_head_value, self.spec.d_kv_latent
        weight_NXC = torch.unflatten(self.kv_up.weight, 0, (-1, nope + value))
        q_BTNC = torch.einsum("btnh,nhc->btnc", q_BTNH[..., :nope], weight_NXC[:, :nope])
        # Fused kernels want values as wide as keys, so the turned part is read and cut off: 18 ms
        # instead of 30 for 8 heads over 8 x 8192 latents of 256 + 32 (one thread, median of 15).
        q_BTNX = torch.cat((q_BTNC, q_BTNH[..., nope:]), dim=-1)
        read_BTNX = attention(
            q_BTNX, kept_BS1X, kept_BS1X, causal=False, bias=bias, scale=self.scale
        )
        return torch.einsum("btnc,nwc->btnw", read_BTNX[..., :latent], weight_NXC[:, nope:])


def softmax_scale(spec: LatentAttention) -> float:
    """What scores are multiplied by: 1 / sqrt(H), and with YaRN the temperature squared.

    DeepSeek puts YaRN's temperature for the whole head (`mscale_all_dim`) here, where the
    rotation itself could warm the turned part alone.

    >>> round(softmax_scale(LatentAttention(1, 8, 12, 4, 12)), 3)
    0.25
    """
    if spec.scale is not None:
        return spec.scale
    usual, scaling = float((spec.d_head_nope + spec.d_head_rope) ** -0.5), spec.position.scaling
    if isinstance(scaling, YarnScaling) and scaling.mscale_all_dim:
        return usual * yarn_temperature(scaling.factor, scaling.mscale_all_dim) ** 2
    return usual
