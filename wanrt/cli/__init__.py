"""The command line: one thin file per command, no logic.

A command is a file `wanrt/cli/NAME.py` (probe_vae.py is `wanrt probe-vae`) that defines `command`: a function
with Typer's annotations and a docstring, or a `typer.Typer` with subcommands. Nothing is registered anywhere;
`app.py` finds the file when its command is called. The module may import typer, nothing heavy: torch, av, rich
and the rooms that need them are imported inside the function.
"""


def main() -> None:
    """Run the `wanrt` command."""
    import sys
    import time

    started = time.perf_counter_ns()
    try:
        from wanrt.cli.app import run
    except KeyboardInterrupt:
        print("wanrt: interrupted", file=sys.stderr)
        sys.exit(130)
    run(started_ns=started)
