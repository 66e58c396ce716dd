"""`wanrt bench --check`: how far one precision's latents are from another's, on the same inputs.

Two transformers take every pass of a stream side by side. The reference's result goes on, so both see the same
noise, the same context and the same latents at every step: what is measured is the precision, not how a stream
drifts apart once it has begun to.

    error    |x0 - x0'| / |x0'|, x0' the reference's prediction of the clean latents, Euclidean norms over a chunk
    cosine   between x0 and x0'

Both transformers are in memory at once: 14B takes 28 GB in bf16 and 15 GB in fp8.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING

from wanrt.errors import UsageError
from wanrt.pipeline.build import (
    Wiring,
    find_files,
    join_stage0,
    make_denoiser,
    make_recorder,
    mesh_settings,
    settle_topology,
)
from wanrt.pipeline.context import CHUNK_LATENTS, pixel_frames
from wanrt.pipeline.lanes import lanes_for
from wanrt.pipeline.mesh import Denoiser, InProcessMesh, Mesh
from wanrt.pipeline.schedule import nearest_sigma, predict_x0

if TYPE_CHECKING:
    import torch

    from wanrt.pipeline.build import Tuning
    from wanrt.script import RenderJob

REFERENCES = {"fp8": "bf16", "bf16": "fp32", "fp16": "fp32"}


@dataclass(frozen=True)
class StepError:
    """Of one denoising step of one chunk. See the module's head."""

    chunk: int
    step: int
    timestep: float
    error: float
    cosine: float


@dataclass(frozen=True)
class CheckReport:
    """Every step that was compared, in order."""

    precision: str
    reference: str
    settings: Mapping[str, object]
    steps: tuple[StepError, ...]

    def document(self) -> dict[str, object]:
        """As JSON."""
        return asdict(self)

    def table(self) -> str:
        """One line a step, the worst one last."""
        worst = max(self.steps, key=lambda step: step.error)
        lines = [f"{self.precision} against {self.reference}: x0 of each step, on the same inputs"]
        lines += [
            f"chunk {s.chunk}  step {s.step}  t {s.timestep:6.1f}  error {s.error:.2e}  cosine {s.cosine:.6f}"
            for s in self.steps
        ]
        return "\n".join([*lines, f"largest error {worst.error:.2e}, chunk {worst.chunk} step {worst.step}"])


class PairedDenoiser:
    """Two denoisers as one: the reference's results go on, the other's are compared with them on the device."""

    def __init__(self, reference: Denoiser, tested: Denoiser, shift: float) -> None:
        self._reference, self._tested, self._shift = reference, tested, shift
        self._steps: list[tuple[float, torch.Tensor]] = []  # timestep; error and cosine, on the device

    @property
    def device(self) -> torch.device:
        """The one device of both."""
        return self._reference.device

    def set_text(self, embedding: torch.Tensor) -> None:
        """To both."""
        self._reference.set_text(embedding)
        self._tested.set_text(embedding)

    def set_bias(self, bias: float) -> None:
        """To both."""
        self._reference.set_bias(bias)
        self._tested.set_bias(bias)

    def context(self, latents: torch.Tensor) -> None:
        """The same frames for both."""
        self._reference.context(latents)
        self._tested.context(latents)

    def commit(self, latents: torch.Tensor) -> None:
        """The reference's chunk for both."""
        self._reference.commit(latents)
        self._tested.commit(latents)

    def close(self) -> None:
        """See `Denoiser.close`."""
        self._reference.close()
        self._tested.close()

    def denoise(self, latents: torch.Tensor, timestep: float) -> torch.Tensor:
        """The reference's velocity."""
        import torch

        velocity = self._reference.denoise(latents, timestep)
        sigma = nearest_sigma(timestep, self._shift)
        want = predict_x0(latents, velocity, sigma).double()
        got = predict_x0(latents, self._tested.denoise(latents, timestep), sigma).double()
        cosine = (got * want).sum() / (got.norm() * want.norm())
        self._steps.append((timestep, torch.stack(((got - want).norm() / want.norm(), cosine))))
        return velocity

    def steps(self, per_chunk: int) -> tuple[StepError, ...]:
        """What was compared; waits for the device."""
        found = []
        for index, (timestep, measured) in enumerate(self._steps):
            error, cosine = measured.tolist()
            found.append(StepError(*divmod(index, per_chunk), timestep, error, cosine))
        return tuple(found)


def check(job: RenderJob, chunks: int, tuning: Tuning) -> CheckReport:
    """Runs `chunks` chunks of `job` in its precision and in the reference's: bf16 for fp8, fp32 for bf16 and fp16.

    Raises `UsageError` for a precision that is itself the reference, for several devices, and as `bench`.
    """
    from wanrt.pipeline.devices import choose_device, set_threads, wait_passively
    from wanrt.pipeline.run import one_line_errors

    wait_passively()
    device = choose_device(job.device)
    name = _settled_precision(job.precision, device)
    job = settle_topology(replace(job, precision=name), device)
    if job.topology != "single":
        raise UsageError(
            f"--check with topology {job.topology}: expected single; both models run on one device"
        )
    set_threads(device)
    wanted = replace(job, frames=pixel_frames(CHUNK_LATENTS * chunks))
    with one_line_errors():
        return _compare(wanted, REFERENCES[name], device, tuning)


def _settled_precision(name: str, device: torch.device) -> str:
    if name == "auto":
        name = "bf16" if device.type == "cuda" else "fp32"
    if name not in REFERENCES:
        raise UsageError(
            f"--check with --precision {name}: that is the reference; expected {', '.join(REFERENCES)}"
        )
    return name


def _compare(job: RenderJob, reference: str, device: torch.device, tuning: Tuning) -> CheckReport:
    from wanrt.pipeline.devices import choose_precision
    from wanrt.pipeline.models import load_stage0, load_transformer
    from wanrt.pipeline.run import settings

    files, wiring, lanes = find_files(job), Wiring(make_recorder(job, device, None)), lanes_for(device)
    models = load_stage0(job, files, device, choose_precision(job.precision, device), wiring.loading)

    def load(name: str) -> Denoiser:
        precision = choose_precision(name, device)
        # the reference may be in a precision that the backend asked for does not have
        own = job if name == job.precision else replace(job, attention="auto")
        transformer = load_transformer(own, files, device, precision, wiring.loading)
        return make_denoiser(job, transformer, device, wiring, tuning)

    with lanes.main():
        pair = PairedDenoiser(load(reference), load(job.precision), job.preset.sampling.shift)
        mesh = Mesh(pair, mesh_settings(job), wiring.recorder, wiring.check)
    handle = InProcessMesh(mesh, launch_on_submit=device.type == "cuda")
    pipeline = join_stage0(job, models, handle, device, wiring, tuning, lanes)
    try:
        for _ in pipeline.run():
            pass
    finally:
        pipeline.close()
    return CheckReport(job.precision, reference, settings(job), pair.steps(len(job.steps)))


def run_check(flags: Mapping[str, object], chunks: int, tuning: Tuning, json: str | None) -> str:
    """What the command does: compares, writes the JSON, returns the table."""
    from wanrt.script import build_job, read_script
    from wanrt.telemetry.export import machine
    from wanrt.telemetry.files import write_json

    job = build_job(read_script("a red ball bouncing over a blue night sky"), flags)
    found = check(job, chunks, tuning)
    if json is not None:
        write_json(json, {"schema": 1, "check": found.document(), "machine": machine()})
    return found.table()
