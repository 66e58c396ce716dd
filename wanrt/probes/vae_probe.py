"""`wanrt probe-vae` as functions: ask questions of a subject, get findings with a verdict each."""

from __future__ import annotations

import platform
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, is_dataclass
from typing import Any

import torch

from wanrt import __version__
from wanrt.errors import UsageError
from wanrt.probes.vae_anchor import Anchor, anchor
from wanrt.probes.vae_cost import Cost, cost
from wanrt.probes.vae_partial import (
    Causality,
    SingleLatent,
    Verdict,
    Workaround,
    decoder_causality,
    encoder_causality,
    single_latent,
    workarounds,
)
from wanrt.probes.vae_reach import Reach, WarmUp, decoder_reach, encoder_reach, warm_up
from wanrt.probes.vae_subject import Subject


@dataclass(frozen=True)
class Finding:
    """The answer to one question: a verdict where there is one, a sentence, and the numbers behind it."""

    question: str
    verdict: Verdict | None
    answer: str
    data: Any
    seconds: float


@dataclass(frozen=True)
class Causalities:
    """Both halves."""

    decoder: Causality
    encoder: Causality | None

    @property
    def halves(self) -> tuple[Causality, ...]:
        """Those that were examined."""
        return (self.decoder,) if self.encoder is None else (self.decoder, self.encoder)


@dataclass(frozen=True)
class Reaches:
    """Both halves, and what they mean for a decode without state."""

    decoder: Reach | None
    encoder: Reach | None
    warm_up: WarmUp


@dataclass(frozen=True)
class ProbeReport:
    """Everything that was asked of one VAE."""

    subject: str
    weights: str
    device: str
    dtype: str
    version: str
    torch: str
    findings: tuple[Finding, ...]

    def as_dict(self) -> dict[str, Any]:
        """Plain data for JSON; infinities become null."""
        return _plain(asdict(self))


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, float) and value in (float("inf"), float("-inf")):
        return None
    return _plain(asdict(value)) if is_dataclass(value) and not isinstance(value, type) else value


Answer = tuple[Verdict | None, str, Any]


def ask_single(subject: Subject) -> Answer:
    """Question 1."""
    data = single_latent(subject)
    return data.verdict, data.condition, data


def ask_causality(subject: Subject) -> Answer:
    """Question 2."""
    data = Causalities(decoder_causality(subject), encoder_causality(subject))
    guilty = [half for half in data.halves if not half.causal]
    verdict = Verdict.NO if guilty else Verdict.YES
    last = data.decoder.last_frame_error
    answer = "no later latent reaches an earlier pixel"
    if data.encoder is not None:
        answer += ", no later pixel an earlier latent"
    if guilty:
        answer = "; ".join(f"the {h.half} bleeds back in time: {h.bleed:.2g} of the scale" for h in guilty)
    if last is not None:
        answer += f"; the last frame of a T=1 decode is the whole decode's to {last:.1e} of the scale"
    return verdict, answer, data


def ask_reach(subject: Subject) -> Answer:
    """Question 3."""
    streams = subject.open_decoder is not None
    decoder = decoder_reach(subject) if streams else None
    encoder = encoder_reach(subject) if streams else None
    length = decoder.history + 3 if decoder is not None and decoder.complete else 24
    data = Reaches(decoder, encoder, warm_up(subject, latents=length))
    return None, _say_reach(data), data


def _say_reach(data: Reaches) -> str:
    parts = []
    if data.decoder is not None and data.encoder is not None:
        by_phase = data.decoder.history_by_phase
        parts.append(
            f"a pixel frame needs {data.decoder.history} latents of history (the anchor's {by_phase[-1]})"
        )
        parts.append(f"a latent needs {data.encoder.history} earlier pixel frames")
    needed = data.warm_up.needed
    beyond = f"more than {len(data.warm_up.errors) - 1}"
    steps = ", ".join(f"{beyond if n is None else n} for {name}" for name, n in needed.items())
    parts.append(f"a stateless decode must start early by (latents): {steps}")
    return "; ".join(parts)


