"""From an `Arch` to a model with weights."""

from __future__ import annotations

import hashlib
from collections import defaultdict

import torch
from torch import Tensor, nn

from isoflop.arch.spec import Arch
from isoflop.errors import Fault, InputError
from isoflop.model.decoder import Decoder
from isoflop.model.encoder_decoder import EncoderDecoder
from isoflop.model.layer import LayerModule
from isoflop.model.parts import RmsNormModule
from isoflop.model.support import check_supported, decoder_problems
from isoflop.model.vision import ClassToken, VisionDecoder

#: Radford 2019 (GPT-2): every matrix is drawn with this standard deviation.
STANDARD_DEVIATION = 0.02


def build(
    arch: Arch,
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
) -> Decoder | EncoderDecoder:
    """The model that `arch` describes, initialised; on device "meta" only its shapes.

    >>> from isoflop.arch import gpt
    >>> tiny = gpt("tiny", d_model=8, n_layers=2, n_heads=2, vocab_size=11, max_seq_len=16)
    >>> build(tiny)(torch.tensor([[1, 2, 3]])).shape
    torch.Size([1, 3, 11])

    Raises:
        InputError: the spec holds something that the model does not implement.
    """
    check_supported(arch)
    with torch.device("meta"):
        model = _class_of(arch)(arch).to(dtype)
    if torch.device(device).type == "meta":
        return model
    for module in model.modules():
        for name, weight in module.named_parameters(recurse=False):
            empty = torch.empty(weight.shape, dtype=dtype, device=device)
            setattr(module, name, torch.nn.Parameter(empty))
    initialise(model, seed)
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
) -> Decoder:
    """`build` where text alone goes in, as in training.

    Raises:
        InputError: the spec has an encoder or a vision tower, or `build` refuses it.
    """
    if problems := decoder_problems(arch):
        raise InputError(arch.name, problems)
    model = build(arch, device=device, dtype=dtype, seed=seed)
    if not isinstance(model, Decoder):
        raise Fault(f"{arch.name} was built as {type(model).__name__}")
    return model


@torch.no_grad()
def initialise(model: nn.Module, seed: int = 0) -> None:
    """Draw every weight afresh, as GPT-2 does (Radford 2019, section 2.3).

    Matrices are normal with deviation 0.02, those that write to a residual stream divided by the
    root of how many blocks do; biases 0; norms 1. A tensor's draw depends on `seed` and its name alone:
    not on the device, the number of threads, or which other tensors exist.
    """
    blocks = _blocks(model)
    for module_name, module in model.named_modules():
        for name, weight in module.named_parameters(recurse=False):
            path = f"{module_name}.{name}"
            if weight.dim() == 2:
                writes = module_name.endswith(
                    (".attention.out", ".cross.out", ".feed_forward.down")
                )
                residual = blocks[stack_of(module_name)] ** -0.5 if writes else 1.0
                _draw(weight, path, seed, STANDARD_DEVIATION * residual)
            elif isinstance(module, ClassToken):
                _draw(weight, path, seed, STANDARD_DEVIATION)
            elif name == "bias" or (isinstance(module, RmsNormModule) and module.unit_offset):
                weight.zero_()
            else:
                weight.fill_(1.0)


def _blocks(model: nn.Module) -> dict[str, int]:
    """How many blocks write to the residual stream of each stack of layers."""
    count: dict[str, int] = defaultdict(int)
    for name, layer in model.named_modules():
        if isinstance(layer, LayerModule):
            count[stack_of(name)] += layer.n_blocks
    return count


def stack_of(name: str) -> str:
    """The stack that a module inside it belongs to.

    >>> stack_of("encoder.layers.3.attention.out")
    'encoder.layers'
    """
    return f"{name.partition('layers.')[0]}layers"


def _draw(weight: Tensor, path: str, seed: int, deviation: float) -> None:
    digest = hashlib.blake2b(f"{seed}:{path}".encode(), digest_size=8).digest()
    stream = torch.Generator().manual_seed(int.from_bytes(digest) >> 1)
    weight.copy_(torch.empty(weight.shape).normal_(0.0, deviation, generator=stream))
