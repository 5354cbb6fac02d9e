"""Every named model held against its built module, in a few processes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from isoflop.arch.load import load
from isoflop.check.agree import agree
from isoflop.check.process import fork_server
from isoflop.check.row import Row
from isoflop.errors import InputError


@dataclass(frozen=True, slots=True)
class Agreement:
    """A model's numbers; `refused` says why it could not be built, where it could not."""

    model: str
    rows: tuple[Row, ...] = ()
    refused: str = ""

    @property
    def totals(self) -> tuple[Row, ...]:
        return tuple(row for row in self.rows if row.is_total)

    @property
    def wrong(self) -> tuple[Row, ...]:
        return tuple(row for row in self.rows if not row.agrees)

    @property
    def agrees(self) -> bool:
        return not self.wrong and not self.refused

    def to_json(self) -> dict[str, Any]:
        return {
            "model": self.model,
            "numbers": len(self.rows),
            "disagreements": len(self.wrong),
            "refused": self.refused,
            "totals": [row.to_json() for row in self.totals],
            "wrong": [row.to_json() for row in self.wrong],
        }


def check_models(names: Sequence[str], jobs: int) -> Iterator[Agreement]:
    """Each model as it is done, in `jobs` processes of one thread."""
    if jobs == 1:
        yield from map(check_model, names)
        return
    with fork_server().Pool(jobs, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        yield from pool.imap_unordered(check_model, names)


def check_model(name: str) -> Agreement:
    """One model by the name that a user gives it."""
    try:
        return Agreement(name, agree(load(name).arch))
    except InputError as error:
        return Agreement(name, refused=" ".join(str(error).split()))
