"""One process per run directory: a lock the kernel takes back when its owner dies.

flock belongs to the open file, so `kill -9` releases it; the file itself stays, because
to remove a lock file is to let two processes each hold "the" lock.
"""

from __future__ import annotations

import fcntl
import json
import os
import socket
import time
from contextlib import suppress
from pathlib import Path

from isoflop.errors import InputError, Problem

NAME = "lock"

#: `is_held` takes the lock for a moment; a writer that meets it there tries again.
TRIES, SECONDS_BETWEEN_TRIES = 5, 0.05


class Lock:
    """The lock on one folder, held from construction to `release`.

    Raises:
        InputError: another process holds it; names its pid and host.
    """

    def __init__(self, folder: Path) -> None:
        self._handle = os.open(folder / NAME, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o600)
        if not _take(self._handle):
            owner = _owner(self._handle)
            os.close(self._handle)
            hint = "wait for it, stop it, or use another directory"
            raise InputError(
                str(folder), [Problem("lock", owner, "is not held by another process", hint)]
            )
        os.ftruncate(self._handle, 0)
        text = json.dumps({"pid": os.getpid(), "host": socket.gethostname()})
        with suppress(OSError):  # a full disk must not stop a run that could say so better
            os.pwrite(self._handle, text.encode(), 0)

    def release(self) -> None:
        os.close(self._handle)


def is_held(folder: Path) -> bool:
    """Whether a process holds the lock on `folder` right now."""
    try:
        handle = os.open(folder / NAME, os.O_RDONLY)
    except OSError:
        return False
    try:
        fcntl.flock(handle, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(handle)
    return False


def _take(handle: int) -> bool:
    for attempt in range(TRIES):
        with suppress(BlockingIOError):
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        if attempt + 1 < TRIES:
            time.sleep(SECONDS_BETWEEN_TRIES)
    return False


def _owner(handle: int) -> str:
    try:
        owner = json.loads(os.pread(handle, 4096, 0))
        return f"pid {int(owner['pid'])} on {owner['host']}"
    except (ValueError, KeyError, TypeError, RecursionError):
        return "a process that has not yet written its name"
