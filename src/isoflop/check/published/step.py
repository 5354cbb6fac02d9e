"""Rows of published step times: each as a `Setting` and the seconds that were measured."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, cast

from isoflop.check.published.machines import read_cluster, read_compute, stack_of
from isoflop.check.published.rates import PEAK, Rate, seconds_step, stated_rates
from isoflop.check.published.recipes import with_recipe
from isoflop.check.published.shapes import Skip, read_arch
from isoflop.check.published.table import Cells, Table, read_table, shown
from isoflop.errors import InputError, Problem
from isoflop.hardware.node import MOST_CHIPS
from isoflop.hardware.stack import stack_names
from isoflop.plan.layout import Layout, broken_rules
from isoflop.plan.memory.shard import Recompute
from isoflop.plan.step.setting import Setting

#: Columns that say what was run.
CONFIGURATION = ("model", "gpu_type", "num_gpus", "tp", "pp", "dp", "cp", "ep", "virtual_pp",
                 "micro_batch", "global_batch_seqs", "seq_len", "date_or_version")  # fmt: skip

LARGEST_SEQ_LEN, LARGEST_BATCH = 2**27, 10**9


@dataclass(frozen=True, slots=True)
class Measured:
    """One published step.

    `setting` and `measured_seconds` are None where `skipped` says why. `assumptions` are the
    blanks that were filled; `notes` what is odd about the row; `rates` the FLOP/s that it
    states, with the FLOPs of a step as its source counts them.
    """

    row_id: str
    family: str
    kind: str
    model: str
    chip: str
    setting: Setting | None
    measured_seconds: float | None
    rates: tuple[Rate, ...]
    assumptions: tuple[str, ...]
    skipped: str
    notes: tuple[str, ...]
    source: str


def read_rows(path: str | Path) -> tuple[Measured, ...]:
    """Every row of a table of step times.

    Raises:
        InputError: the file cannot be read, is another kind of table, or has bad cells; each
            is named by row and column.
    """
    table = read_table(path)
    if table.form != "step":
        rule = "is a table of step times, with a column global_batch_seqs"
        raise InputError(table.name, [Problem("file", f"a table of {table.form} rows", rule)])
    return measured_rows(table)


def measured_rows(table: Table) -> tuple[Measured, ...]:
    """Every row of a table already read."""
    found, bad = [], []
    seen: set[tuple[str, ...]] = set()
    for cells in table.cells():
        row = with_recipe(_in_brackets(cells, seen))
        found.append(measured(row))
        bad += row.problems
    if bad:
        raise InputError(table.name, shown(bad))
    return tuple(found)


def _in_brackets(cells: Cells, seen: set[tuple[str, ...]]) -> Cells:
    """NeMo's tables print "FP8-CS (FP8-MX)": of two such rows the second is in brackets."""
    if cells.text("precision").casefold() != "fp8-cs (fp8-mx)":
        return cells
    same = tuple(cells.text(c) for c in CONFIGURATION)
    if same not in seen:
        seen.add(same)
        return cells
    found = replace(cells, row={**cells.row, "precision": "FP8-MX"})
    found.assume("precision: FP8-MX, the second of two rows that differ in their result alone")
    return found


def measured(cells: Cells) -> Measured:
    """One row; bad cells are left in `cells.problems`."""
    setting, seconds, skipped = None, None, ""
    rates: tuple[Rate, ...] = ()
    try:
        setting = read_setting(cells)
    except Skip as why:
        skipped = str(why)
    except InputError as error:  # sizes that make no model or no cluster
        cells.problems += [
            Problem(f"row {cells.line}, {p.field}", p.value, p.rule, p.hint) for p in error.problems
        ]
    if setting is not None and not cells.problems:
        rates = stated_rates(cells, setting)
        seconds = seconds_step(cells, setting, rates)
        if seconds is None:
            skipped = "neither a time nor a rate of a known convention is stated"
    return Measured(
        row_id=cells.text("row_id"),
        family=cells.text("source_family") or "unnamed",
        kind=cells.text("task") or "pretrain",
        model=cells.text("model"),
        chip="" if setting is None else setting.cluster.chip.name,
        setting=None if skipped else setting,
        measured_seconds=seconds,
        rates=rates,
        assumptions=tuple(cells.assumed),
        skipped=skipped,
        notes=() if setting is None or skipped else tuple(_odd(cells, setting)),
        source=cells.text("source"),
    )


