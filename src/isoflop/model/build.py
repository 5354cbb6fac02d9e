"""From an `Arch` to a decoder with weights."""

from __future__ import annotations

import torch

from isoflop.arch.spec import Arch
from isoflop.model.decoder import Decoder
from isoflop.model.initial import Initial, InitialName, initialise
from isoflop.model.support import check_supported


def build(
    arch: Arch,
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    init: InitialName | Initial = "gpt2",
) -> Decoder:
    """The decoder that `arch` describes, initialised; on device "meta" only its shapes.

    >>> from isoflop.arch import gpt
    >>> tiny = gpt("tiny", d_model=8, n_layers=2, n_heads=2, vocab_size=11, max_seq_len=16)
    >>> build(tiny)(torch.tensor([[1, 2, 3]])).shape
    torch.Size([1, 3, 11])

    Raises:
        InputError: the spec holds something that the model does not implement.
        UnknownName: no initialisation of that name.
    """
    check_supported(arch)
    with torch.device("meta"):
        decoder = Decoder(arch).to(dtype)
    if torch.device(device).type == "meta":
        return decoder
    for module in decoder.modules():
        for name, weight in module.named_parameters(recurse=False):
            empty = torch.empty(weight.shape, dtype=dtype, device=device)
            setattr(module, name, torch.nn.Parameter(empty))
    initialise(decoder, seed, init)
    return decoder
