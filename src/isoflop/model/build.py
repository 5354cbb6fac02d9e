"""From an `Arch` to a decoder with weights."""

from __future__ import annotations

import torch

from isoflop.arch.spec import Arch
from isoflop.model.decoder import Decoder
from isoflop.model.experts import Dispatch, Dropless, Router, set_dispatch
from isoflop.model.initial import Initial, InitialName, initialise
from isoflop.model.support import check_supported


def build(
    arch: Arch,
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    init: InitialName | Initial = "gpt2",
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
        UnknownName: no initialisation of that name.
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
    initialise(decoder, seed, init)
    return decoder
