"""Published training steps, predicted by isoflop and by other planners: benchmarks/peers.md.

    OMP_NUM_THREADS=1 python benchmarks/peers.py --python VENV/bin/python -o benchmarks/peers.md

The steps are those that isoflop ships with (src/isoflop/check/published/measurements.csv). The
peers run in their own interpreter (benchmarks/peers_ask.py), made by the two commands that the
page begins with; isoflop imports nothing of them.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import subprocess
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from datetime import UTC, datetime
from importlib.resources import as_file, files
from pathlib import Path
from typing import Any, TypeAlias

from isoflop.arch import Arch, Dense
from isoflop.arch.zoo import entry
from isoflop.check.published import Judged, Measured, Score, read_rows
from isoflop.check.published.judge import judged, left_out
from isoflop.check.published.predict import PREDICT, REFIT
from isoflop.check.published.score import score
from isoflop.count import FLOPS_CONVENTIONS, Workload, params
from isoflop.hardware import parse_cluster
from isoflop.plan.search import search
from isoflop.plan.step.setting import Setting
from isoflop.plan.training.ask import TrainAsk
from isoflop.plan.training.work import Work

Row: TypeAlias = dict[str, Any]

ASK = Path(__file__).with_name("peers_ask.py")
#: llm-analysis: its README, "How to Set FLOPS and Memory Efficiency". mlsysim: the middle of
#: 0.40 to 0.55, its README's "Efficiency Parameter Guide" for Megatron-LM and large models.
RECOMMENDED = {"llm-analysis": 0.5, "mlsysim": 0.475, "mlsysim given FLOPs": 0.475}
#: As pip knows them; the third way above is mlsysim told a number that it does not work out.
PEERS = ("llm-analysis", "mlsysim")
#: What is tried for the one efficiency of a peer that is fitted to the other sources.
TRIED = tuple(round(0.10 + 0.02 * step, 2) for step in range(46))
#: The search that both mlsysim and isoflop are asked for: 64 copies fit without other choices.
SEARCH = ("llama-3-8b", "64xh100-sxm", 8192, 512)
PASSES = 5


# --- what is asked ---------------------------------------------------------------------------


def row_of(row_id: str, setting: Setting) -> Row:
    """One setting in words that every peer is given alike."""
    arch, layout = setting.arch, setting.layout
    asked = {"id": row_id, "chip": setting.cluster.chip.name, "compute": setting.compute,
             "recompute": setting.recompute, "seq_len": setting.seq_len,
             "global_batch": setting.global_batch, "n_micro_batches": setting.n_micro_batches,
             **layout.to_json()}  # fmt: skip
    if not all(isinstance(kind.feed_forward, Dense) for kind in arch.kinds.values()):
        return asked | {"experts": True}
    flops = flops_forward_per_token(arch, setting.seq_len)
    return asked | shape_of(arch) | {"experts": False, "flops_forward_per_token": flops}


def shape_of(arch: Arch) -> Row:
    """A dense model with layers of one kind."""
    layer = next(iter(arch.kinds.values()))
    return {
        "n_layers": arch.n_layers, "d_model": arch.d_model, "vocab_size": arch.vocab_size,
        "n_heads": layer.attention.n_heads, "n_kv_heads": layer.attention.n_kv_heads,
        "d_ff": layer.feed_forward.d_ff, "gated": layer.feed_forward.gated,
        "params": int(params(arch).value),
    }  # fmt: skip


def flops_forward_per_token(arch: Arch, seq_len: int) -> float:
    """With the scores below the diagonal; a step has three times as many."""
    step = FLOPS_CONVENTIONS["exact-causal"].count(arch, Workload.train(1, seq_len))
    return float(step.value) / 3 / seq_len


def search_row() -> Row:
    model, cluster, seq_len, batch = SEARCH
    count, chip = cluster.split("x", 1)
    bare = {"id": model, "chip": chip, "tp": 1, "pp": 1, "dp": int(count), "seq_len": seq_len,
            "global_batch": batch}  # fmt: skip
    return bare | shape_of(entry(model).arch)


def ask(python: Path, asked: Mapping[str, Any]) -> dict[str, Any]:
    found = subprocess.run(
        [python, ASK], input=json.dumps(asked), capture_output=True, text=True, check=False
    )
    if found.returncode:
        raise SystemExit(f"peers_ask.py failed:\n{found.stderr}")
    answer: dict[str, Any] = json.loads(found.stdout)
    return answer


# --- columns of predictions --------------------------------------------------------------------

#: Seconds by row; a row that the planner cannot express is not there.
Column: TypeAlias = dict[str, float]


def seconds_of(answers: Mapping[str, float | str]) -> Column:
    return {row: found for row, found in answers.items() if not isinstance(found, str)}


def asked_at(answers: Mapping[str, Any], name: str) -> dict[float, Column]:
    return {float(share): seconds_of(found) for share, found in answers[name]["at"].items()}


def fitted_shares(at: Mapping[float, Column], rows: Sequence[Measured]) -> dict[str, float]:
    """For each source the efficiency with the smallest mean error over the other sources."""
    found = {}
    for family in dict.fromkeys(row.family for row in rows):
        others = [row for row in rows if row.family != family]
        errors = {share: mean_error(column, others) for share, column in at.items()}
        found[family] = min(errors, key=errors.__getitem__)
    return found


def fitted_elsewhere(at: Mapping[float, Column], rows: Sequence[Measured]) -> Column:
    shares = fitted_shares(at, rows)
    return {r.row_id: at[shares[r.family]][r.row_id] for r in rows
            if r.row_id in at[shares[r.family]]}  # fmt: skip


def mean_error(column: Column, rows: Iterable[Measured]) -> float:
    return statistics.fmean(
        abs(column[row.row_id] / row.measured_seconds - 1)
        for row in rows
        if row.row_id in column and row.measured_seconds
    )


def columns(rows: Sequence[Measured], answers: Mapping[str, Any]) -> dict[str, Column]:
    def ours(found: Iterable[Judged]) -> Column:
        return {row.row_id: row.predicted for row in found if row.predicted is not None}

    made: dict[str, Column] = {}
    for name, share in RECOMMENDED.items():
        at = asked_at(answers, name)
        if name in PEERS:
            made[f"{name}, default"] = seconds_of(answers[name]["default"])
        made[f"{name}, recommended"] = at[share]
        made[f"{name}, fitted to the other sources"] = fitted_elsewhere(at, rows)
    made["isoflop, fitted to the other sources"] = ours(left_out(rows, REFIT, lambda r: r.family))
    made["isoflop, as shipped (fitted to these sources)"] = ours(judged(rows, lambda _: PREDICT))
    return made


def speed(rows: Sequence[Measured]) -> dict[str, float]:
    """Answers per second of the processor: new settings, and the same ones again."""
    seconds = []
    for _ in range(1 + PASSES):
        start = time.process_time()
        judged(rows, lambda _: PREDICT)
        seconds.append(time.process_time() - start)
    return {"first": len(rows) / seconds[0], "again": len(rows) / statistics.median(seconds[1:])}


def searched() -> dict[str, float]:
    model, cluster, seq_len, batch = SEARCH
    work = Work(entry(model).arch, 10**12, seq_len)
    asked = TrainAsk(work, parse_cluster(cluster), batch, stack="nemo-24")
    found = [search(asked).counters for _ in range(PASSES)]
    seconds = statistics.median(counters.seconds_cpu for counters in found)
    return {"layouts": found[0].evaluated, "seconds": seconds}


# --- the page ----------------------------------------------------------------------------------

HEAD = "| | rows | mean | median | largest | mean signed |\n|---|--:|--:|--:|--:|--:|"

PAGE = """# Published training steps, by isoflop and by other planners