def read_setting(cells: Cells) -> Setting | None:
    """The row's configuration, blanks filled; None where a cell is bad.

    Raises:
        Skip: something that a step's time depends on is not stated, or not modelled.
    """
    if cells.text("task").casefold() in ("lora", "qlora"):
        raise Skip("adapters are trained, which a Setting does not say")
    count, seq_len = cells.whole("num_gpus", MOST_CHIPS), cells.whole("seq_len", LARGEST_SEQ_LEN)
    compute, recompute = read_compute(cells), read_recompute(cells)
    cluster = None if count is None else read_cluster(cells, "gpu_type", count)
    missing = [c for c in ("num_gpus", "seq_len") if not cells.text(c)]
    if missing:
        raise Skip(f"{' and '.join(missing)} not stated")
    layout = None if count is None else read_layout(cells, count)
    batch = None if layout is None else read_batch(cells, layout)
    if cluster is None or layout is None or seq_len is None or compute is None or batch is None:
        return None
    if PEAK.get(compute, compute) not in cluster.chip.peaks:
        raise Skip(f"{cluster.chip.name} has no stated peak in {compute}")
    arch, stack = read_arch(cells, seq_len), stack_of(cells)
    if stack.casefold() not in stack_names():
        raise Skip(f"stack {stack} is not known; `unknown` stands for any other")
    return Setting(arch, cluster, layout, seq_len, batch, compute, recompute, stack)


def read_recompute(cells: Cells) -> Recompute:
    """What is made again in backward; nothing where the cell is blank."""
    said = cells.choice("recompute", {r: r for r in ("none", "selective", "full")})
    if not cells.text("recompute"):
        cells.assume("recompute: none")
    return cast(Recompute, said or "none")


def read_batch(cells: Cells, layout: Layout) -> int | None:
    """Sequences per step; one micro-batch per copy where only that is stated.

    Raises:
        Skip: neither is stated.
    """
    if cells.text("global_batch_seqs"):
        return cells.whole("global_batch_seqs", LARGEST_BATCH)
    if not cells.text("micro_batch"):
        raise Skip("the global batch is not stated")
    cells.assume("global_batch_seqs: one micro-batch per copy")
    return layout.dp * layout.micro_batch


def read_layout(cells: Cells, count: int) -> Layout:
    """How the step is split.

    Raises:
        Skip: the layout is not stated, or does not use the accelerators stated.
    """
    if not cells.text("tp") and not cells.text("pp") and not cells.text("dp") and count > 1:
        raise Skip("the layout is not stated: one of tp, pp and dp at least")
    tp, pp, cp = (cells.or_assume(c, 1) for c in ("tp", "pp", "cp"))
    if count % (tp * pp * cp):
        raise Skip(f"tp x pp x cp = {tp * pp * cp} does not divide {count} accelerators")
    dp = count // (tp * pp * cp)
    if not cells.text("dp"):
        cells.assume("dp: accelerators / (tp x pp x cp)")
    elif cells.whole("dp") not in (dp, None):
        raise Skip(f"the layout as printed does not use {count} accelerators")
    return Layout(
        tp=tp, pp=pp, dp=dp, cp=cp,
        ep=cells.or_assume("ep", 1),
        virtual=cells.or_assume("virtual_pp", 1) if pp > 1 else 1,
        micro_batch=cells.or_assume("micro_batch", 1),
        zero=_zero(cells, dp * cp),
        sequence_parallel=_sequence_parallel(cells, tp),
    )  # fmt: skip


#: What a `zero_fsdp` cell says is split, by the first word of it that is known.
ZERO = (("shard_grad_op", 2), ("fsdp", 3), ("zero-3", 3), ("zero-2", 2), ("zero-1", 1),
        ("zero-0", 0), ("dist-opt", 1), ("ddp", 0), ("none", 0))  # fmt: skip


def _zero(cells: Cells, copies: int) -> Literal[0, 1, 2, 3]:
    text = cells.text("zero_fsdp").casefold()
    if not text:
        if copies > 1:
            cells.assume("zero_fsdp: ZeRO-1")
        return 1 if copies > 1 else 0
    for word, stage in ZERO:
        if word in text:
            return cast(Literal[0, 1, 2, 3], stage)
    cells.wrong("zero_fsdp", f"says one of {', '.join(word for word, _ in ZERO)}")
    return 0


def _sequence_parallel(cells: Cells, tp: int) -> bool:
    """Where it is blank: NeMo's recipes have it wherever tp is above 1, older trainers had not."""
    said = cells.choice("sequence_parallel", {"yes": "yes", "no": "", "true": "yes", "false": ""})
    if tp == 1:
        return True  # nothing is split, and `Layout` prints its default
    if cells.text("sequence_parallel"):
        return bool(said)
    usual = stack_of(cells).startswith("nemo")
    cells.assume(f"sequence_parallel: {'yes' if usual else 'no'}")
    return usual


def _odd(cells: Cells, setting: Setting) -> list[str]:
    """What a reader of the row should know."""
    odd = [f"outside isoflop's rules of layouts: {problem}" for problem in
           broken_rules(setting.layout, setting.arch, setting.cluster, setting.global_batch)]  # fmt: skip
    words = {"tokendrop": "experts drop tokens over capacity", "dropless": "experts drop no token"}
    odd += [told for word, told in words.items() if word in cells.text("model").casefold()]
    if "forced balance" in cells.text("notes") and cells.text("active_params"):
        odd.append("experts' loads are forced to be equal")
    if setting.arch.max_seq_len < setting.seq_len:
        odd.append("longer than the model's context")
    if re.search("recalled|!=|rounded", cells.text("notes")):
        odd.append(cells.text("notes"))
    return odd
