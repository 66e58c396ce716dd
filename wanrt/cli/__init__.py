"""The command line: one thin file per command, no logic."""


def main() -> None:
    """Run the `wanrt` command."""
    from wanrt.cli.app import run

    run()