{where}

```text
python3 -m venv VENV
VENV/bin/pip install llm-analysis=={versions[llm-analysis]} mlsysim=={versions[mlsysim]}
OMP_NUM_THREADS=1 python benchmarks/peers.py --python VENV/bin/python -o benchmarks/peers.md
```

Peers: llm-analysis {versions[llm-analysis]} (`LLMAnalysis.training`, `latency_per_iter`) and mlsysim
{versions[mlsysim]} (`DistributedModel.solve`, `step_latency_total`), both from PyPI, in Python
{python} of their own. The steps are the {total} that isoflop ships with, each with its source
([measurements.csv](../src/isoflop/check/published/measurements.csv)). Each planner is given the same
shape, layout, batch, recomputation and format. Errors are predicted / measured - 1.

- *default*: efficiencies as the peer has them: 1 in llm-analysis, which calls that a lower bound,
  and 0.5 in mlsysim.
- *recommended*: llm-analysis at 0.5, what its README says of large training; mlsysim at 0.475, the
  middle of the 0.40 to 0.55 that its README gives Megatron-LM, with the overlap of communication
  that it says Megatron-LM has.
- *given FLOPs*: mlsysim takes 2 FLOPs per parameter and token forward, none for attention's scores,
  unless its user says a number. Here it is told isoflop's exact count.
