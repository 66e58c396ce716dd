"""Ranks that torchrun started, on one node or several: rank 0 finds them, the others serve it.

Rank 0 is the command itself. It listens on a port of its own and invites the others through the store that torchrun
keeps at MASTER_ADDR:MASTER_PORT; each then holds one TCP connection to rank 0, over which go the same messages as
through the pipes of ranks that wanrt starts itself: assignments and commands down; ready, loading, spans, log lines
and last words up. A connection that closes is the end, for both sides.
"""

from __future__ import annotations

import contextlib
import hmac
import json
import logging
import os
import secrets
import signal
import socket
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from multiprocessing.connection import Connection
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from wanrt.errors import RunError
from wanrt.parallel.launch import Launch
from wanrt.parallel.member import Failed, leave, logging_into, words_of
from wanrt.parallel.team import Left

if TYPE_CHECKING:
    from torch.distributed import Store, TCPStore

log = logging.getLogger("wanrt.parallel")

INVITATION, HEARD = "wanrt/invitation", "wanrt/heard"  # keys in the launch's store
PATIENCE_S = 300.0  # how long ranks may take to come: nodes start one after the other
FAREWELL_S = 20.0  # how long rank 0 stays for ranks that have not yet heard that nothing will come
STRANGER_S = 5.0  # how long who connects may take to say who it is
ORPHAN_S = 5.0  # how long a rank whose rank 0 is gone may take to notice by itself
PINGS = 9
# A node that vanishes without closing its connections is noticed after idle + count x interval seconds.
KEEPALIVE = {"TCP_KEEPIDLE": 4, "TCP_KEEPINTVL": 2, "TCP_KEEPCNT": 2}


@dataclass(frozen=True)
class Hello:
    """What a rank says first. `devices`: CUDA devices of its node; `boot`: which start of which machine it is on."""

    rank: int
    local_rank: int
    host: str
    devices: int
    boot: str


@dataclass(frozen=True)
class Ping:
    """Rank 0 asks what a rank's clock says."""


@dataclass(frozen=True)
class Dismissed:
    """The end: leave with this exit code."""

    code: int


@dataclass
class Recruit:
    """A rank that came. `offset_ns`: what to add to its clock to get rank 0's."""

    about: Hello
    connection: Connection
    offset_ns: int

    @property
    def lost(self) -> bool:
        """Whether its connection was given up."""
        return self.connection.closed


class Crew:
    """Rank 0's side. Nothing is listened for, and torch is not imported, before `meet` or `dismiss`."""

    def __init__(self, launch: Launch) -> None:
        self.launch = launch
        self._store: Store | None = None
        self._recruits: dict[int, Recruit] | None = None
        self._runs: list[TCPStore] = []

    @property
    def world(self) -> int:
        """Ranks that were started, this one included."""
        return self.launch.world

    def meet(self, check: Callable[[], None] = lambda: None) -> dict[int, Recruit]:
        """The other ranks by number, waited for the first time; `check` is called meanwhile and may raise.

        Raises `RunError` naming ranks that did not come, or are gone.
        """
        if self._recruits is None:
            self._recruits = self._invite(check)
        gone = [str(rank) for rank, recruit in self._recruits.items() if recruit.lost]
        if gone:
            raise RunError(f"rank {', '.join(gone)} of this launch is gone since an earlier run; start anew")
        return self._recruits

    def new_store(self) -> str:
        """Where the ranks of one run meet, as `tcp://HOST:PORT`: a store of its own, kept until `close_stores`."""
        from torch.distributed import TCPStore

        store = TCPStore(self.launch.master, 0, None, is_master=True, wait_for_workers=False)
        self._runs.append(store)
        return f"tcp://{self.launch.master}:{store.port}"

    def close_stores(self) -> None:
        """The run is over."""
        self._runs.clear()

    def dismiss(self, code: int, words: str = "") -> None:
        """Sends every rank home with an exit code; those that never met learn it from the store."""
        if self.world == 1:
            return
        if self._recruits is None:
            self._refuse(code, words)
            return
        for recruit in self._recruits.values():
            with contextlib.suppress(OSError):
                recruit.connection.send(Dismissed(code))
                recruit.connection.close()

    def _refuse(self, code: int, words: str) -> None:
        store = self._open_store()
        store.set(INVITATION, json.dumps({"exit": code, "words": words}))
        deadline = time.monotonic() + FAREWELL_S
        # the store may be this process's own: it must outlive the others' question
        while store.add(HEARD, 0) < self.world - 1 and time.monotonic() < deadline:
            time.sleep(0.05)

    def _open_store(self) -> Store:
        if self._store is None:
            self._store = open_store()
        return self._store

    def _invite(self, check: Callable[[], None]) -> dict[int, Recruit]:
        if self.world == 1:
            return {}
        token = secrets.token_hex(16)
        with _listen(self.launch.master) as listener:
            invitation = {"host": self.launch.master, "port": listener.getsockname()[1], "token": token}
            self._open_store().set(INVITATION, json.dumps(invitation))
            return self._gather(listener, token.encode(), check)

    def _gather(self, listener: socket.socket, token: bytes, check: Callable[[], None]) -> dict[int, Recruit]:
        found: dict[int, Recruit] = {}
        listener.settimeout(0.2)
        deadline = time.monotonic() + PATIENCE_S
        while len(found) < self.world - 1:
            check()
            if time.monotonic() > deadline:
                missing = sorted(set(range(1, self.world)) - found.keys())
                raise RunError(
                    f"ranks {missing} of {self.world} did not come within {PATIENCE_S:.0f} s; look at their logs"
                )
            with contextlib.suppress(TimeoutError):
                recruit = _welcome(listener.accept()[0], token)
                if recruit is not None:
                    found[recruit.about.rank] = recruit
                    log.info("rank %d came from %s", recruit.about.rank, recruit.about.host)
        return dict(sorted(found.items()))


