"""isoflop train"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

from cyclopts import Parameter

from isoflop.arch import Arch
from isoflop.cli.options import Json, load_model
from isoflop.cli.output import emit, note, say
from isoflop.cli.progress import bar
from isoflop.count import (
    TRAINING_STATES,
    Precision,
    Workload,
    flops_training,
    memory_training,
)
from isoflop.errors import Infeasible, InputError, Problem
from isoflop.quantity.units import format_bytes, format_exact, format_seconds
from isoflop.report.text import table


def train(
    recipe: Path,
    /,
    *,
    output: Annotated[Path | None, Parameter(name=["--output", "-o"])] = None,
    as_json: Json = False,
) -> None:
    """Train the model of a recipe, or go on where it stopped.

    Parameters
    ----------
    recipe
        A TOML file: model, seq_len, batch_size, steps, learning_rate, and what else
        `isoflop.train.recipe.Recipe` has.
    output
        The run's directory; runs/NAME-OF-THE-RECIPE when not given.
    """
    from isoflop.train.data import read_corpus
    from isoflop.train.loop import train as run_training
    from isoflop.train.recipe import read_recipe

    said = read_recipe(recipe)
    arch = read_model(said.model, recipe)
    folder = output or Path("runs") / recipe.stem
    work = Workload.train(said.batch_size, said.seq_len)
    check_memory(arch, work, said.precision)
    corpus = read_corpus(said.data)
    flops_per_token = float(flops_training(arch, work).value) / said.tokens_per_step
    with bar(recipe.stem, said.steps) as advance:

        def on_step(row: Mapping[str, Any]) -> None:
            loss = row["loss"]  # None in a step that is skipped
            advance(row["step"], "skipped" if loss is None else f"loss {loss:.4f}")

        result = run_training(
            said, arch, corpus, folder, flops_per_token=flops_per_token, on_step=on_step
        )
    data = {
        "run_dir": str(folder),
        "state": result.state,
        "reason": result.reason,
        "step": result.step,
        "tokens": result.tokens,
        "loss": result.loss,
        "val_loss": result.val_loss,
        "seconds_step": result.seconds_step,
        "skipped": result.skipped,
        "bytes_peak_rss": result.bytes_peak_rss,
    }
    if as_json:
        emit("train", data)
    else:
        say(_tell(data))
    if result.state != "finished":
        note("run the same command again to go on")
        raise Infeasible(f"the run is {result.state}: {result.reason}")


def check_memory(arch: Arch, work: Workload, precision: str) -> None:
    """Refuse a step that cannot fit: the system would kill the run without a word.

    Only what the trainer surely holds is counted: weights, Adam's state and what is saved for the
    backward pass, which autocast keeps in bf16. `isoflop check --run` predicts the peak.

    Raises:
        Infeasible: this machine has less memory; the message says how much is needed.
    """
    state = TRAINING_STATES["fp32"]
    saved = replace(state, activation=Precision(precision))
    tree = memory_training(arch, work, saved)
    needed = tree.value - tree.find("bytes_grads").value
    there = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if needed > there:
        raise Infeasible(
            f"a training step of {arch.name} takes {format_bytes(needed)}, more than this "
            f"machine's {format_bytes(there)}; try a smaller model, batch_size or seq_len"
        )


def read_model(model: str | Mapping[str, Any], recipe: Path) -> Arch:
    """The recipe's model: a name or path as on the command line, or a spec as a table.

    Raises:
        InputError: no model is given, or it cannot be read.
    """
    from isoflop.arch.toml import spec_from_table

    if model == "":
        rule = "is given: a zoo name, a path, or a table [model]"
        raise InputError(str(recipe), [Problem("model", '""', rule)])
    if isinstance(model, str):
        beside = recipe.parent / model
        return load_model(str(beside) if model and beside.exists() else model)
    return spec_from_table(model, str(recipe))


def _tell(data: Mapping[str, Any]) -> str:
    rows = [
        ["  tokens", format_exact(data["tokens"])],
        [
            "  validation loss",
            f"{data['val_loss']:.4f} nats per byte" if data["val_loss"] else "not evaluated",
        ],
        ["  median step", format_seconds(data["seconds_step"] or 0)],
        ["  peak memory", format_bytes(data["bytes_peak_rss"] or 0)],
    ]
    return f"{data['run_dir']}: {data['state']} at step {format_exact(data['step'])}\n{table(rows)}"