- *fitted to the other sources*: the rows of a source are predicted with numbers fitted to the other
  sources alone: in a peer its one efficiency (0.10 to 1.00 in steps of 0.02), in isoflop its
  uncertain constants, as `isoflop validate` does. These columns compare.
- isoflop *as shipped* has been fitted to these sources, so its errors say nothing of unseen ones.

A source left out is left out of the fit alone: isoflop's formulas were written while these tables
were known, and the efficiencies recommended rest on published runs of Megatron-LM.

## Rows that all three can express

{common}

In 16 bits:

{half}

In FP8:

{fp8}

Mean size of the error by source, the smallest in bold:

{families}

Efficiencies fitted, smallest to largest over the sources left out:
{shares}.

## All rows that each can express

{each}

## What the peers cannot express, of {total} rows

{skipped}

llm-analysis {versions[llm-analysis]} adds neither a pipeline's bubble nor communication to a training
step, and counts a feed-forward block as 16 d_model^2 FLOPs per token whatever its width (its
repository has later code than the package; it was not run). It has no FP8: it was given 8-bit
weights and activations (`w8a8e16`), whose rate on an H100 is the same.

mlsysim tells full recomputation from none; selective counts as none. It ships no node of eight
40 GB A100s: its own chip was put in its DGX A100. Its InfiniBand NDR was taken for H100 and B200,
HDR for A100. Without a pipeline, micro-batches are its steps of gradient accumulation.

Neither has context parallelism, and neither gives a range. Mixtures of experts, which both have a
word for, were left out here.

## Speed

One thread, processor seconds, over the rows that all can express; medians of 5.

| | new settings per second | the same again |
|---|--:|--:|
{speeds}

A new setting costs isoflop the building of its formula, with the range of the result: one by one it
is slower than both. A formula built is evaluated again for other constants, and the search compiles
one formula for a whole array of layouts:

Search for {search_case}:

| | layouts priced | processor seconds | per second |
|---|--:|--:|--:|
{searches}

mlsysim prices powers of two of tensor and pipeline parallelism; isoflop also micro-batches, ZeRO,
recomputation, context parallelism and interleaving. Searches of larger models: [search](search.md).
Measured before on other machines, candidates per second of one core:
Calculon 143, mlsysim 208, SimuMax 11; llm-analysis, which has no search, 1,747 calls.

## Every row

Measured seconds, then errors. L: llm-analysis, M: mlsysim, MF: mlsysim given FLOPs, I: isoflop;
default, recommended, fitted to the other sources.