def _listen(host: str) -> socket.socket:
    """A port of any number: of the loopback where all ranks are on this machine, else of every interface."""
    family, _, _, _, address = socket.getaddrinfo(host, 0, type=socket.SOCK_STREAM)[0]
    local = str(address[0]) in ("127.0.0.1", "::1")
    listener = socket.socket(family, socket.SOCK_STREAM)
    listener.bind((address[0] if local else "", 0))
    listener.listen(64)
    return listener


def _welcome(connected: socket.socket, token: bytes) -> Recruit | None:
    """Who connected, if it belongs to this launch: nothing is unpickled before it has shown the token."""
    connection = _connection(connected)
    try:
        if not connection.poll(STRANGER_S) or not hmac.compare_digest(connection.recv_bytes(64), token):
            raise EOFError
        about = connection.recv()
        offset = 0 if about.boot == boot() else _clock_offset(connection)
    except (EOFError, OSError):
        log.warning("somebody connected who is no rank of this launch")
        connection.close()
        return None
    return Recruit(about, connection, offset)


def _connection(connected: socket.socket) -> Connection:
    connected.setblocking(True)
    connected.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    connected.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in KEEPALIVE.items():
        if hasattr(socket, name):
            connected.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)
    return Connection(connected.detach())


def _clock_offset(connection: Connection) -> int:
    """Nanoseconds from a rank's clock to this one's, from the exchange that took least: off by half of that."""
    best, offset = 1 << 62, 0
    for _ in range(PINGS):
        sent = time.perf_counter_ns()
        connection.send(Ping())
        there = connection.recv()
        took = time.perf_counter_ns() - sent
        if took < best:
            best, offset = took, sent + took // 2 - there
    return offset


def boot() -> str:
    """Which start of which machine this is: processes with the same answer share their monotonic clock."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
    except OSError:
        return f"{socket.gethostname()} {os.getpid()}"


def open_store() -> Store:
    """The launch's own store: of torchrun's agent, or, where another launcher is used, of rank 0."""
    from torch.distributed import rendezvous

    store, _, _ = next(iter(rendezvous("env://", timeout=timedelta(seconds=PATIENCE_S))))
    return store


def follow(launch: Launch, entry: Callable[[Connection, Any], None]) -> NoReturn:
    """The life of a rank besides rank 0: one `entry(connection, assignment)` after the other until it is dismissed.

    Ends the process with the exit code of rank 0, or 1 when it fails or rank 0 is gone.
    """
    leave(_follow(launch, entry))


def _follow(launch: Launch, entry: Callable[[Connection, Any], None]) -> int:
    store = open_store()
    invitation = json.loads(store.get(INVITATION))
    # torchrun passes signals on to every rank; rank 0 decides what they mean, and its end is noticed
    for signum in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(signum, signal.SIG_IGN)
    store.add(HEARD, 1)
    if "exit" in invitation:
        log.info("rank %d: %s", launch.rank, invitation["words"])
        return int(invitation["exit"])
    connection = _come(launch, invitation)
    threading.Thread(target=_end_with, args=(connection.fileno(),), daemon=True).start()
    with logging_into(connection):
        try:
            return _obey(connection, entry)
        except (EOFError, BrokenPipeError, ConnectionResetError):  # rank 0 is gone
            return 1
        except BaseException as error:
            with contextlib.suppress(OSError):
                connection.send(Failed(words_of(error)))
            return 1


def _come(launch: Launch, invitation: dict[str, Any]) -> Connection:
    import torch

    connection = _connection(socket.create_connection((invitation["host"], invitation["port"]), PATIENCE_S))
    connection.send_bytes(invitation["token"].encode())
    devices = torch.cuda.device_count() if torch.cuda.is_available() else 0
    connection.send(Hello(launch.rank, launch.local_rank, socket.gethostname(), devices, boot()))
    return connection


def _obey(connection: Connection, entry: Callable[[Connection, Any], None]) -> int:
    while not isinstance(command := connection.recv(), Dismissed):
        if isinstance(command, Ping):
            connection.send(time.perf_counter_ns())
        elif command is not None:  # None: the end of a run that this rank had left already
            entry(connection, command)
            connection.send(Left())
    return command.code


def _end_with(descriptor: int) -> None:
    """Ends this process some seconds after its connection, which it may not notice inside an exchange."""
    import select

    poll = select.poll()
    poll.register(descriptor, select.POLLRDHUP)
    poll.poll()
    time.sleep(ORPHAN_S)
    leave(1)
