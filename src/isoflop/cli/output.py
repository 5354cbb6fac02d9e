"""Where output goes: data on stdout, everything else on stderr."""

from __future__ import annotations

import json
import sys
from typing import Any

SCHEMA = "isoflop/1"


def emit(command: str, data: dict[str, Any]) -> None:
    """One JSON object on stdout. Infinities and NaN are never written."""
    whole = {"schema": SCHEMA, "command": command, **data}
    print(json.dumps(whole, indent=2, allow_nan=False))


def say(text: str = "") -> None:
    """Text for people, on stdout."""
    print(text)


def note(text: str) -> None:
    """Progress and reasoning, on stderr."""
    print(text, file=sys.stderr)
