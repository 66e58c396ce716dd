"""The `wanrt` command: finds commands lazily and turns errors into one-line messages and exit codes."""

from __future__ import annotations

import contextlib
import importlib
import logging
import os
import pkgutil
import sys
from collections.abc import Iterator, MutableMapping, Sequence
from typing import Annotated, Any, NoReturn

import typer
import typer.main

import wanrt.cli
from wanrt.errors import WanrtError

# Typer brings its own copy of Click since 0.2x and used the click package before: both define this base.
ClickException: Any = next(c for c in typer.BadParameter.__mro__ if c.__name__ == "ClickException")

OK, FAILED, WRONG_USE, HUNG_UP, INTERRUPTED, TERMINATED = 0, 1, 2, 129, 130, 143

log = logging.getLogger("wanrt")


class Commands(MutableMapping[str, Any]):
    """The commands by name, each imported when it is asked for."""

    def __init__(self) -> None:
        self._loaded: dict[str, Any] = {}
        self._modules = {
            entry.name.replace("_", "-"): f"{wanrt.cli.__name__}.{entry.name}"
            for entry in pkgutil.iter_modules(wanrt.cli.__path__)
            if entry.name != "app" and not entry.name.startswith("_")
        }

    def __getitem__(self, name: str) -> Any:
        if name not in self._loaded:
            self._loaded[name] = _load(name, self._modules[name])
        return self._loaded[name]

    def __setitem__(self, name: str, command: Any) -> None:
        self._loaded[name] = command

    def __delitem__(self, name: str) -> None:
        del self._modules[name]

    def __iter__(self) -> Iterator[str]:
        return iter(sorted(self._modules))

    def __len__(self) -> int:
        return len(self._modules)


def _load(name: str, module: str) -> Any:
    """The command that `module` defines, ready to run under `name`."""
    loaded = importlib.import_module(module)
    defined = loaded.command
    if not isinstance(defined, typer.Typer):
        single = _typer()
        parser = getattr(loaded, "Parser", None)
        single.command(name, cls=parser, no_args_is_help=_needs_arguments(defined))(defined)
        defined = single
    built = typer.main.get_command(defined)
    built.name = name
    for leaf in (built, *getattr(built, "commands", {}).values()):
        leaf.rich_markup_mode = None
        leaf.params.append(_debug_option())
    return built


def _needs_arguments(function: Any) -> bool:
    """Whether a command cannot run without arguments, so that `wanrt NAME` alone shows its help."""
    required = function.__code__.co_argcount - len(function.__defaults__ or ())
    return required > 0


def _typer(**settings: Any) -> typer.Typer:
    return typer.Typer(
        add_completion=False,
        rich_markup_mode=None,
        pretty_exceptions_enable=False,
        context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
        **settings,
    )


def _debug_option() -> Any:
    """--debug, which every command takes too, because people add it to the line that failed."""
    holder = _typer()

    @holder.command()
    def borrowed(
        debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks.", callback=_debug)] = False,
    ) -> None: ...

    option = next(p for p in typer.main.get_command(holder).params if p.name == "debug")
    option.expose_value = False
    return option


def _debug(value: bool) -> None:
    if value:
        log.setLevel(logging.DEBUG)


def _verbose(value: bool) -> None:
    if value:
        log.setLevel(logging.INFO)


def _version(value: bool) -> None:
    if value:
        from wanrt import __version__

        print(f"wanrt {__version__}")
        raise typer.Exit


def _root(
    version: Annotated[
        bool, typer.Option("--version", is_eager=True, callback=_version, help="Print the version and exit.")
    ] = False,
    verbose: Annotated[
        bool, typer.Option("--verbose", "-v", callback=_verbose, help="Say which paths are taken, and why.")
    ] = False,
    debug: Annotated[
        bool, typer.Option("--debug", callback=_debug, help="Log everything; show tracebacks.")
    ] = False,
) -> None:
    """Live video from prompts with causal Wan2.1 models.

    wanrt render prompt.toml -o out.mp4 makes a video; wanrt COMMAND --help and man wanrt-COMMAND say more.
    """


def build() -> Any:
    """The whole command, none of its subcommands imported yet."""
    app = _typer(no_args_is_help=True)
    app.callback()(_root)
    app._add_completion = True
    group = typer.main.get_command(app)
    group.commands = Commands()  # type: ignore[attr-defined]
    return group


def run(arguments: Sequence[str] | None = None, started_ns: int | None = None) -> NoReturn:
    """Run `wanrt` with `arguments` (default: the process's own) and exit.

    `started_ns` (`time.perf_counter_ns`), when the process began, reaches commands as their context's `obj`.
    """
    _open_closed_streams()
    logging.basicConfig(format="wanrt: %(message)s", level=logging.WARNING)
    log.setLevel(logging.WARNING)
    sys.exit(_run(arguments, started_ns))


def _open_closed_streams() -> None:
    """Gives a process that was started without stdin, stdout or stderr (`>&-`) the null device in their place.

    Python has None for them then; and the next file opened, a video perhaps, would get their number and what
    libraries print.
    """
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, mode))  # noqa: PTH123, SIM115 (open to the end of the process)


def _run(arguments: Sequence[str] | None, started_ns: int | None) -> int:
    """The exit code."""
    try:
        done = build().main(arguments, prog_name="wanrt", standalone_mode=False, obj=started_ns)
        sys.stdout.flush()
        if done == INTERRUPTED:  # Typer turns Ctrl-C into this
            _complain("interrupted")
        return done if isinstance(done, int) else OK
    except ClickException as bad:
        return _wrong_use(bad)
    except WanrtError as bad:
        _traceback()
        _complain(str(bad))
        return bad.exit_code
    except (KeyboardInterrupt, typer.Abort):
        _complain("interrupted")
        return INTERRUPTED
    except BrokenPipeError:  # `wanrt presets | head`
        sys.stdout = None  # type: ignore[assignment]
        return OK
    except Exception as bad:
        _traceback()
        _complain(
            f"internal error: {type(bad).__name__}: {' '.join(str(bad).split())[:300]} (--debug shows where)"
        )
        return FAILED


def _traceback() -> None:
    if log.level <= logging.DEBUG:
        import traceback

        traceback.print_exc()


def _complain(text: str) -> None:
    from wanrt.parallel.launch import speaks

    if not speaks(os.environ):  # rank 0 says the same
        return
    with contextlib.suppress(OSError):  # stderr is a terminal that was closed, or a pipe that nobody reads
        for line in text.splitlines():
            print(f"wanrt: {line}", file=sys.stderr)


def _wrong_use(bad: Any) -> int:
    """Report a wrong option or argument in one line; plain help when nothing was asked for."""
    if type(bad).__name__ == "NoArgsIsHelpError":
        print(bad.ctx.get_help(), file=sys.stderr)
        return WRONG_USE
    from wanrt.output.address import hide_keys

    message = hide_keys(bad.format_message()).rstrip(".")
    if "extra argument" in message:
        message += "; a prompt of several words goes in quotes"
    command = bad.ctx.command_path if getattr(bad, "ctx", None) else "wanrt"
    _complain(f"{message} (see {command} --help)")
    return WRONG_USE
