"""Bytes of a pipeline stage as formulas over the sizes of a layout: one for each kind of stage."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from typing import NamedTuple, TypeAlias

from isoflop.arch import Arch
from isoflop.count.blocks import Part
from isoflop.count.made import Made
from isoflop.count.stages import layers_of_stage
from isoflop.plan.layout import Layout
from isoflop.plan.memory.place import stages_unlike
from isoflop.plan.memory.shard import Trained, memory_training_held
from isoflop.plan.step.sizes import SIZES
from isoflop.quantity import Node

#: What a stage holds somewhere: on its accelerator or on its host.
Held: TypeAlias = Callable[..., Node]


class Content(NamedTuple):
    """What a stage holds, but for how many layers of each kind."""

    first: bool
    last: bool
    kinds: tuple[str, ...]

    @property
    def over(self) -> tuple[str, ...]:
        """The names of what its formula depends on."""
        return (*SIZES, "stage", *(f"n_{kind}_stage" for kind in self.kinds))

    def formula(
        self,
        job: Trained,
        root: Part,
        layout: Layout,
        held: Held = memory_training_held,
        made: Made | None = None,
    ) -> Node:
        """Its bytes under every layout with the structure of this one; `root` is described."""
        kinds = dict.fromkeys(self.kinds, 1)
        return held(job, root, layout, kinds, first=self.first, last=self.last, made=made)


def stages_by_content(
    arch: Arch, pp: int, virtual: int
) -> Iterator[tuple[int, Content, Counter[str]]]:
    """The stages that may hold most: index, content, and layers of each kind.

    >>> from isoflop.arch import gpt
    >>> odd = gpt("odd", d_model=96, n_layers=14, n_heads=6, vocab_size=64, max_seq_len=8)
    >>> [(stage, layers["layer"]) for stage, _, layers in stages_by_content(odd, 4, 1)]
    [(0, 3), (1, 4), (3, 3)]
    """
    for stage in stages_unlike(arch, Layout(pp=pp, virtual=virtual)):
        own = layers_of_stage(arch.n_layers, pp, stage, virtual)
        kinds = Counter(arch.layers[i].name for i in own)
        yield stage, Content(stage == 0, stage == pp - 1, tuple(sorted(kinds))), kinds
