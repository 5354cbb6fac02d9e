"""isoflop laws · isoflop fit · isoflop predict"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from cyclopts import Parameter

from isoflop.cli.options import Json, Real, Whole
from isoflop.cli.output import SCHEMA, check_output, emit, note, say
from isoflop.errors import MISSING, InputError, Problem
from isoflop.laws import Law, find_law, published_laws, read_runs
from isoflop.laws.form import PARAMETERS
from isoflop.quantity.units import format_count, format_si, parse_real
from isoflop.report.text import table
from isoflop.runs import write_whole

if TYPE_CHECKING:
    from isoflop.laws.fit import FitResult, Prediction

#: Budgets that `isoflop laws` shows optima for: from a desktop's week to the largest runs.
BUDGETS = (1e18, 1e20, 1e22, 5.76e23, 1e25)


def laws(*, as_json: Json = False) -> None:
    """List the published laws and the optimum each gives."""
    known = published_laws()
    data = [
        {
            "name": name,
            **law.to_json(),
            "optima": [{"flops": c, **law.optimum(c).to_json()} for c in BUDGETS],
        }
        for name, law in known.items()
    ]
    if as_json:
        return emit("laws", {"laws": data})
    rows = [
        [
            name,
            f"{law.E:.4g}",
            f"{law.A:.4g}",
            f"{law.B:.4g}",
            f"{law.alpha:.4g}",
            f"{law.beta:.4g}",
            law.source,
        ]
        for name, law in known.items()
    ]
    say("loss = E + A / params^alpha + B / tokens^beta, nats per token\n")
    say(table(rows, ["law", "E", "A", "B", "alpha", "beta", "source"], "lrrrrrl"))
    say("\ncompute-optimal tokens per parameter (C = 6 N D)\n")
    ratios = [
        [name, *(f"{law.optimum(c).tokens_per_param:.3g}" for c in BUDGETS)]
        for name, law in known.items()
    ]
    return say(table(ratios, ["law", *(format_si(c, "FLOP") for c in BUDGETS)], "lrrrrr"))


def fit(
    file: Path,
    /,
    *,
    params: str = "params",
    tokens: str = "tokens",
    flops: str = "flops",
    loss: str = "loss",
    drop_worst: Whole = 0,
    bootstrap: Whole = 200,
    seed: Whole = 0,
    at: Annotated[tuple[str, ...], Parameter(negative="")] = (),
    output: Annotated[Path | None, Parameter(name=["--output", "-o"])] = None,
    as_json: Json = False,
) -> None:
    """Fit loss = E + A / params^alpha + B / tokens^beta to measured runs.

    Parameters
    ----------
    file
        A CSV file with a header and one row per run.
    params
        Column of parameter counts.
    tokens
        Column of training tokens.
    flops
        Column of training FLOPs, used where there is no column of tokens: D = C / (6 N).
    loss
        Column of final losses, in nats per token.
    drop_worst
        Leave out that many of the highest losses.
    bootstrap
        Resamples behind the intervals; 0 for none.
    seed
        Seed of the resampling.
    at
        Predict the loss at PARAMS:TOKENS, for example 70B:1.4T; may be given again.
    output
        Write the fitted law as JSON, to be read by `isoflop predict`.
    """
    from isoflop.laws.fit import fit as fit_law

    if output is not None:
        check_output(output, "law")
    wanted = [_read_point(text) for text in at]
    check_size([n for n, _ in wanted], [d for _, d in wanted])
    runs = read_runs(file, params=params, tokens=tokens, flops=flops, loss=loss)
    result = fit_law(
        runs.params, runs.tokens, runs.loss, bootstrap=bootstrap, seed=seed, drop_worst=drop_worst
    )
    predictions = [result.predict(n, d) for n, d in wanted]
    data = {
        **result.to_json(),
        "tokens_source": runs.tokens_source,
        "predictions": [p.to_json() for p in predictions],
    }
    if output is not None:
        write_whole(output, (json.dumps({"schema": SCHEMA, **data}, indent=2) + "\n").encode())
        note(f"law written to {output}")
    if as_json:
        return emit("fit", data)
    return say(render_fit(result, predictions))


def render_fit(result: FitResult, predictions: list[Prediction]) -> str:
    """A fit as text: the law, its intervals, and what it confesses."""
    law = result.law
    rows = []
    for name in ("E", "A", "B", "alpha", "beta"):
        interval = result.intervals[name]
        span = f"{interval.low:.5g} to {interval.high:.5g}" if interval else "no interval"
        rows.append([f"  {name}", f"{getattr(law, name):.6g}", span])
    lines = [
        f"loss = E + A / params^alpha + B / tokens^beta, {result.n_points} runs",
        table(rows, ["  parameter", "value", "90 % interval"], "lrl"),
        f"  objective {result.objective:.10g} (sum of Huber losses, delta {result.delta:g})",
        f"  {result.starts_agreeing} of {result.starts_tried} starts agree; "
        f"rms error {100 * result.rms_log_residual:.2g} %, left out {100 * result.rms_left_out:.2g} %",
        f"  identified: {result.identifiable}",
    ]
    if result.tied != "none":
        lines.append(f"  given, not fitted: {result.tied}: {result.tied_reason}")
    if result.dropped:
        lines.append(f"  left out: {len(result.dropped)} runs ({result.dropped[0].reason})")
    return "\n".join([*lines, *map(_tell_prediction, predictions)])


def _tell_prediction(p: Prediction) -> str:
    reach = format_count(float(f"{p.extrapolation_flops:.3g}"))
    span = f"{p.interval.low:.4f} to {p.interval.high:.4f}" if p.interval else p.interval_reason
    return (
        f"  predicted at {format_count(p.params)} params, {format_count(p.tokens)} tokens: "
        f"{p.loss:.4f} ({span}); {reach}x the compute of the largest run"
    )


def _read_point(text: str) -> tuple[float, float]:
    params, colon, tokens = text.partition(":")
    if not colon:
        rule = "is PARAMS:TOKENS"
        raise InputError("command line", [Problem("--at", text, rule, "for example 70B:1.4T")])
    return parse_real(params, "--at"), parse_real(tokens, "--at")


def predict(
    law: str,
    /,
    *,
    params: Real | None = None,
    tokens: Real | None = None,
    flops: Real | None = None,
    as_json: Json = False,
) -> None:
    """Predict a loss, or the compute-optimal model for a budget.

    Parameters
    ----------
    law
        A published law's name (`isoflop laws`), or a JSON file that `isoflop fit -o` wrote.
    params
        Parameters, with --tokens.
    tokens
        Training tokens, with --params.
    flops
        A budget: gives the optimal parameters and tokens instead.
    """
    form = read_law(law)
    match (params, tokens, flops):
        case (float(), float(), None):
            data: dict[str, Any] = {
                "params": params,
                "tokens": tokens,
                "loss": form.loss(params, tokens),
            }
        case (None, None, float()):
            data = {"flops": flops, **form.optimum(flops).to_json()}
        case _:
            rule = "is given as --params with --tokens, or as --flops alone"
            said = {"--params": params, "--tokens": tokens, "--flops": flops}
            given = ", ".join(name for name, value in said.items() if value is not None)
            raise InputError("predict", [Problem("size", given or MISSING, rule)])
    check_size([data["params"]], [data["tokens"]])
    if as_json:
        return emit("predict", {"law": form.to_json(), **data})
    shown = [
        [f"  {CALLED.get(name, name)}", _in_words(name, value)] for name, value in data.items()
    ]
    return say(f"{form.name} ({form.source})\n{table(shown, align='lr')}")


#: How the numbers of a prediction are called in text, where their names do not say it.
CALLED = {"loss": "loss, nats per token", "tokens_per_param": "tokens per parameter"}


def _in_words(name: str, value: float) -> str:
    """A number of a prediction: a budget with its unit, sizes as counts, the rest in digits."""
    match name:
        case "flops":
            return format_si(value, "FLOP")
        case "params" | "tokens":
            return format_count(value)
        case _:
            return f"{value:.4g}"


def check_size(params: Sequence[float], tokens: Sequence[float]) -> None:
    """Refuse sizes that are none: a law would give even them a loss.

    Raises:
        InputError: less than one parameter or token.
    """
    bad = [Problem("params", n, "is at least 1") for n in params if n < 1]
    bad += [Problem("tokens", d, "is at least 1") for d in tokens if d < 1]
    if bad:
        raise InputError("predict", bad)


def read_law(text: str) -> Law:
    """A law by published name, or from a file that `isoflop fit -o` wrote."""
    from isoflop.arch.foreign import parse_json, read_file

    path = Path(text)
    if not text.endswith(".json"):
        return find_law(text)
    data = parse_json(read_file(path), text).get("law")
    if not isinstance(data, dict) or not {*PARAMETERS, "params_convention"} <= data.keys():
        rule = f"holds {', '.join(PARAMETERS)} and params_convention, as `isoflop fit -o` writes"
        raise InputError(text, [Problem("law", MISSING if data is None else data, rule)])
    numbers = {name: data[name] for name in PARAMETERS}
    return Law(
        **numbers,
        name=path.stem,
        source=f"fitted, {path}",
        params_convention=data["params_convention"],
    )
