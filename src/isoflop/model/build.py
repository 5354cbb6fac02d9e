"""From an `Arch` to a decoder with weights."""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor

from isoflop.arch.spec import Arch
from isoflop.model.decoder import Decoder
from isoflop.model.experts import Dispatch, Dropless, Router, set_dispatch
from isoflop.model.parts import RmsNormModule
from isoflop.model.support import check_supported

#: Radford 2019 (GPT-2): every matrix is drawn with this standard deviation.
STANDARD_DEVIATION = 0.02
#: What these give is added to the residual stream.
WRITE_TO_STREAM = (".attention.out", ".feed_forward.down", ".experts.down", ".shared.down")


def build(
    arch: Arch,
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    dispatch: Dispatch | None = None,
) -> Decoder:
    """The decoder that `arch` describes, initialised; on device "meta" only its shapes.

    `dispatch` says which tokens its experts serve, where it has any: all when not given.

    >>> from isoflop.arch import gpt
    >>> tiny = gpt("tiny", d_model=8, n_layers=2, n_heads=2, vocab_size=11, max_seq_len=16)
    >>> build(tiny)(torch.tensor([[1, 2, 3]])).shape
    torch.Size([1, 3, 11])

    Raises:
        InputError: the spec holds something that the model does not implement.
    """
    check_supported(arch)
    with torch.device("meta"):
        decoder = Decoder(arch).to(dtype)
    set_dispatch(decoder, dispatch or Dropless())
    if torch.device(device).type == "meta":
        return decoder
    for module in decoder.modules():
        for name, weight in module.named_parameters(recurse=False):
            empty = torch.empty(weight.shape, dtype=dtype, device=device)
            setattr(module, name, torch.nn.Parameter(empty))
        if isinstance(module, Router) and module.correction is not None:
            # Its steps of about 0.001 would be lost in half precision.
            wide = torch.promote_types(dtype, torch.float32)
            module.correction = torch.empty(module.correction.shape, dtype=wide, device=device)
    initialise(decoder, seed)
    return decoder


@torch.no_grad()
def initialise(decoder: Decoder, seed: int = 0) -> None:
    """Draw every weight afresh, as GPT-2 does (Radford 2019, section 2.3).

    Matrices are normal with deviation 0.02, those that write to the residual stream divided by
    sqrt(2 L); biases and score corrections 0; norms 1. A tensor's draw depends on `seed` and its name alone: not on
    the device, the number of threads, or which other tensors exist.
    """
    residual = (2 * len(decoder.layers)) ** -0.5
    for module_name, module in decoder.named_modules():
        if isinstance(module, Router) and module.correction is not None:
            module.correction.zero_()
        for name, weight in module.named_parameters(recurse=False):
            path = f"{module_name}.{name}"
            if name == "bias" or (isinstance(module, RmsNormModule) and module.unit_offset):
                weight.zero_()
            elif weight.dim() >= 2:
                writes = module_name.endswith(WRITE_TO_STREAM)
                _draw(weight, path, seed, STANDARD_DEVIATION * (residual if writes else 1.0))
            else:
                weight.fill_(1.0)


def _draw(weight: Tensor, path: str, seed: int, deviation: float) -> None:
    digest = hashlib.blake2b(f"{seed}:{path}".encode(), digest_size=8).digest()
    stream = torch.Generator().manual_seed(int.from_bytes(digest) >> 1)
    weight.copy_(torch.empty(weight.shape).normal_(0.0, deviation, generator=stream))
