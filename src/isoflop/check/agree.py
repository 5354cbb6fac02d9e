"""Derived against built: the count's trees beside the module that was written apart from them.

Everything runs on the meta device: shapes flow, nothing is allocated, so a 540B model is
checked in seconds.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from isoflop.arch import Arch
from isoflop.arch.spec import Encoder, VisionTower
from isoflop.count import Precision, Workload, bytes_weights, flops_backward, flops_forward, params
from isoflop.model import EncoderDecoder, Images, VisionDecoder, build
from isoflop.quantity import Node

#: Shapes are what is compared, not speed: a few tokens show every product. An encoder reads
#: more of them than a decoder, so that neither is taken for the other.
BATCH, SEQ_LEN, SOURCE_LEN = 2, 32, 48


@dataclass(frozen=True, slots=True)
class Row:
    """One number, derived from the spec and counted on the built module."""

    path: str
    derived: int
    built: int

    @property
    def equal(self) -> bool:
        return self.derived == self.built

    def to_json(self) -> dict[str, Any]:
        return {
            "path": self.path,
            "derived": self.derived,
            "built": self.built,
            "equal": self.equal,
        }


def agree(arch: Arch) -> tuple[Row, ...]:
    """Parameters, bytes and FLOPs by path, both ways. Nothing is left out of either side.

    Raises:
        InputError: the model cannot be built yet.
    """
    module = build(arch, device="meta")
    work = sample_of(arch)
    forward, backward = count_flops(module, arch, work)
    return (
        *_rows("params", leaf_values(params(arch)), module_sizes(module, arch, each=1)),
        *_rows(
            "bytes",
            leaf_values(bytes_weights(arch, Precision.FP32)),
            module_sizes(module, arch, each=4),
        ),
        *_rows("flops", leaf_values(flops_forward(arch, work)), forward),
        Row("flops_backward", int(flops_backward(arch, work).value), backward),
    )


def sample_of(arch: Arch) -> Workload:
    """The work that both sides are held to."""
    work = Workload.train(BATCH, min(SEQ_LEN, arch.max_seq_len))
    if arch.encoder is not None:
        return replace(work, source_len=min(SOURCE_LEN, arch.encoder.max_seq_len))
    if arch.vision is not None:  # an image's tokens are among those of a sequence
        n_patches = (arch.vision.image // arch.vision.patch) ** 2
        return Workload.train(BATCH, n_patches + min(SEQ_LEN, arch.max_seq_len))
    return work


def _rows(quantity: str, derived: dict[str, int], built: dict[str, int]) -> Iterator[Row]:
    for path in [*derived, *(p for p in built if p not in derived)]:
        yield Row(f"{quantity}/{path}", derived.get(path, 0), built.get(path, 0))
    yield Row(quantity, sum(derived.values()), sum(built.values()))


def leaf_values(root: Node) -> dict[str, int]:
    """Every leaf of a tree with all its copies."""
    return {path: int(leaf.value * root.copies(path)) for path, leaf in root.leaves().items()}


def tree_path(name: str, arch: Arch) -> str:
    """A module's dotted name as a path of the trees: layers of one kind share a path.

    >>> from isoflop.arch import gpt
    >>> tiny = gpt("t", d_model=8, n_layers=2, n_heads=2, vocab_size=9, max_seq_len=4)
    >>> tree_path("layers.1.attention.q", tiny)
    'layer/attention/q'
    """
    parts = name.split(".")
    towers: dict[str, Encoder | VisionTower | None] = {"encoder": arch.encoder, "vision": arch.vision}  # fmt: skip
    tower = towers.get(parts[0])
    under, layers = ([], arch.layers) if tower is None else ([parts.pop(0)], tower.layers)
    if parts and isinstance(tower, VisionTower) and _is_unread(tower, parts):
        under.append("unread")
    if parts and parts[0] == "layers" and len(parts) > 1:
        parts = [layers[int(parts[1])].name, *parts[2:]]
    return "/".join([*under, *parts])


def _is_unread(tower: VisionTower, parts: list[str]) -> bool:
    """Whether a part of a tower stands behind what the projector reads."""
    if tower.feature_layer is None:
        return False
    if parts[0] == "layers" and len(parts) > 1:
        return int(parts[1]) >= tower.feature_layer
    return parts[0] == "final_norm"


def module_sizes(module: nn.Module, arch: Arch, each: int) -> dict[str, int]:
    """Trained numbers by path, times `each`; a tied tensor appears once, where it is stored."""
    sizes: dict[str, int] = defaultdict(int)
    for name, weight in module.named_parameters():
        sizes[tree_path(name.rpartition(".")[0], arch)] += weight.numel() * each
    return dict(sizes)


def count_flops(module: nn.Module, arch: Arch, work: Workload) -> tuple[dict[str, int], int]:
    """Forward FLOPs by path and backward FLOPs in all, by PyTorch's own counter.

    The math backend is forced: fused kernels on a CPU report no FLOPs at all.
    """
    inputs = inputs_for(module, work)
    module.eval()
    with sdpa_kernel(SDPBackend.MATH):
        with FlopCounterMode(display=False) as forward:
            loss = module.loss(*inputs)  # type: ignore[operator]
        with FlopCounterMode(display=False) as backward:
            loss.backward()
    return by_path(forward, module, arch), backward.get_total_flops()


def inputs_for(module: nn.Module, work: Workload) -> tuple[Any, ...]:
    """What `loss` takes, on the meta device: tokens and targets, and what is read beside them."""
    tokens = torch.zeros(work.batch, work.seq_len, dtype=torch.int64, device="meta")
    if isinstance(module, EncoderDecoder):
        source = tokens.new_zeros(work.batch, int(work.source.value))
        return source, tokens, tokens
    if isinstance(module, VisionDecoder):
        spec = module.vision.spec
        shape = (work.batch * work.images, spec.channels, spec.image, spec.image)
        pixels = torch.zeros(shape, device="meta")
        return tokens, tokens, Images(pixels, tokens.bool())
    return tokens, tokens


def by_path(counter: FlopCounterMode, module: nn.Module, arch: Arch) -> dict[str, int]:
    """The counter's totals per module, each less its children's: what the module does itself."""
    totals = {
        name.partition(".")[2]: sum(counts.values())
        for name, counts in counter.get_flop_counts().items()
        if name.partition(".")[0] == type(module).__name__
    }
    # Not every module is entered through its forward; the root stands for the whole.
    totals[""] = counter.get_total_flops()
    own: dict[str, int] = defaultdict(int)
    for name, value in totals.items():
        inside = sum(v for child, v in totals.items() if child and parent_in(child, totals) == name)
        path = tree_path(name, arch)
        # Scores and weighted values are the attention module's own work.
        path = f"{path}/core" if path.endswith(("/attention", "/cross")) else path
        own[path] += value - inside
    return {path: value for path, value in own.items() if value}


def parent_in(name: str, names: dict[str, int]) -> str:
    """The closest enclosing module that the counter knows."""
    above = name.rpartition(".")[0]
    while above and above not in names:
        above = above.rpartition(".")[0]
    return above
