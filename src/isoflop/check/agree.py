"""Derived against built: the count's trees beside the module that was written apart from them.

All but mixtures' routing is seen on the meta device: shapes flow, nothing is allocated, so a
540B model is checked in a second.
"""

from __future__ import annotations

from isoflop.arch import Arch
from isoflop.check.kept import saved_rows
from isoflop.check.paths import Shallow
from isoflop.check.row import Row
from isoflop.check.stored import stored_rows
from isoflop.check.uneven import uneven_rows
from isoflop.check.work import flops_rows
from isoflop.model import build


def agree(arch: Arch) -> tuple[Row, ...]:
    """Every number that is both derived and built, by path. Nothing is left out of either side.

    Parameters, buffers, bytes in memory and on disk, caches: of the whole model. FLOPs and saved
    activations: of a pass through two layers of each kind (`isoflop.check.paths`). Mixtures run too,
    small and with weights, as their shapes depend on data.

    Raises:
        InputError: the model cannot be built yet.
    """
    shallow = Shallow.of(arch)
    stored = stored_rows(arch, build(arch, device="meta"))
    passes = (*flops_rows(arch, shallow), *uneven_rows(arch), *saved_rows(arch, shallow))
    return (*stored, *passes)
