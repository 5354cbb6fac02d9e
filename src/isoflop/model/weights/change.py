"""How the tensors that a family stores differ from ours: each change and its exact inverse.

A change takes one or several of ours to one or several of theirs, and back. `axis` is the one
of outputs: -2 of a weight [..., out, in], -1 of a bias [..., out]. Nothing is computed, only
moved, so both ways are exact to the bit.

Letters: E experts · K kv heads.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, TypeAlias

import torch
from torch import Tensor

Tensors: TypeAlias = tuple[Tensor, ...]


class Change(Protocol):
    """From ours to theirs, and back."""

    def join(self, ours: Tensors, axis: int) -> Tensors:
        """What the family stores of these."""
        ...

    def split(self, theirs: Tensors, sizes: Sequence[int], axis: int) -> Tensors:
        """Ours again; `sizes` are theirs along `axis`, one for each of ours."""
        ...


@dataclass(frozen=True, slots=True)
class Same:
    """One tensor, as it is."""

    def join(self, ours: Tensors, axis: int) -> Tensors:
        return ours

    def split(self, theirs: Tensors, sizes: Sequence[int], axis: int) -> Tensors:
        return theirs


@dataclass(frozen=True, slots=True)
class Joined:
    """Several in one, one after the other: Phi-3's q, k, v and gate, up."""

    def join(self, ours: Tensors, axis: int) -> Tensors:
        return (torch.cat(ours, axis),)

    def split(self, theirs: Tensors, sizes: Sequence[int], axis: int) -> Tensors:
        return tuple(torch.split(theirs[0], list(sizes), axis))


@dataclass(frozen=True, slots=True)
class Grouped:
    """Several in one, `n_groups` times: first a share of the first, then of the second, ...

    GPT-NeoX, BLOOM and Falcon store a kv head's queries, its key and its value together.

    >>> q, k = torch.tensor([1, 2, 3, 4]), torch.tensor([8, 9])
    >>> Grouped(2).join((q, k), -1)[0].tolist()
    [1, 2, 8, 3, 4, 9]
    """

    n_groups: int

    def join(self, ours: Tensors, axis: int) -> Tensors:
        groups = [torch.unflatten(part, axis, (self.n_groups, -1)) for part in ours]
        return (torch.cat(groups, axis).flatten(axis - 1, axis),)

    def split(self, theirs: Tensors, sizes: Sequence[int], axis: int) -> Tensors:
        groups = torch.unflatten(theirs[0], axis, (self.n_groups, -1))
        parts = torch.split(groups, [size // self.n_groups for size in sizes], axis)
        return tuple(part.flatten(axis - 1, axis) for part in parts)


@dataclass(frozen=True, slots=True)
class Interleaved:
    """Several in one, taken in turns: GPT-OSS's gate and up.

    >>> Interleaved().join((torch.tensor([1, 2]), torch.tensor([8, 9])), -1)[0].tolist()
    [1, 8, 2, 9]
    """

    def join(self, ours: Tensors, axis: int) -> Tensors:
        return (torch.stack(ours, axis).flatten(axis - 1, axis),)

    def split(self, theirs: Tensors, sizes: Sequence[int], axis: int) -> Tensors:
        return torch.unflatten(theirs[0], axis, (-1, len(sizes))).unbind(axis)


#: A value, not a call: a frozen default may be shared.
_SAME = Same()


@dataclass(frozen=True, slots=True)
class Transposed:
    """Weights stored [in, out], on top of another change: GPT-2's Conv1D, GPT-OSS's experts."""

    inner: Change = _SAME

    def join(self, ours: Tensors, axis: int) -> Tensors:
        return tuple(_turn(tensor, axis) for tensor in self.inner.join(ours, axis))

    def split(self, theirs: Tensors, sizes: Sequence[int], axis: int) -> Tensors:
        return self.inner.split(tuple(_turn(tensor, axis) for tensor in theirs), sizes, axis)


@dataclass(frozen=True, slots=True)
class Kernel:
    """A map [out, in] stored as a convolution's kernel [out, *sizes]: patches of an image."""

    sizes: tuple[int, ...]

    def join(self, ours: Tensors, axis: int) -> Tensors:
        return (torch.unflatten(ours[0], -1, self.sizes),)

    def split(self, theirs: Tensors, sizes: Sequence[int], axis: int) -> Tensors:
        return (theirs[0].flatten(1),)


@dataclass(frozen=True, slots=True)
class Listed:
    """One tensor [E, ...] as E tensors: an expert's, or a head's norm, under its own name."""

    def join(self, ours: Tensors, axis: int) -> Tensors:
        return ours[0].unbind(0)

    def split(self, theirs: Tensors, sizes: Sequence[int], axis: int) -> Tensors:
        return (torch.stack(theirs),)


def _turn(tensor: Tensor, axis: int) -> Tensor:
    return tensor.mT if axis == -2 else tensor
