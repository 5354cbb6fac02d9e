"""The table of commands, and what happens when one fails.

Exit codes: 0 done · 1 our fault · 2 bad input, one line per problem · 3 the plan is not
feasible, a stated limit is missed, or derived and built disagree.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

from cyclopts import App, CycloptsError

from isoflop import __version__
from isoflop.errors import InputError, IsoflopError

SUMMARY = "Write down a language model once: count it, plan it, build it, train it, check it."

#: command -> where its handler lives; a handler's module is imported when it runs.
COMMANDS = {
    "models": "isoflop.cli.models:models",
    "show": "isoflop.cli.models:show",
    "count": "isoflop.cli.count:count",
    "explain": "isoflop.cli.count:explain",
    "hardware": "isoflop.cli.hardware:hardware",
    "laws": "isoflop.cli.laws:laws",
    "fit": "isoflop.cli.laws:fit",
    "predict": "isoflop.cli.laws:predict",
    "calibrate": "isoflop.cli.check:calibrate",
    "check": "isoflop.cli.check:check",
    "train": "isoflop.cli.train:train",
    "demo": "isoflop.cli.demo:demo",
    "schema": "isoflop.cli.schema:schema",
}
PLANS = {
    "train": "isoflop.cli.plan:plan_train",
    "serve": "isoflop.cli.plan:plan_serve",
}


def build() -> App:
    """The whole command line, nothing heavy imported."""
    app = App(
        name="isoflop",
        help=SUMMARY,
        version=__version__,
        help_format="plaintext",
        exit_on_error=False,
        print_error=False,
    )
    plan = App(name="plan", help="What training or serving a model takes on given hardware.")
    for name, place in PLANS.items():
        plan.command(place, name=name)
    for name, place in COMMANDS.items():
        app.command(place, name=name)
    app.command(plan)
    return app


def run(arguments: Sequence[str] | None = None) -> None:
    """Run one command and exit with its code."""
    try:
        code = build()(arguments, result_action="return_value")
    except CycloptsError as error:
        _say_errors(_one_line(error))
        code = InputError.exit_code
    except IsoflopError as error:
        _say_errors(*str(error).splitlines())
        code = error.exit_code
    except BrokenPipeError:
        # The reader left (`isoflop models | head`): nothing is wrong, and nothing more to say.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 0
    except KeyboardInterrupt:
        _say_errors("stopped by the user")
        code = 130
    sys.exit(code if isinstance(code, int) else 0)


def _one_line(error: CycloptsError) -> str:
    return " ".join(str(error).split())


def _say_errors(*lines: str) -> None:
    for line in lines:
        print(f"error: {line}", file=sys.stderr)
