"""isoflop schema: the published form of every command's JSON."""

from __future__ import annotations

import json

from isoflop.cli.output import say


def schema(command: str | None = None, /) -> None:
    """Print the JSON Schema of what --json prints.

    Parameters
    ----------
    command
        One command, such as count or "plan train"; all of them when not given.
    """
    from isoflop.cli.outputs import schemas
    from isoflop.errors import UnknownName

    known = schemas()
    if command is None:
        return say(json.dumps({"schema": "isoflop/1", "commands": known}, indent=2))
    if command not in known:
        raise UnknownName("command with JSON output", command, known, f"one of {', '.join(known)}")
    return say(json.dumps(known[command], indent=2))
