"""The table of commands, and what happens when one fails.

Exit codes: 0 done · 1 our fault · 2 bad input, one line per problem · 3 the plan is not
feasible, a stated limit is missed, or derived and built disagree.
"""

from __future__ import annotations

import errno
import io
import os
import sys
from collections.abc import Sequence

from cyclopts import App, CycloptsError, Parameter

from isoflop import __version__
from isoflop.errors import Infeasible, InputError, IsoflopError

SUMMARY = "Write down a language model once: count it, plan it, build it, train it, check it."

#: command -> where its handler lives, and its line of help. A handler's module is imported
#: when it runs, so its first docstring line stands here again (a test keeps them equal).
COMMANDS = {
    "models": ("models:models", "List the named models: our count beside the published one."),
    "show": ("models:show", "Show a model's spec."),
    "count": ("count:count", "Count a model's parameters, FLOPs and memory, as trees."),
    "explain": ("count:explain", "Explain one number: formula, numbers, result, share, source."),
    "compare": ("compare:compare", "Hold models side by side: parameters, FLOPs per token, bytes."),
    "hardware": (
        "hardware:hardware",
        "List the accelerators and the nodes, or show one with its sources.",
    ),
    "laws": ("laws:laws", "List the published laws and the optimum each gives."),
    "fit": ("laws:fit", "Fit loss = E + A / params^alpha + B / tokens^beta to measured runs."),
    "predict": ("laws:predict", "Predict a loss, or the compute-optimal model for a budget."),
    "calibrate": (
        "check:calibrate_command",
        "Measure this machine, or learn a trainer's software from a few steps of your own.",
    ),
    "validate": (
        "validate:validate",
        "Hold predictions against published measurements: error, range, source by source.",
    ),
    "check": ("check:check", "Hold derived numbers against the built module, and a real run."),
    "train": ("train:train", "Train the model of a recipe, or go on where it stopped."),
    "export": (
        "export:export",
        "Write a run's newest checkpoint as a folder that other software reads.",
    ),
    "generate": (
        "generate:generate",
        "Write what a model says after a prompt, or after each of several.",
    ),
    "demo": ("demo:demo", "The whole loop on this machine, in minutes."),
    "schema": ("schema:schema", "Print the JSON Schema of what --json prints."),
}
PLANS = {
    "train": (
        "plan_train:plan_train_command",
        "Plan a training run: time, energy, money, memory, layout.",
    ),
    "serve": (
        "plan_serve:plan_serve_command",
        "Plan a server: memory, accelerators, times, money.",
    ),
    "budget": (
        "plan_budget:plan_budget_command",
        "Find the best model that a budget trains, and plan its run.",
    ),
    "diff": ("plan_diff:plan_diff", "Show what changed between two plans, and why."),
}

#: optional packages, and the extra that installs each
EXTRAS = {"torch": "train", "safetensors": "train", "tokenizers": "train"}

#: What a full disk behind `isoflop count MODEL > FILE` says.
FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


def _default(value: object) -> str | None:
    """A default as help shows it: a flag that is off, or an empty list, needs no word."""
    return None if value in (None, False, ()) else str(value)


def build() -> App:
    """The whole command line, nothing heavy imported."""
    app = App(
        name="isoflop",
        help=SUMMARY,
        version=__version__,
        help_format="markdown",  # lines of a docstring run on
        default_parameter=Parameter(show_default=_default),
        exit_on_error=False,
        print_error=False,
    )
    plan = App(
        name="plan", help="What training or serving a model takes on given hardware.", sort_key=4.5
    )
    for order, (name, (place, line)) in enumerate(PLANS.items()):
        plan.command(f"isoflop.cli.{place}", name=name, help=line, sort_key=order)
    for order, (name, (place, line)) in enumerate(COMMANDS.items()):
        app.command(f"isoflop.cli.{place}", name=name, help=line, sort_key=order)
    app.command(plan)
    return app


def run(arguments: Sequence[str] | None = None) -> None:
    """Run one command and exit with its code."""
    _suit_terminal()
    try:
        code = build()(arguments, result_action="return_value")
        if sys.stdout is not None:  # closed by the shell: >&-
            sys.stdout.flush()
    except CycloptsError as error:
        _say_errors(_one_line(error))
        code = InputError.exit_code
    except IsoflopError as error:
        _say_errors(*str(error).splitlines())
        code = error.exit_code
    except ModuleNotFoundError as error:
        if error.name not in EXTRAS:
            raise
        _say_errors(f"{error.name} is not installed: pip install 'isoflop[{EXTRAS[error.name]}]'")
        code = InputError.exit_code
    except BrokenPipeError:
        # The reader left (`isoflop models | head`): nothing is wrong, and nothing more to say.
        _drop_output()
        code = 0
    except OSError as error:
        if error.errno not in FULL:
            raise
        _drop_output()
        _say_errors(f"the output could not be written: {error.strerror}")
        code = Infeasible.exit_code
    except KeyboardInterrupt:
        _say_errors("stopped by the user")
        code = 130
    sys.exit(code if isinstance(code, int) else 0)


def _drop_output() -> None:
    """Nothing more reaches stdout, so that Python's own last flush cannot fail."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _suit_terminal() -> None:
    """Print what a narrow code page lacks as an escape, and help in no less than 20 columns."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")
    if os.environ.get("COLUMNS", "20") in map(str, range(20)):
        os.environ["COLUMNS"] = "20"


def _one_line(error: CycloptsError) -> str:
    return " ".join(str(error).split())


def _say_errors(*lines: str) -> None:
    for line in lines:
        print(f"error: {line}", file=sys.stderr)
