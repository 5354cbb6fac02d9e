"""The command line: `isoflop COMMAND`.

app.py is the table of commands and the exit codes; one file per group holds the handlers,
loaded when their command runs; options.py reads what people type; output.py prints.
"""


def main() -> None:
    """Entry point of the `isoflop` script."""
    try:
        from isoflop.cli.app import run

        run()
    except KeyboardInterrupt:  # while it was still being loaded
        raise SystemExit(130) from None