{rows}
"""


def with_seconds(row: Measured, column: Column) -> Judged:
    return Judged(row.row_id, row.family, row.chip, row.model, "seconds", row.measured_seconds,
                  column.get(row.row_id))  # fmt: skip


def line(found: Score) -> str:
    return (f"| {found.name} | {found.n} | {found.mape:.1%} | {found.median:.1%} "
            f"| {found.max:.1%} | {found.bias:+.1%} |")  # fmt: skip


def table(rows: Sequence[Measured], made: Mapping[str, Column]) -> str:
    found = (score(name, [with_seconds(r, column) for r in rows]) for name, column in made.items())
    return "\n".join([HEAD, *map(line, found)])


def by_family(rows: Sequence[Measured], made: Mapping[str, Column]) -> str:
    names = [name for name in made if "other sources" in name or "recommended" in name]
    heads = ["source", "rows", *names]
    lines = [f"| {' | '.join(heads)} |", "|---|" + "--:|" * (len(heads) - 1)]
    for family in dict.fromkeys(row.family for row in rows):
        own = [row for row in rows if row.family == family]
        errors = [mean_error(made[name], own) for name in names]
        shown = [f"**{e:.1%}**" if e == min(errors) else f"{e:.1%}" for e in errors]
        cells = [family, str(len(own)), *shown]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def every(rows: Sequence[Measured], made: Mapping[str, Column]) -> Iterator[str]:
    short = ("L def.", "L rec.", "L fit.", "M def.", "M rec.", "M fit.", "MF rec.", "MF fit.",
             "I fit.", "I shipped")  # fmt: skip
    heads = ["row", "source", "model", "chips", "layout", "measured s", *short]
    yield f"| {' | '.join(heads)} |"
    yield "|---|---|---|---|---|" + "--:|" * (len(heads) - 5)
    for row in rows:
        errors = [with_seconds(row, column).error for column in made.values()]
        chips = f"{row.setting.cluster.count} {row.chip} {row.setting.compute}"
        layout = f"{row.setting.layout}, {row.setting.seq_len} tokens, {row.setting.recompute}"
        cells = [row.row_id, row.family, row.model, chips, layout, f"{row.measured_seconds:,.2f}",
                 *("-" if e is None else f"{e:+.1%}" for e in errors)]  # fmt: skip
        yield f"| {' | '.join(cells)} |"


def skipped(answers: Mapping[str, Any]) -> str:
    lines = ["| | reason | rows |", "|---|---|--:|"]
    for name in PEERS:
        reasons = Counter(a for a in answers[name]["default"].values() if isinstance(a, str))
        lines += [f"| {name} | {why} | {n} |" for why, n in reasons.most_common()]
        lines.append(f"| {name} | in all | {sum(reasons.values())} |")
    return "\n".join(lines)


def shares_fitted(rows: Sequence[Measured], answers: Mapping[str, Any]) -> str:
    parts = []
    for name in RECOMMENDED:
        found = fitted_shares(asked_at(answers, name), rows).values()
        parts.append(f"{name} {min(found):g} to {max(found):g}")
    return ", ".join(parts)


def rates(found: Mapping[str, float]) -> str:
    each = found["layouts"] / found["seconds"]
    return f"{found['layouts']:,.0f} | {found['seconds']:.2f} | {each:,.0f} |"


def machine() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    cpus = [x.partition(":")[2].strip() for x in lines if x.startswith("model name")]
    return cpus[0] if cpus else platform.machine()


def page(rows: Sequence[Measured], python: Path) -> str:
    told = [row_of(r.row_id, r.setting) for r in rows if r.setting is not None]
    efficiencies = {name: sorted({*TRIED, share}) for name, share in RECOMMENDED.items()}
    answers = ask(python, {"rows": told, "efficiencies": efficiencies, "search": search_row()})
    expressed = [seconds_of(answers[name]["default"]) for name in PEERS]
    common = [r for r in rows if all(r.row_id in column for column in expressed)]
    own = speed(common)  # before anything else builds their formulas
    made = columns(rows, answers)
    fast = {**{name: answers[name]["speed"] for name in PEERS}, "isoflop": own}
    versions = {name: answers[name]["version"] for name in PEERS}
    model, cluster, seq_len, batch = SEARCH
    ran = [r for r in rows if any(r.row_id in column for column in expressed)]
    return PAGE.format(
        where=f"{machine()}, Python {platform.python_version()}, {datetime.now(UTC):%Y-%m-%d %H:%M} UTC",
        versions=versions,
        python=answers["python"],
        total=len(rows),
        common=table(common, made),
        half=table([r for r in common if r.setting and r.setting.compute != "fp8"], made),
        fp8=table([r for r in common if r.setting and r.setting.compute == "fp8"], made),
        families=by_family(common, made),
        shares=shares_fitted(rows, answers),
        each=table(rows, made),
        skipped=skipped(answers),
        speeds="\n".join(f"| {n} | {s['first']:,.0f} | {s['again']:,.0f} |" for n, s in fast.items()),
        search_case=f"{model} on {cluster}, {batch} sequences of {seq_len:,} tokens",
        searches="\n".join([f"| mlsysim | {rates(answers['searched'])}",
                            f"| isoflop | {rates(searched())}"]),
        rows="\n".join(every(ran, made)),
    )  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--python", type=Path, required=True, help="interpreter with the peers")
    parser.add_argument("-o", "--out", type=Path)
    options = parser.parse_args()
    with as_file(files("isoflop.check.published").joinpath("measurements.csv")) as path:
        rows = [r for r in read_rows(path) if r.setting is not None and r.measured_seconds]
    text = page(rows, options.python)
    print(text) if options.out is None else options.out.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
