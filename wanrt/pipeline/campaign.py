"""A long matrix in bounded time: each topology in a process of its own, results kept as they come, resumable.

A process of its own reads NCCL's environment afresh, gives all memory back, and takes nothing with it when it fails.
"""

from __future__ import annotations

import json
import logging
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from pathlib import Path
from typing import IO, Any

from wanrt.errors import OutputError, UsageError, WanrtError
from wanrt.pipeline.bench import job_of
from wanrt.pipeline.bench_report import BenchReport, Unmeasured, table
from wanrt.pipeline.build import Tuning
from wanrt.pipeline.matrix import P2P_SWITCH, Entry
from wanrt.pipeline.overheard import Overheard
from wanrt.pipeline.startup import Say, silent
from wanrt.telemetry.simulator import Prediction, StageCosts

log = logging.getLogger("wanrt.pipeline")

LOOK_S = 0.2  # how often a process's results are looked at
GRACE_S = 5.0  # how long a process may take to end when time is up


@dataclass(frozen=True)
class Campaign:
    """How a matrix is run.

    flags: options of the job. budget_s: of the whole, None for as long as it takes. json: where the results go, and
    with `resume` where those of an earlier call are; beside it, with `.log` at its end, is what the processes said.
    say: takes their lines of progress.
    """

    flags: Mapping[str, object]
    chunks: int
    warm_up: int
    tuning: Tuning
    json: str | None
    budget_s: float | None = None
    resume: bool = False
    say: Say = silent


def run_campaign(campaign: Campaign, entries: Iterable[Entry]) -> str:
    """Runs the entries in their order and returns the table; what was not run is there with the reason.

    The JSON is written after every entry. Raises `UsageError` for `resume` without results to go on from.
    """
    return _Campaign(campaign, tuple(entries)).run()


