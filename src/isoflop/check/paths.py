"""Where in the trees a part of a built module stands, and which part is at work.

A model's layers of one kind are made by one call with equal arguments, so passes run through a
model of two layers of each kind: what the second adds, each further one adds. Weights, buffers
and caches are read off the whole model.
"""

from __future__ import annotations

from bisect import bisect_right
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Self

import torch
from torch import nn

from isoflop.arch import Arch
from isoflop.arch.spec import Embedding, Encoder, Layer, Learned, VisionTower

#: Tokens of the longest pass.
LONGEST = 2**14
#: What works when no module does.
LOSS = "loss"
#: A block's own work in a pass: of attention the scores, of a feed-forward what stands between its
#: matrices; of a mixture the adding up, of an embedding the dropping out.
OWN_WORK = {
    "attention": "core",
    "cross": "core",
    "feed_forward": "activation",
    "experts": "activation",
    "shared": "activation",
    "embedding": "tokens",
}
OWN_WORK_OF_MIXTURES = "sum"


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


@dataclass(frozen=True, slots=True)
class Shallow:
    """A model of at most two layers of each kind, and how many layers each of them stands for.

    `times` has the dotted names of layers; the encoder's layers are among them. Vision towers
    stay as deep as they are: which layer the projector reads is a number in their spec.
    """

    arch: Arch
    times: Mapping[str, int]

    @classmethod
    def of(cls, arch: Arch) -> Self:
        layers, times = _shallow(arch.layers, "layers")
        shallow = replace(arch, layers=layers, embedding=_long(arch.embedding))
        if arch.encoder is not None:
            encoder, times_encoder = _shallow(arch.encoder.layers, "encoder.layers")
            shallow = replace(shallow, encoder=replace(arch.encoder, layers=encoder))
            times |= times_encoder
        return cls(shallow, times)

    def by_path(self, found: Mapping[str, int]) -> dict[str, int]:
        """What modules did, by dotted name, as the whole model does it, by path of the trees."""
        whole: dict[str, int] = defaultdict(int)
        for name, value in found.items():
            if value:
                whole[self._path_of_work(name)] += value * self._times_of(name)
        return dict(whole)

    def _times_of(self, name: str) -> int:
        parts = name.split(".")
        place = ".".join(parts[: parts.index("layers") + 2]) if "layers" in parts else ""
        return self.times.get(place, 1)

    def _path_of_work(self, name: str) -> str:
        path = tree_path(name, self.arch)
        last = path.rpartition("/")[2]
        if last == "feed_forward" and self._is_mixture(name):
            return f"{path}/{OWN_WORK_OF_MIXTURES}"
        own = "residual" if name in self.times else OWN_WORK.get(last)
        return path if own is None else f"{path}/{own}"

    def _is_mixture(self, name: str) -> bool:
        parts = name.split(".")
        return (
            parts[0] == "layers" and self.arch.layers[int(parts[1])].feed_forward.kind == "experts"
        )


def _long(embedding: Embedding) -> Embedding:
    """With learned positions for any pass: how many there are, no pass shows."""
    if not isinstance(learned := embedding.position, Learned):
        return embedding
    return replace(embedding, position=replace(learned, n_positions=LONGEST))


def _shallow(layers: tuple[Layer, ...], place: str) -> tuple[tuple[Layer, ...], dict[str, int]]:
    """The first two layers of each kind; the second stands for all behind it."""
    there = Counter(layer.name for layer in layers)
    seen: Counter[str] = Counter()
    kept: list[Layer] = []
    times: dict[str, int] = {}
    for layer in layers:
        seen[layer.name] += 1
        if (nth := seen[layer.name]) <= 2:
            times[f"{place}.{len(kept)}"] = 1 if nth == 1 else there[layer.name] - 1
            kept.append(layer)
    return tuple(kept), times


class AtWork:
    """Which module is at work, by dotted name: in forward the innermost that was called, in
    backward the one whose forward made the node. Autograd numbers nodes in the order of forward.

    Stands in for `FlopCounterMode.mod_tracker`, which puts backward work in wrong places.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.open = [LOSS]
        self.starts, self.owners = [0], [LOSS]
        self.handles: list[torch.utils.hooks.RemovableHandle] = []

    def __enter__(self) -> Self:
        for name, module in self.model.named_modules():
            if not isinstance(module, (nn.ModuleList, nn.Identity)):
                self.handles.append(module.register_forward_pre_hook(self._enter(name)))
                self.handles.append(module.register_forward_hook(self._leave))
        return self

    def __exit__(self, *_: object) -> None:
        for handle in self.handles:
            handle.remove()

    @property
    def name(self) -> str:
        node = torch._C._current_autograd_node()  # noqa: SLF001 - no public name for it
        if node is None:
            return self.open[-1]
        number = node._sequence_nr()  # noqa: SLF001 - PyTorch's own flame graphs use it
        return self.owners[bisect_right(self.starts, number) - 1]

    @property
    def parents(self) -> set[str]:
        """What `FlopCounterMode` adds an operation's FLOPs to."""
        return {"Global", self.name}

    def _enter(self, name: str) -> Callable[..., None]:
        def hook(*_: Any) -> None:
            self.open.append(name)
            self._mark()

        return hook

    def _leave(self, *_: Any) -> None:
        self.open.pop()
        self._mark()

    def _mark(self) -> None:
        self.starts.append(torch._C._autograd._get_sequence_nr())  # noqa: SLF001 - the next node's
        self.owners.append(self.open[-1])
