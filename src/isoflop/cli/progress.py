"""A progress line on stderr; silent where stderr is not a terminal."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeAlias

#: Called with (done so far, a word about now).
Advance: TypeAlias = Callable[[float, str], None]


@contextmanager
def bar(title: str, whole: float) -> Iterator[Advance]:
    """A bar with the time left. `whole` is in the unit that `Advance` is called with.

    >>> with bar("counting", 2) as advance:
    ...     advance(1, "one")
    """
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    console = Console(stderr=True)
    columns = (TextColumn("{task.description:<22}"), BarColumn(28), TimeElapsedColumn(),
               TextColumn("left"), TimeRemainingColumn(), TextColumn("{task.fields[word]}"))  # fmt: skip
    with Progress(
        *columns, console=console, transient=True, disable=not console.is_terminal
    ) as shown:
        task = shown.add_task(title, total=whole, word="")

        def advance(done: float, word: str = "") -> None:
            shown.update(task, completed=done, word=word)

        yield advance


@contextmanager
def busy(what: str) -> Iterator[None]:
    """A word about a wait whose end is not known.

    >>> with busy("counting"):
    ...     pass
    """
    from rich.console import Console

    console = Console(stderr=True)
    if not console.is_terminal:
        yield
        return
    with console.status(what):
        yield
