"""One run in a process of its own, so that its memory is its own and a crash stays there."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, TypeAlias

from isoflop.check.process import fork_server
from isoflop.errors import Fault
from isoflop.study.ladder import Rung
from isoflop.train.recipe import PYTHON_LIBRARY

#: Called with (steps done, steps in all, training loss).
OnProgress: TypeAlias = Callable[[int, int, float], None]

#: Steps between two reports of a child to its parent.
REPORT_EVERY = 16


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a run measured: nats per byte, seconds of its steps, the largest memory of its steps."""

    val_loss: float
    seconds: float
    seconds_step: float
    bytes_peak: int
    run_dir: str

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def run(
    rung: Rung, run_dir: Path, data: str = PYTHON_LIBRARY, on_progress: OnProgress | None = None
) -> Outcome:
    """Train one rung in a fresh process and wait for it.

    Raises:
        Fault: the process failed; the message is its own.
    """
    context = fork_server()
    receiver, sender = context.Pipe(duplex=False)
    child = context.Process(target=_child, args=(rung, run_dir, data, sender), daemon=True)
    child.start()
    sender.close()
    try:
        return _listen(receiver, rung, on_progress)
    finally:
        child.join()


def _listen(receiver: Connection, rung: Rung, on_progress: OnProgress | None) -> Outcome:
    while True:
        try:
            message = receiver.recv()
        except EOFError:
            raise Fault(f"{rung.name}: its process ended without a result") from None
        if isinstance(message, Outcome):
            return message
        if isinstance(message, str):
            raise Fault(f"{rung.name}: {message}")
        if on_progress is not None:
            on_progress(*message)


def _child(rung: Rung, run_dir: Path, data: str, sender: Connection) -> None:
    try:
        sender.send(train_here(rung, run_dir, data, sender))
    except Exception as error:  # noqa: BLE001 - the parent raises it as a Fault
        sender.send(f"{type(error).__name__}: {error}")
    finally:
        sender.close()


def train_here(rung: Rung, run_dir: Path, data: str, sender: Connection) -> Outcome:
    """Train in this process; memory is that of the steps, from after the data is read."""
    from isoflop.check.measure import bytes_peak, bytes_resident, reset_peak
    from isoflop.train.data import read_corpus
    from isoflop.train.loop import train

    corpus = read_corpus(data)
    reset_peak()
    baseline = peak = bytes_resident()

    def report(row: Mapping[str, Any]) -> None:
        nonlocal peak
        if row["step"] < rung.recipe.steps:  # the last row comes after the evaluation
            peak = bytes_peak()
        if row["step"] % REPORT_EVERY == 0:
            sender.send((row["step"], rung.recipe.steps, row["loss"]))

    flops_per_token = rung.flops / rung.tokens
    result = train(
        rung.recipe, rung.arch, corpus, run_dir, flops_per_token=flops_per_token, on_step=report
    )
    if result.val_loss is None or result.seconds_step is None:
        raise Fault(f"the run ended {result.state} without a validation loss: {result.reason}")
    seconds = sum(result.seconds_steps)
    return Outcome(result.val_loss, seconds, result.seconds_step, peak - baseline, str(run_dir))
