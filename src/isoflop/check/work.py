"""FLOPs of a built model, forward and backward by path, by PyTorch's own counter."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from isoflop.arch import Arch
from isoflop.check.paths import AtWork, Shallow
from isoflop.check.row import Row, leaf_values, rows
from isoflop.count import Workload, flops_backward, flops_forward
from isoflop.infer.cache import slots_of
from isoflop.model import EncoderDecoder, Images, VisionDecoder, build
from isoflop.model.attention import span_of
from isoflop.model.loss import mean_loss

#: Shapes are what is compared, not speed: a few tokens show every product. An encoder reads
#: more of them than a decoder, so that neither is taken for the other.
BATCH, SEQ_LEN, SOURCE_LEN = 2, 32, 48


def flops_rows(arch: Arch, shallow: Shallow) -> Iterator[Row]:
    """Forward and backward FLOPs by path, of a model without weights."""
    work = sample_of(arch, _all_seen(arch), SOURCE_LEN)
    module = build(shallow.arch, device="meta")
    forward, backward = count_flops(module.eval(), inputs_for(module, work))
    yield from rows("flops", leaf_values(flops_forward(arch, work)), shallow.by_path(forward))
    derived = leaf_values(flops_backward(arch, work))
    yield from rows("flops_backward", derived, shallow.by_path(backward))


def _all_seen(arch: Arch) -> int:
    """Tokens of which no layer's window hides one: so few are multiplied whole, and then hidden."""
    return min(slots_of(span_of(attention), SEQ_LEN) for attention in arch.attentions())


def sample_of(arch: Arch, seq_len: int, source_len: int) -> Workload:
    """A batch of so many tokens, to which an image's are added."""
    if arch.encoder is not None:
        return replace(Workload.train(BATCH, seq_len), source_len=source_len)
    return Workload.train(BATCH, seq_len + image_tokens(arch))


def image_tokens(arch: Arch) -> int:
    """Tokens of a sequence that an image takes; 0 where the model sees none."""
    return 0 if arch.vision is None else arch.vision.tokens_of_image


def count_flops(
    module: nn.Module, inputs: tuple[Any, ...]
) -> tuple[dict[str, int], dict[str, int]]:
    """FLOPs of forward and of backward that each module does itself, by its dotted name.

    The math backend is forced: fused kernels on a CPU report no FLOPs at all.
    """
    counter = FlopCounterMode(display=False)
    counter.mod_tracker = AtWork(module)  # type: ignore[assignment]  # it asks for `parents` alone
    with sdpa_kernel(SDPBackend.MATH), counter:
        loss = loss_of_whole_logits(module, inputs)
        forward = _totals(counter)
        loss.backward()  # type: ignore[no-untyped-call]  # torch leaves it unannotated
    both = _totals(counter)
    return forward, {name: both[name] - forward.get(name, 0) for name in both}


def _totals(counter: FlopCounterMode) -> dict[str, int]:
    counts = counter.get_flop_counts()
    return {name: sum(own.values()) for name, own in counts.items() if name != "Global"}


def loss_of_whole_logits(module: nn.Module, inputs: tuple[Any, ...]) -> Tensor:
    """The loss as it is off a CPU, outside all modules: that is its own path."""
    *read, targets_BT = inputs
    return mean_loss(module(*read), targets_BT)


def inputs_for(module: nn.Module, work: Workload) -> tuple[Any, ...]:
    """What a forward pass reads, on the meta device, and after it the targets."""
    tokens = torch.zeros(work.batch, work.seq_len, dtype=torch.int64, device="meta")
    if isinstance(module, EncoderDecoder):
        source = tokens.new_zeros(work.batch, int(work.source.value))
        return source, tokens, tokens
    if isinstance(module, VisionDecoder):
        spec = module.vision.spec
        shape = (work.batch * work.images, spec.channels, spec.image, spec.image)
        pixels = torch.zeros(shape, device="meta")
        return tokens, Images(pixels, tokens.bool()), tokens
    return tokens, tokens