def ask_workarounds(subject: Subject) -> Answer:
    """Question 4."""
    rows = workarounds(subject)
    rivals = [row for row in rows if row.name != "carried state"]
    best = min(
        rivals, key=lambda row: (row.error > 1e-2, row.latents_decoded if row.error <= 1e-2 else row.error)
    )
    cheap = min((row for row in rivals if row.latents_decoded == 2), key=lambda row: row.error)
    return (
        None,
        (
            f"with two latents decoded the best is {cheap.name!r}, wrong by {cheap.error:.2g} of the scale; "
            f"{best.name!r} comes to {best.error:.2g} for {best.latents_decoded} latents"
        ),
        rows,
    )


def ask_timing(subject: Subject) -> Answer:
    """Question 5."""
    data = cost(subject)
    run = next((r for r in data.runs if r.name.startswith("steady latent")), data.runs[0])
    groups = run.by_group()
    top = list(groups.items())[:2]
    layers_ms = sum(row.milliseconds for row in run.layers) or 1.0
    share = ", ".join(f"{name} {100 * row.milliseconds / layers_ms:.0f} %" for name, row in top)
    floor = sum(row.floor(data.roofline) for row in run.layers)
    return (
        None,
        (
            f"{run.name} at {data.size[0]}x{data.size[1]}: {run.milliseconds:.1f} ms; {share} of the layers' time; "
            f"the measured roofline allows {floor:.1f} ms"
        ),
        data,
    )


def ask_anchor(subject: Subject) -> Answer:
    """Question 6."""
    data = anchor(subject)
    if data is None:
        return None, "this VAE's interface encodes no lone frame", None
    return (
        None,
        (
            f"the re-encoded anchor differs from the latent it replaces by {data.against_replaced:.2g} rms, of which "
            f"{data.stream_against_fresh:.2g} is being a first frame and {data.against_fresh:.2g} the trip through "
            f"pixels; after {data.trips[-1].count} trips {data.trips[-1].latent_rms:.2g}, {data.trips[-1].psnr:.1f} dB"
        ),
        data,
    )


QUESTIONS: dict[str, Callable[[Subject], Answer]] = {
    "t1": ask_single,
    "causality": ask_causality,
    "receptive-field": ask_reach,
    "workarounds": ask_workarounds,
    "timing": ask_timing,
    "anchor": ask_anchor,
}

TITLES = {
    "t1": "Can T=1 be decoded?",
    "causality": "Is it causal in time?",
    "receptive-field": "How far back does it look?",
    "workarounds": "What do the workarounds cost?",
    "timing": "Where does the time go?",
    "anchor": "What does re-encoding the anchor do?",
}


def choose(only: str | None) -> tuple[str, ...]:
    """The questions in a comma-separated list; all without one. Raises `UsageError` for an unknown name."""
    if not only:
        return tuple(QUESTIONS)
    names = [name.strip() for name in only.split(",") if name.strip()]
    for name in names:
        if name not in QUESTIONS:
            raise UsageError(f"--only: got {name!r}, expected some of {', '.join(QUESTIONS)}")
    return tuple(name for name in QUESTIONS if name in names)


def probe(
    subject: Subject, questions: Sequence[str], progress: Callable[[str], None] = lambda _title: None
) -> ProbeReport:
    """Ask each question once, in order; `progress` is told its title before."""
    findings = []
    for name in questions:
        progress(TITLES[name])
        start = time.perf_counter()
        verdict, answer, data = QUESTIONS[name](subject)
        findings.append(Finding(name, verdict, answer, data, time.perf_counter() - start))
    return ProbeReport(
        subject=subject.name,
        weights=subject.weights,
        device=_device_name(subject.device),
        dtype=str(subject.dtype).removeprefix("torch."),
        version=__version__,
        torch=torch.__version__,
        findings=tuple(findings),
    )


def _device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{platform.machine()} CPU, {torch.get_num_threads()} threads"


__all__ = [
    "QUESTIONS",
    "Anchor",
    "Cost",
    "Finding",
    "ProbeReport",
    "SingleLatent",
    "Workaround",
    "choose",
    "probe",
]
