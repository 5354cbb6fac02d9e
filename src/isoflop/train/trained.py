"""The model that a run has trained so far, from its directory alone."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from isoflop.arch import Arch
from isoflop.arch.toml import spec_from_table
from isoflop.errors import InputError, Problem
from isoflop.model import Decoder, build_decoder
from isoflop.runs.run import Run
from isoflop.train import checkpoint


@dataclass(frozen=True, slots=True)
class Trained:
    """A run's model after `step` steps; `notes` are what was wrong with newer checkpoints."""

    model: Decoder
    step: int
    notes: tuple[str, ...]


def load_trained(run_dir: Path | str) -> Trained:
    """The model of a run's newest whole checkpoint; the run is not changed, and may go on.

    Raises:
        InputError: no run, one without a whole checkpoint, or a checkpoint of another run.
    """
    record = Run.read(run_dir)
    found = checkpoint.latest(record.path)
    notes = tuple(found.damaged.values())
    if found.checkpoint is None:
        hint = (
            "; ".join(notes) or "one is written at the run's end, or every checkpoint_every steps"
        )
        raise InputError(str(run_dir), [Problem("checkpoint", "none", "is there and whole", hint)])
    if found.checkpoint.run != record.manifest.fingerprint:
        problem = Problem("checkpoint", found.checkpoint.path.name, "belongs to this run")
        raise InputError(str(run_dir), [problem])
    model = build_decoder(arch_of(record.manifest.identity, str(run_dir)))
    checkpoint.load(found.checkpoint, model)
    return Trained(model.eval(), found.checkpoint.step, notes)


def arch_of(identity: Mapping[str, Any], where: str) -> Arch:
    """The arch of a run's manifest, which `loop.summarize` wrote there.

    Raises:
        InputError: it is no arch of this version.
    """
    match identity.get("arch"):
        case {"kinds": dict() as kinds, "layers": list() as names, **rest}:
            layers = {name: {**kind} for name, kind in kinds.items()}
            for kind in layers.values():
                kind.pop("name", None)  # the table's key says it
            table = {**rest, "pattern": names, "layers": layers}
            return spec_from_table(_without_none(table), where)
    raise InputError(where, [Problem("manifest", "other", "is of a run of isoflop train")])


def _without_none(value: Any) -> Any:
    """A spec file says "none" where JSON has null."""
    if isinstance(value, Mapping):
        return {key: _without_none(item) for key, item in value.items()}
    return "none" if value is None else value