class _Campaign:
    def __init__(self, campaign: Campaign, entries: tuple[Entry, ...]) -> None:
        self._how, self._entries = campaign, entries
        self._runs: dict[str, dict[str, Any]] = _earlier(campaign, entries) if campaign.resume else {}
        budget = campaign.budget_s
        self._deadline = None if budget is None else time.monotonic() + budget

    def run(self) -> str:
        self._begin_log()
        missing = [entry for entry in self._entries if entry.text not in self._runs]
        for _, group in groupby(missing, key=lambda entry: (entry.topology, entry.p2p)):
            # torch takes seconds to import: the first process, which must do so too, is started before
            checked = has_torch()
            entries = [entry for entry in group if self._conceivable(entry)]
            if checked:
                entries = [entry for entry in entries if self._possible(entry)]
            if entries:
                self._run_group(entries, checked)
        self._write()
        reports = [_report(self._runs[entry.text]) for entry in self._entries]
        return "\n".join([table(reports), *self._comparisons()])

    def _begin_log(self) -> None:
        """What processes of another matrix said is not kept."""
        path = self._log_path()
        if path is not None and not self._how.resume:
            path.unlink(missing_ok=True)

    def _log_path(self) -> Path | None:
        """Beside the results; None without them, or where they go to a device or a pipe."""
        path = None if self._how.json is None else Path(self._how.json)
        if path is None or (path.exists() and not path.is_file()):
            return None
        return path.with_name(f"{path.name}.log")

    def _conceivable(self, entry: Entry) -> bool:
        """Whether the model can take an entry, as far as that is known without torch, and there is time; else it is
        listed with the reason.
        """
        from wanrt.pipeline.build import topology_of

        try:
            job = job_of(self._how.flags, entry)
            if job.topology != "auto":
                topology_of(job)
        except WanrtError as error:
            self._skip([entry], str(error))
            return False
        if self._deadline is not None and time.monotonic() > self._deadline:
            self._skip([entry], f"the budget of {self._how.budget_s:.0f} s was used up before")
            return False
        return True

    def _possible(self, entry: Entry) -> bool:
        """Whether this machine can run an entry; else it is listed with the reason. Imports torch."""
        from wanrt.pipeline.build import settle_topology
        from wanrt.pipeline.devices import choose_device

        try:
            job = job_of(self._how.flags, entry)
            device = choose_device(job.device)
            settle_topology(job, device)
            if not entry.p2p and device.type == "cpu":
                raise UsageError("no-p2p: NCCL_P2P_DISABLE changes nothing on a CPU")
        except WanrtError as error:
            self._skip([entry], str(error))
            return False
        return True

    def _run_group(self, entries: Sequence[Entry], checked: bool) -> None:
        """Entries of one topology in one process, watched until they are done or time is up.

        checked: whether this machine can run them; else that is found out while the process starts.
        """
        with tempfile.TemporaryDirectory(prefix="wanrt-bench-") as folder:
            part = Path(folder, "part.json")
            with self._open_log(folder, entries) as stderr:
                heard = Overheard(Path(stderr.name), self._how.say)
                process = subprocess.Popen(
                    self._command(entries, part),
                    env=os.environ | ({} if entries[0].p2p else {P2P_SWITCH: "1"}),
                    stdout=subprocess.DEVNULL,
                    stderr=stderr,
                    start_new_session=True,
                )
                try:
                    possible = entries if checked else [entry for entry in entries if self._possible(entry)]
                    if not possible:
                        return
                    in_time = self._watch(process, part, heard)
                    doing = heard.doing()
                finally:
                    _end(process)
            self._collect(part)
            heard.listen()
        self._account_for(entries, None if not in_time else process.returncode, doing, heard)

    def _open_log(self, folder: str, entries: Sequence[Entry]) -> IO[str]:
        """Where a process's stderr goes: behind what is in the log already, or nowhere lasting."""
        path = self._log_path() or Path(folder, "stderr")
        try:
            file = path.open("a", encoding="utf-8")
        except OSError as error:
            raise OutputError(f"{path}: {error.strerror}; choose another --json FILE") from error
        file.write(f"# {','.join(entry.text for entry in entries)}\n")
        file.flush()
        return file

    def _account_for(self, entries: Sequence[Entry], code: int | None, doing: str, heard: Overheard) -> None:
        """Lists what a process left undone, with what it was doing last. code: None when time was up."""
        undone = [entry for entry in entries if entry.text not in self._runs]
        if not undone:
            return
        log.debug("%s: its last lines: %s", undone[0].title, " | ".join(heard.lines))
        while_ = f" while: {doing}" if doing else ""
        if code is not None:
            words = heard.last_words()[:300]
            self._skip(
                undone, f"its process ended with code {code}{while_}" + (f": {words}" if words else "")
            )
            return
        budget = f"the budget of {self._how.budget_s:.0f} s was used up"
        self._skip(undone[:1], budget + (while_ or " before it was done"))
        self._skip(undone[1:], f"{budget} before")

    def _command(self, entries: Sequence[Entry], part: Path) -> list[str]:
        how = self._how
        command = [sys.executable, "-m", "wanrt", "bench", "--json", str(part)]
        command += ["--matrix", ",".join(entry.text for entry in entries)]
        command += ["--chunks", str(how.chunks), "--warm-up", str(how.warm_up)]
        command += ["--graphs" if how.tuning.graphs else "--no-graphs"]
        command += ["--compile" if how.tuning.compile else "--no-compile"]
        for name, value in how.flags.items():
            option = f"--{name.replace('_', '-')}"
            if value is True:
                command.append(option)
            elif value not in (None, False) and name != "topology":
                command += [option, str(value)]
        return command

    def _watch(self, process: subprocess.Popen[bytes], part: Path, heard: Overheard) -> bool:
        """Takes over results and lines as they come. False when time was up first."""
        while process.poll() is None:
            heard.listen()
            if self._deadline is not None and time.monotonic() > self._deadline:
                return False
            self._collect(part)
            time.sleep(LOOK_S)
        heard.listen()
        return True

    def _collect(self, part: Path) -> None:
        """New results of a process; its file is replaced whole, never half written."""
        if not part.is_file():
            return
        runs = json.loads(part.read_text(encoding="utf-8"))["runs"]
        new = [run for run in runs if run["entry"] not in self._runs]
        for run in new:
            self._runs[run["entry"]] = run
        if new:
            self._write()

    def _skip(self, entries: Iterable[Entry], reason: str) -> None:
        for entry in entries:
            if entry.text not in self._runs:
                unmeasured = Unmeasured(entry.title, reason)
                self._runs[entry.text] = {"entry": entry.text, **unmeasured.document()}
                log.warning("%s: %s", entry.title, reason)

    def _write(self) -> None:
        from wanrt.telemetry.files import write_json

        if self._how.json is None:
            return
        for entry in self._entries:
            if "costs" in self._runs.get(entry.text, {}):
                self._runs[entry.text]["predictions"] = self._predictions(entry)
        runs = [self._runs[entry.text] for entry in self._entries if entry.text in self._runs]
        order = [entry.text for entry in self._entries]
        waiting = [text for text in order if text not in self._runs]
        write_json(self._how.json, {"schema": 1, "order": order, "waiting": waiting, "runs": runs})

    # --- the simulator beside the measurement -----------------------------------------------------------------

    def _predictions(self, entry: Entry) -> dict[str, dict[str, float]]:
        """Periods that the simulator gives, in milliseconds, and how far they are off the measured one.

        own: from the stage costs of this very run; single: from those of one device, carried over.
        """
        from wanrt.parallel.topology import Topology
        from wanrt.telemetry.simulator import simulate

        run = self._runs[entry.text]
        job, topology = job_of(self._how.flags, entry), Topology.parse(entry.topology or "single")
        own = simulate(StageCosts(**run["costs"]), job.anchor, pp1=topology.pp1, window=job.window)
        found = {"own": own, "single": self._from_single(entry)}
        measured = run["period"]["p50_ms"]
        return {
            name: {"period_ms": p.period, "error": p.period / measured - 1}
            for name, p in found.items()
            if p is not None
        }

    def _from_single(self, entry: Entry) -> Prediction | None:
        from wanrt.parallel.choose import forecast
        from wanrt.parallel.hardware import Link
        from wanrt.parallel.report import find_machine
        from wanrt.parallel.topology import Topology
        from wanrt.parallel.workload import Workload

        base = self._runs.get(replace(entry, topology="single", anchor=None, p2p=True, name="").text, {})
        if "costs" not in base:
            return None
        topology = Topology.parse(entry.topology or "single")
        machine = find_machine(topology.devices, None, None, None)
        if not entry.p2p:
            machine = replace(machine, link=Link.HOST)
        job = job_of(self._how.flags, entry)
        return forecast(Workload.of(job), topology, machine, job.anchor, StageCosts(**base["costs"]))

    def _comparisons(self) -> list[str]:
        """The predictions in words, a line each."""
        words = {"own": "its own stage costs", "single": "those of one device"}
        lines = []
        for entry in self._entries:
            run = self._runs[entry.text]
            if "costs" not in run:
                continue
            parts = [
                f"{p['period_ms']:.1f} ({p['error']:+.1%}) from {words[name]}"
                for name, p in self._predictions(entry).items()
            ]
            lines.append(
                f"predicted: {run['name']}: {run['period']['p50_ms']:.1f} ms measured; " + ", ".join(parts)
            )
        return lines


