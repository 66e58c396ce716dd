"""The control socket of a run: how another terminal steers it. Server and client, and the protocol between them.

A run called NAME listens at `NAME.sock` in the user's runtime directory (mode 0600, its directory 0700) and answers
nobody but its own user. One JSON object a line each way, UTF-8, in the order of the requests:

    {"id": 1, "command": "say", "prompt": "a green star", "blend": "2s"}
    {"id": 1, "ok": true, "chunk": 42}
    {"id": 2, "command": "set", "bias": 7}
    {"id": 2, "ok": false, "error": "bias: got 7; expected ..."}

`id` is any JSON value and comes back; without one it is null. Commands are documented in man/wanrt-stream.1.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import logging
import os
import re
import socket
import stat
import struct
import tempfile
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from wanrt.errors import RunError, UsageError, WanrtError

log = logging.getLogger("wanrt.control")

ENDING = ".sock"
LONGEST_LINE = 262_144  # bytes; the longest prompt that files may hold, in any alphabet, escaped once
CONNECTIONS = 16  # at once; a person has a few terminals
LONGEST_PATH = 107  # bytes of a Unix socket's path on Linux, unix(7)
ANSWER_S = 30.0  # that a client waits: a run that loads answers between two files
NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,63}")

Answer = Mapping[str, object]
Handler = Callable[[str, Mapping[str, Any]], Answer]


def runtime_directory() -> Path:
    """Where the sockets of this user's runs are: below XDG_RUNTIME_DIR, else a temporary one. May not exist."""
    if "XDG_RUNTIME_DIR" in os.environ:
        from platformdirs import user_runtime_dir

        return Path(user_runtime_dir("wanrt", appauthor=False))
    return Path(tempfile.gettempdir()) / f"wanrt-{os.getuid()}"


def check_name(name: str) -> str:
    """A run's name as it is. Raises `UsageError` for one that could be more than a file name."""
    if not NAME.fullmatch(name):
        raise UsageError(
            f"run name {name[:80]!r}: expected up to 64 letters, digits, dots, hyphens, underscores"
        )
    return name


def name_for(stem: str) -> str:
    """A run's name made from a file's: what cannot be in one becomes a hyphen."""
    return re.sub(r"[^A-Za-z0-9_]+", "-", stem).strip("-")[:60] or "stream"


def runs(directory: Path | None = None) -> list[str]:
    """Names of the runs that answer, sorted."""
    place = runtime_directory() if directory is None else directory
    found = place.glob(f"*{ENDING}") if place.is_dir() and place.stat().st_uid == os.getuid() else ()
    return sorted(path.name.removesuffix(ENDING) for path in found if _alive(path))


def find_run(name: str | None, directory: Path | None = None) -> Path:
    """The socket of the run called `name`, or of the only one.

    Raises `UsageError` when there is none, or no name was given and there are several.
    """
    place = runtime_directory() if directory is None else directory
    names = runs(place)
    known = f"running: {', '.join(names)}" if names else "nothing is running; wanrt stream starts a run"
    if name is None and len(names) != 1:
        raise UsageError(f"which run? give one with --run NAME; {known}" if names else f"no run: {known}")
    if name is not None and name not in names:
        raise UsageError(f"no run is called {name[:80]!r}; {known}")
    return place / f"{name or names[0]}{ENDING}"


def read_settings(words: Iterable[str]) -> dict[str, str]:
    """The fields of `set` from words such as `bias=0.3`. Raises `UsageError` for others."""
    given = dict(word.partition("=")[::2] for word in words)
    if unknown := set(given) - {"bias", "steps"}:
        raise UsageError(f"set: got {', '.join(sorted(unknown))}; expected bias=NUMBER or steps=LIST")
    return given


def ask(path: Path, command: str, **fields: object) -> dict[str, Any]:
    """Sends one command to the run at `path`; its answer without `id` and `ok`.

    Raises `UsageError` with the run's words when it refuses, `RunError` when it does not answer.
    """
    request = json.dumps({"id": 1, "command": command, **fields}).encode() + b"\n"
    try:
        with _connect(path, ANSWER_S) as line:
            line.sendall(request)
            answer = json.loads(next(_lines(line), b""))
    except (OSError, ValueError) as error:
        words = getattr(error, "strerror", None) or "it ended, or speaks another protocol"
        raise RunError(
            f"run {path.name.removesuffix(ENDING)} does not answer ({words}); is it busy?"
        ) from error
    if not answer.get("ok"):
        raise UsageError(str(answer.get("error", "refused without a word")))
    return {key: value for key, value in answer.items() if key not in ("id", "ok")}


def _connect(path: Path, seconds: float) -> socket.socket:
    line = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        line.settimeout(seconds)
        line.connect(str(path))
    except BaseException:
        line.close()
        raise
    return line


def _alive(path: Path) -> bool:
    try:
        _connect(path, 1.0).close()
    except OSError:
        return False
    return True


def _lines(line: socket.socket) -> Iterator[bytes]:
    """Whole lines as they come, until the other side ends. Raises ValueError for one that is too long."""
    rest = b""
    while data := line.recv(65_536):
        *whole, rest = (rest + data).split(b"\n")
        yield from whole
        if len(rest) > LONGEST_LINE:
            raise ValueError("line too long")


