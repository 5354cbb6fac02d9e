"""At which size a real run is made here: what was asked for, else what fits and ends soon."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from isoflop.arch import Arch
from isoflop.check.cut import Change, changes, cut_down
from isoflop.check.work import image_tokens
from isoflop.count.workload import Workload
from isoflop.errors import Infeasible, InputError, Problem
from isoflop.hardware.profile import Profile
from isoflop.plan.cost import step_cost
from isoflop.plan.memory.peak import peak_memory
from isoflop.quantity.units import format_bytes

#: Largest share of this machine's memory that a run may take.
SHARE_OF_MEMORY = 0.7
#: A step that a run chooses takes no longer: a dozen are made, some under a profiler.
SECONDS_STEP = 2.0
#: Sequences and tokens that are tried, the largest first; images come on top of tokens.
BATCHES, LENGTHS = (8, 4, 2, 1), (128, 64, 32)


@dataclass(frozen=True, slots=True)
class Size:
    """What a run is made of.

    Attributes:
        arch: the model, cut down where `cut` says so.
        chosen: what of batch and seq_len nobody asked for.
        cut: every number of the spec that was made smaller.
    """

    arch: Arch
    batch: int
    seq_len: int
    chosen: tuple[str, ...] = ()
    cut: tuple[Change, ...] = ()

    def to_json(self) -> dict[str, Any]:
        cut = [{"field": c.field, "whole": c.whole, "cut": c.cut} for c in self.cut]
        sizes = {"batch": self.batch, "seq_len": self.seq_len}
        return sizes | {"chosen": list(self.chosen), "cut": cut}


def choose_size(arch: Arch, batch: int | None, seq_len: int | None, profile: Profile) -> Size:
    """The largest size that fits and ends soon, with what was asked for held.

    Where nothing was asked for and no size of the whole model will do, the model is cut down.

    Raises:
        Infeasible: what was asked for does not fit into this machine's memory.
        InputError: sequences longer than the model has positions for, or shorter than an image.
    """
    _check(arch, seq_len)
    asked = {"batch": batch, "seq_len": seq_len}
    chosen = tuple(name for name, value in asked.items() if value is None)
    fitting = [s for s in _sizes(arch, batch, seq_len) if _fits(arch, *s, profile)]
    soon = [s for s in fitting if _ends_soon(arch, *s, profile)]
    if soon:
        return Size(arch, *soon[0], chosen)
    if len(chosen) < len(asked):
        if not fitting:
            raise _too_large(arch, batch, seq_len, profile)
        return Size(arch, *fitting[-1], chosen)
    return replace(_smaller(arch, profile), chosen=chosen)


def _smaller(arch: Arch, profile: Profile) -> Size:
    """The model cut down until a sequence of the usual length is soon done."""
    length = min(LENGTHS[0] + image_tokens(arch), arch.max_seq_len)

    def will_do(cut: Arch, batch: int, seq_len: int) -> bool:
        return _fits(cut, batch, seq_len, profile) and _ends_soon(cut, batch, seq_len, profile)

    cut = cut_down(arch, lambda smaller: will_do(smaller, 1, length))
    size = next(size for size in _sizes(cut, None, length) if will_do(cut, *size))
    return Size(cut, *size, cut=changes(arch, cut))


def _sizes(arch: Arch, batch: int | None, seq_len: int | None) -> Iterator[tuple[int, int]]:
    """Sizes to try, the largest first: fewer sequences, then shorter ones."""
    longest = (min(n + image_tokens(arch), arch.max_seq_len) for n in LENGTHS)
    lengths = dict.fromkeys(longest) if seq_len is None else (seq_len,)
    for length in lengths:
        for n in BATCHES if batch is None else (batch,):
            if batch is not None or n == 1 or length == next(iter(lengths)):
                yield n, length


def _fits(arch: Arch, batch: int, seq_len: int, profile: Profile) -> bool:
    needed = peak_memory(arch, Workload.train(batch, seq_len), profile).value
    return bool(needed <= SHARE_OF_MEMORY * profile.machine.bytes_memory)


def _ends_soon(arch: Arch, batch: int, seq_len: int, profile: Profile) -> bool:
    cost = step_cost(arch, Workload.train(batch, seq_len), profile)
    return bool(cost.value <= SECONDS_STEP)


def _check(arch: Arch, seq_len: int | None) -> None:
    if seq_len is None:
        return
    bad = []
    if seq_len > arch.max_seq_len:
        rule = f"is at most {arch.name}'s longest context, {arch.max_seq_len}"
        bad.append(Problem("--seq-len", seq_len, rule))
    if seq_len < (least := image_tokens(arch) + 1):
        bad.append(Problem("--seq-len", seq_len, f"is at least {least}: an image and a token"))
    if bad:
        raise InputError("check", bad)


def _too_large(arch: Arch, batch: int | None, seq_len: int | None, profile: Profile) -> Infeasible:
    *_, (least, shortest) = _sizes(arch, batch, seq_len)
    needed = peak_memory(arch, Workload.train(least, shortest), profile).value
    there = profile.machine.bytes_memory
    return Infeasible(
        f"a training step of {arch.name}, {least} x {shortest} tokens, takes {format_bytes(needed)}, "
        f"more than {SHARE_OF_MEMORY:.0%} of this machine's {format_bytes(there)}; leave out "
        "--batch and --seq-len, and a size is chosen, of the model cut down where it must be"
    )
