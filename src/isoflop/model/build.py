"""From an `Arch` to a model with weights."""

from __future__ import annotations

import torch

from isoflop.arch.spec import Arch
from isoflop.errors import Fault, InputError
from isoflop.model.decoder import Decoder
from isoflop.model.encoder_decoder import EncoderDecoder
from isoflop.model.experts import Dispatch, Dropless, Router, set_dispatch
from isoflop.model.initial import Initial, InitialName, initialise
from isoflop.model.support import check_supported, decoder_problems
from isoflop.model.vision import VisionDecoder


def build(
    arch: Arch,
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    init: InitialName | Initial = "gpt2",
    dispatch: Dispatch | None = None,
) -> Decoder | EncoderDecoder:
    """The model that `arch` describes, initialised; on device "meta" only its shapes.

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
        model = _class_of(arch)(arch).to(dtype)
    set_dispatch(model, dispatch or Dropless())
    if torch.device(device).type == "meta":
        return model
    for module in model.modules():
        for name, weight in module.named_parameters(recurse=False):
            empty = torch.empty(weight.shape, dtype=dtype, device=device)
            setattr(module, name, torch.nn.Parameter(empty))
        if isinstance(module, Router) and module.correction is not None:
            # Its steps of about 0.001 would be lost in half precision.
            wide = torch.promote_types(dtype, torch.float32)
            module.correction = torch.empty(module.correction.shape, dtype=wide, device=device)
    initialise(model, seed, init)
    return model


def _class_of(arch: Arch) -> type[Decoder | EncoderDecoder]:
    if arch.encoder is not None:
        return EncoderDecoder
    return Decoder if arch.vision is None else VisionDecoder


def build_decoder(
    arch: Arch,
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    init: InitialName | Initial = "gpt2",
    dispatch: Dispatch | None = None,
) -> Decoder:
    """`build` where text alone goes in, as in training.

    Raises:
        InputError: the spec has an encoder or a vision tower, or `build` refuses it.
    """
    if problems := decoder_problems(arch):
        raise InputError(arch.name, problems)
    model = build(arch, device=device, dtype=dtype, seed=seed, init=init, dispatch=dispatch)
    if not isinstance(model, Decoder):
        raise Fault(f"{arch.name} was built as {type(model).__name__}")
    return model
