"""Writing so that a crash, a full disk or a cut of power leaves the old file or the new one.

Never a torn one: the bytes go to a temporary file in the same folder, are forced to the
disk, and take the name in one step; then the folder itself is forced to the disk.
"""

from __future__ import annotations

import errno
import os
import shutil
import tempfile
from pathlib import Path

from isoflop.errors import Infeasible
from isoflop.quantity.units import format_bytes

#: What every unfinished file and folder of ours is called first.
UNFINISHED = ".isoflop-"


class WriteFailed(Infeasible):
    """The disk did not take the bytes; what stood there before is intact."""

    def __init__(self, path: Path, n_bytes: int, error: OSError) -> None:
        self.path = path
        try:
            free = f"{format_bytes(shutil.disk_usage(path.parent).free)} are free there"
        except OSError:
            free = "the folder cannot be read"
        room, retry = "", "write elsewhere, or again"
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            room, retry = f"{free}; ", "make room and run the same command again"
        super().__init__(
            f"{path}: could not write {format_bytes(n_bytes)}: {error.strerror or error}; {room}"
            f"what was saved before is intact: {retry}"
        )


def write_whole(path: Path, data: bytes) -> None:
    """Write a file that is there whole or not at all, and outlives a cut of power.

    Raises:
        WriteFailed: no room, no permission, a limit; the old file is still there.
    """
    try:
        handle, name = tempfile.mkstemp(prefix=UNFINISHED, dir=path.parent)
        try:
            with os.fdopen(handle, "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            os.replace(name, path)  # noqa: PTH105 - the call a crash test intercepts
        except BaseException:
            Path(name).unlink(missing_ok=True)
            raise
        sync_folder(path.parent)
    except OSError as error:
        raise WriteFailed(path, len(data), error) from error


def sync_folder(path: Path) -> None:
    """Force a folder's list of names to the disk."""
    handle = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def sweep(folder: Path) -> None:
    """Remove what a killed process left unfinished; call it only while holding the lock."""
    for left in folder.glob(f"{UNFINISHED}*"):
        if left.is_dir() and not left.is_symlink():
            shutil.rmtree(left)
        else:
            left.unlink()