def open_directory(path: Path) -> Path:
    """The directory for sockets, made if it is missing, this user's alone.

    Raises `RunError` when it is somebody else's, or others may write there.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.mkdir(mode=0o700, exist_ok=True)
        found = path.lstat()
    except OSError as error:
        raise RunError(
            f"{path}: cannot be made ({error.strerror}); set XDG_RUNTIME_DIR to a directory"
        ) from error
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid():
        raise RunError(f"{path}: is not a directory of this user; remove it, or set XDG_RUNTIME_DIR")
    if stat.S_IMODE(found.st_mode) & 0o077:
        path.chmod(0o700)
    return path


@contextlib.contextmanager
def _locked(directory: Path) -> Iterator[None]:
    """One process at a time looks for a free name and takes it."""
    handle = os.open(directory, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


def peer_uid(line: socket.socket) -> int | None:
    """The user on the other side; None where the system does not tell (then the file's mode has to do)."""
    option = getattr(socket, "SO_PEERCRED", None)  # Linux: pid, uid, gid; unix(7)
    if option is None:
        return None
    return int(struct.unpack("3i", line.getsockopt(socket.SOL_SOCKET, option, struct.calcsize("3i")))[1])


class ControlServer:
    """Answers commands for one run, on threads of its own, until `close`.

    Args:
        name: of the run. `exact`: refuse when a run of that name is alive; otherwise NAME-2 and so on is taken.
        handle: takes a command and its fields, returns the answer's; raises WanrtError to refuse. Called by one
            thread at a time.
        directory: for the socket; default `runtime_directory`.
        user: who may ask; default this process's.

    Raises:
        UsageError: the name is taken or too long. RunError: the directory cannot be used.
    """

    def __init__(
        self,
        name: str,
        handle: Handler,
        *,
        exact: bool = False,
        directory: Path | None = None,
        user: int | None = None,
    ) -> None:
        self._handle, self._user = handle, os.getuid() if user is None else user
        self._busy = threading.Lock()
        self._slots = threading.BoundedSemaphore(CONNECTIONS)
        place = open_directory(runtime_directory() if directory is None else directory)
        with _locked(place):
            self.path = _free_path(place, check_name(name), exact)
            self._socket = _listen(self.path)
        self.name = self.path.name.removesuffix(ENDING)
        self._thread = threading.Thread(target=self._accept, name="wanrt-control", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Stop listening and remove the socket; safe to call twice."""
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)  # wakes accept
        self._socket.close()
        self._thread.join(5)
        self.path.unlink(missing_ok=True)

    def _accept(self) -> None:
        while True:
            try:
                line, _ = self._socket.accept()
            except OSError:
                return
            if self._slots.acquire(blocking=False):
                threading.Thread(
                    target=self._serve, args=(line,), name="wanrt-control-line", daemon=True
                ).start()
            else:
                line.close()

    def _serve(self, line: socket.socket) -> None:
        try:
            with line:
                if (user := peer_uid(line)) not in (None, self._user):
                    line.sendall(_encode({"id": None, "ok": False, "error": "another user's run"}))
                    log.warning("control: user %s was refused", user)
                    return
                for request in _lines(line):
                    line.sendall(_encode(self._answer(request)))
        except (OSError, ValueError) as error:
            log.debug("control: a line broke: %s", error)
        finally:
            self._slots.release()

    def _answer(self, request: bytes) -> Answer:
        try:
            fields = json.loads(request)
        except (ValueError, RecursionError):
            fields = None
        if not isinstance(fields, dict) or not isinstance(fields.get("command"), str):
            return {
                "id": None,
                "ok": False,
                "error": 'expected {"id": ..., "command": "...", ...} on one line',
            }
        number, command = fields.pop("id", None), fields.pop("command")
        try:
            with self._busy:
                return {"id": number, "ok": True, **self._handle(command, fields)}
        except WanrtError as refused:
            return {"id": number, "ok": False, "error": str(refused)}
        except Exception as error:  # a defect here must not end the stream
            log.debug("control: %s failed", command, exc_info=error)
            return {"id": number, "ok": False, "error": f"internal error: {type(error).__name__}"}


def _encode(answer: Answer) -> bytes:
    return json.dumps(answer, default=str).encode() + b"\n"


def _free_path(directory: Path, name: str, exact: bool) -> Path:
    """The first name that no living run has; a dead one's socket is removed."""
    for number in range(1, 1000):
        path = directory / f"{name}{'' if number == 1 else f'-{number}'}{ENDING}"
        if len(os.fsencode(path)) > LONGEST_PATH:
            raise UsageError(
                f"{path}: longer than the {LONGEST_PATH} bytes of a socket's path; use a shorter --name"
            )
        if not _alive(path):
            path.unlink(missing_ok=True)
            return path
        if exact:
            raise UsageError(
                f"a run called {name} is alive; choose another --name, or end it: wanrt stop --run {name}"
            )
    raise UsageError(f"1000 runs are called {name}; choose another --name")


def _listen(path: Path) -> socket.socket:
    """A socket at `path` that its user alone may open: until `listen`, nobody can connect."""
    server = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        server.bind(str(path))
        path.chmod(0o600)
        server.listen(CONNECTIONS)
    except OSError as error:
        server.close()
        raise RunError(f"{path}: cannot listen there ({error.strerror})") from error
    return server
