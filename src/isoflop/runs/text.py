"""JSON as run directories hold it: one way to write it, one strict way to read it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeAlias

from isoflop.errors import InputError, Problem

Json: TypeAlias = dict[str, Any]

#: A manifest is a few KB; a file far beyond is not ours and is not read whole.
MOST_BYTES = 4 * 2**20


def encode(value: Mapping[str, Any]) -> bytes:
    r"""The one JSON text of a value: sorted keys, no NaN, a line end.

    >>> encode({"b": 1, "a": 0.1})
    b'{"a": 0.1, "b": 1}\n'
    """
    return (json.dumps(value, sort_keys=True, allow_nan=False) + "\n").encode()


def fingerprint(value: Mapping[str, Any]) -> str:
    """SHA-256 of a value's one JSON text.

    >>> fingerprint({"b": 1, "a": 2}) == fingerprint({"a": 2, "b": 1})
    True
    """
    return hashlib.sha256(encode(value)).hexdigest()


def decode(data: bytes) -> Json:
    """A JSON object; `ValueError` for anything else, whatever is wrong with it."""
    try:
        value = json.loads(data, parse_constant=_refuse_constant)
    except RecursionError:
        raise ValueError("nested too deeply") from None
    if not isinstance(value, dict):
        raise ValueError("not an object")  # noqa: TRY004 - one kind of error for the caller
    return value


def read_object(path: Path) -> Json:
    """The object in a JSON file of ours.

    Raises:
        InputError: missing, unreadable, too large, or not a JSON object.
    """
    try:
        with path.open("rb") as file:
            return decode(file.read(MOST_BYTES))  # what is cut off is no longer JSON
    except (OSError, ValueError) as error:
        why = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        problem = Problem(path.name, why, "is a readable JSON object written by isoflop")
        raise InputError(str(path.parent), [problem]) from None


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")
