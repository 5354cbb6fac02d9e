"""A run directory is its own truth: nothing about a run is known anywhere else.

manifest.json    what the run is: identity (must be equal to go on), and circumstances
metrics.jsonl    one line per logged step
status.json      running, stopped, finished or failed, and why
lock             held by the one process that writes
checkpoints/     see train/checkpoint.py
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Self, TypeAlias, get_args

from isoflop.errors import InputError, IsoflopError, Problem
from isoflop.runs import lock
from isoflop.runs.durable import UNFINISHED, WriteFailed, sweep, write_whole
from isoflop.runs.metrics import MetricsWriter, read_metrics
from isoflop.runs.text import Json, decode, encode, fingerprint, read_object

SCHEMA = "isoflop/1"
MANIFEST, STATUS = "manifest.json", "status.json"

State: TypeAlias = Literal["running", "stopped", "finished", "failed", "interrupted"]


@dataclass(frozen=True, slots=True)
class Manifest:
    """What a run is.

    `identity` is everything that decides its bits (recipe, arch, data, versions, threads):
    a run is continued only where all of it is equal. `about` is worth knowing and decides
    nothing (machine, date).
    """

    identity: Mapping[str, Any]
    about: Mapping[str, Any] = field(default_factory=dict)

    @property
    def fingerprint(self) -> str:
        """SHA-256 of the identity."""
        return fingerprint(self.identity)

    def differences(self, earlier: Manifest) -> list[Problem]:
        """Each key of the identity in which `earlier` is another run.

        >>> now, then = Manifest({"recipe": {"steps": 9}}), Manifest({"recipe": {"steps": 8}})
        >>> print(now.differences(then)[0])
        recipe.steps=9: must equal the run's own 8 (restore it, or use a new directory)
        """
        mine, theirs = flatten(self.identity), flatten(earlier.identity)
        hint = "restore it, or use a new directory"
        return [
            Problem(key, mine.get(key), f"equals the run's own {theirs.get(key)}", hint)
            for key in sorted(mine.keys() | theirs.keys())
            if mine.get(key) != theirs.get(key)
        ]

    def to_json(self) -> Json:
        return {"schema": SCHEMA, "identity": dict(self.identity), "about": dict(self.about)}


@dataclass(frozen=True, slots=True)
class Status:
    """How far a run is. `interrupted` is never written: it is `running` without a process."""

    state: State
    reason: str = ""
    details: Mapping[str, Any] = field(default_factory=dict)
    updated: str = ""

    def to_json(self) -> Json:
        details = dict(self.details)
        return {"schema": SCHEMA, "state": self.state, "reason": self.reason,
                "details": details, "updated": now()}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Record:
    """A run as read: nothing is locked, nothing is written."""

    path: Path
    manifest: Manifest
    status: Status
    metrics: tuple[Json, ...]


class Run:
    """A run directory open for writing, held by this process alone.

    Use it as a context: an error that leaves it is written to the status, and the lock is
    released in any case.
    """

    def __init__(self, path: Path, manifest: Manifest) -> None:
        """Take the lock on an existing folder and write the manifest if there is none."""
        self.path = path
        self._lock = lock.Lock(path)
        try:
            sweep(path)
            if (path / MANIFEST).exists():
                _must_equal(path, manifest)
            else:
                write_whole(path / MANIFEST, encode(manifest.to_json()))
            self.manifest = manifest
            self._metrics = MetricsWriter(path)
        except BaseException:
            self._lock.release()
            raise

    @classmethod
    def create(cls, path: Path | str, manifest: Manifest) -> Self:
        """Start a run in a new or empty folder, or go on with the same run.

        Raises:
            InputError: the folder holds something else or another run, or a process holds it.
        """
        folder = Path(path)
        try:
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            names = {name for name in os.listdir(folder) if not name.startswith(UNFINISHED)}  # noqa: PTH208 - names, not paths
        except (OSError, ValueError) as error:
            why = getattr(error, "strerror", None) or str(error)
            problem = Problem("run directory", str(path), "can be made and read", why)
            raise InputError(str(path), [problem]) from None
        if MANIFEST not in names and names - {lock.NAME}:
            problem = Problem("run directory", str(path), "is new, empty, or a run of this recipe",
                              f"it holds {', '.join(sorted(names)[:3])}")  # fmt: skip
            raise InputError(str(path), [problem])
        plain = Manifest(decode(encode(manifest.identity)), decode(encode(manifest.about)))
        return cls(folder, plain)

    @classmethod
    def open(cls, path: Path | str) -> Self:
        """Go on with an existing run, whatever it is.

        Raises:
            InputError: there is no run, or another process holds it.
        """
        return cls(Path(path), _read_manifest(Path(path)))

    @staticmethod
    def read(path: Path | str) -> Record:
        """A run as it stands, also while another process writes it.

        Raises:
            InputError: there is no run, or a file of it is damaged.
        """
        folder = Path(path)
        manifest = _read_manifest(folder)
        return Record(folder, manifest, read_status(folder), tuple(read_metrics(folder)))

    def log(self, row: Mapping[str, object]) -> None:
        """Append one row to metrics.jsonl."""
        self._metrics.append(row)

    def sync(self) -> None:
        """Force the logged rows to the disk, so that no checkpoint is ahead of its log."""
        self._metrics.sync()

    def write_status(self, status: Status) -> None:
        write_whole(self.path / STATUS, encode(status.to_json()))

    def close(self) -> None:
        self._metrics.close()
        self._lock.release()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None
    ) -> None:
        try:
            if error is not None:
                reason = str(error) if isinstance(error, IsoflopError) else repr(error)
                with suppress(WriteFailed):  # the disk may be full: the first error is the news
                    self.write_status(Status("failed", reason))
        finally:
            self.close()


def read_status(folder: Path) -> Status:
    """The status of a run; a run that says `running` while nobody holds it is `interrupted`."""
    if not (folder / STATUS).exists():
        return Status("running" if lock.is_held(folder) else "interrupted")
    value = read_object(folder / STATUS)
    if value.get("schema") != SCHEMA or value.get("state") not in get_args(State):
        problem = Problem(STATUS, value.get("state"), f"is a status of schema {SCHEMA}")
        raise InputError(str(folder), [problem])
    state: State = value["state"]
    if state == "running" and not lock.is_held(folder):
        state = "interrupted"
    return Status(state, value["reason"], value["details"], value["updated"])


def flatten(value: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested objects as one level of dotted keys.

    >>> flatten({"recipe": {"steps": 8}, "threads": 1})
    {'recipe.steps': 8, 'threads': 1}
    """
    flat: dict[str, Any] = {}
    for key, item in value.items():
        inner = isinstance(item, Mapping)
        flat |= flatten(item, f"{prefix}{key}.") if inner else {f"{prefix}{key}": item}
    return flat


def now() -> str:
    """The time in UTC, to the second."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def _must_equal(folder: Path, manifest: Manifest) -> None:
    problems = manifest.differences(_read_manifest(folder))
    if problems:
        raise InputError(str(folder), problems)


def _read_manifest(folder: Path) -> Manifest:
    value = read_object(folder / MANIFEST)
    identity, about = value.get("identity"), value.get("about")
    fine = isinstance(identity, dict) and isinstance(about, dict)
    if value.get("schema") != SCHEMA or not fine:
        problem = Problem(MANIFEST, value.get("schema"), f"is a manifest of schema {SCHEMA}")
        raise InputError(str(folder), [problem])
    return Manifest(identity, about)  # type: ignore[arg-type]  # `fine` has checked both