def has_torch() -> bool:
    """Whether this process has imported torch."""
    return "torch" in sys.modules


def _earlier(campaign: Campaign, entries: Iterable[Entry]) -> dict[str, dict[str, Any]]:
    """Entries that an earlier call measured with the same model and chunks; the others are tried again."""
    wanted = {entry.text for entry in entries}
    if campaign.json is None:
        raise UsageError("--resume: expected --json FILE, the results to go on from")
    path = Path(campaign.json)
    if not path.exists():
        return {}
    try:
        runs = json.loads(path.read_text(encoding="utf-8"))["runs"]
        return {
            run["entry"]: run
            for run in runs
            if run["entry"] in wanted and "costs" in run and _alike(run, campaign)
        }
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UsageError(f"--resume: {path} is no file of wanrt bench --json ({error})") from error


def _alike(run: Mapping[str, Any], campaign: Campaign) -> bool:
    job = job_of(campaign.flags, Entry(topology="single"))
    now = (job.preset.name, job.random_weights, campaign.chunks, campaign.warm_up)
    made = run["settings"]
    return (made["preset"], made["random_weights"], run["chunks"], run["warm_up_chunks"]) == now


def _report(run: Mapping[str, Any]) -> BenchReport | Unmeasured:
    return BenchReport.read(run) if "costs" in run else Unmeasured(run["name"], run["reason"])


def _end(process: subprocess.Popen[bytes]) -> None:
    """Ends a process with its ranks, which die with it."""
    if process.poll() is not None:
        return
    process.send_signal(signal.SIGTERM)
    try:
        process.wait(GRACE_S)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
