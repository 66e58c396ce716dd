"""The mesh's part of a chunk: context pass, denoising steps, commit pass. It knows latents, never pixels."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from wanrt.errors import RunError
from wanrt.pipeline.context import CHUNK_LATENTS, AnchorPolicy, Head, context_plan, latents_kept
from wanrt.pipeline.envelope import ChunkRequest, ChunkResult, all_finite
from wanrt.pipeline.noise import noise
from wanrt.pipeline.schedule import Schedule, predict_x0, renoise
from wanrt.telemetry import Recorder

if TYPE_CHECKING:
    import torch

STAGE = "mesh"


class Denoiser(Protocol):
    """A causal transformer with its cache and its text, ready for one stream.

    Latents are `[B, 16, F, h, w]` float32 on the device; the denoiser casts to its own dtype and back.
    """

    @property
    def device(self) -> torch.device:
        """Where latents must be."""
        ...

    def set_text(self, embedding: torch.Tensor) -> None:
        """The prompt from now on, `[B, L, text_dim]`."""
        ...

    def set_bias(self, bias: float) -> None:
        """Factor b of the attention bias log(b) on context tokens, in (0, 1]."""
        ...

    def context(self, latents: torch.Tensor) -> None:
        """Context pass at timestep 0: these frames are what the next `denoise` calls see."""
        ...

    def denoise(self, latents: torch.Tensor, timestep: float) -> torch.Tensor:
        """Velocity of a chunk at `timestep` (0..1000)."""
        ...

    def commit(self, latents: torch.Tensor) -> None:
        """Clean pass at timestep 0 that appends a finished chunk to a rolling cache."""
        ...

    def close(self) -> None:
        """Gives up what holds a process group, before it is left."""
        ...


@dataclass(frozen=True)
class MeshSettings:
    """What every rank of a mesh must agree on."""

    seed: int
    shift: float  # of the noise schedule
    window: int
    policy: AnchorPolicy
    recompute: (
        bool  # context pass before each chunk; False: rolling or sink cache with a commit pass after it
    )
    shape: tuple[int, int, int, int, int]  # of a chunk's latents: [B, 16, 3, h, w]


class Mesh:
    """Makes chunk after chunk of one stream. Holds the latents that later contexts need, and nothing older.

    `check` is called between passes and raises to end the run.
    """

    def __init__(
        self,
        denoiser: Denoiser,
        settings: MeshSettings,
        recorder: Recorder,
        check: Callable[[], None] = lambda: None,
    ) -> None:
        self._denoiser, self._settings, self._recorder, self._check = denoiser, settings, recorder, check
        self._schedule: Schedule | None = None
        self._latents: dict[int, torch.Tensor] = {}
        self._noise: dict[tuple[int, int], torch.Tensor] = {}
        self._seed = settings.seed
        self._next = 0

    def run(self, request: ChunkRequest) -> ChunkResult:
        """Makes the chunk that `request` asks for. Launches only: nothing here waits for a device.

        Raises `RunError` for a chunk out of turn, or an anchor that the context rule wants and that is
        missing.
        """
        import torch

        if request.chunk != self._next:
            raise RunError(f"mesh: got chunk {request.chunk}, expected {self._next}: submit chunks in turn")
        with torch.inference_mode():
            self._apply(request)
            self._context_pass(request)
            latents = self._denoise(request.chunk)
            result = ChunkResult(request.chunk, latents, all_finite(latents))
            if not self._settings.recompute:
                self._commit(request.chunk, latents)
        self._remember(request.chunk, latents)
        self._next += 1
        return result

    def set_text(self, chunk: int, embedding: torch.Tensor) -> None:
        """The prompt `[B, L, text_dim]` from `chunk` on, the next to be made. Launches only, as `run`."""
        import torch

        with torch.inference_mode(), self._recorder.span(STAGE, "text", chunk):
            self._denoiser.set_text(embedding)

    def draw_ahead(self, chunk: int) -> None:
        """Draws the noise of `chunk` now, while the device is busy with the chunk before."""
        self._noise.clear()
        for step in range(len(self._steps())):
            self._noise[chunk, step] = self._fresh(chunk, step)

    def close(self) -> None:
        """Makes no more chunks; comes before the process group is left."""
        self._denoiser.close()

    def _apply(self, request: ChunkRequest) -> None:
        if request.control is not None:
            self._schedule = Schedule.of(request.control.steps, self._settings.shift)
            self._denoiser.set_bias(request.control.bias)
            self._take_seed(request.control.seed)

    def _take_seed(self, seed: int | None) -> None:
        seed = self._settings.seed if seed is None else seed
        if seed != self._seed:
            self._noise.clear()  # drawn ahead with the seed before
            self._seed = seed

    def _context_pass(self, request: ChunkRequest) -> None:
        import torch

        settings = self._settings
        plan = context_plan(request.chunk, settings.window, settings.policy)
        if not settings.recompute or not plan.frames:
            return
        head = request.anchor if plan.head is Head.ANCHOR else self._latents[plan.latents[0]]
        if head is None:
            raise RunError(f"mesh: chunk {request.chunk} came without the anchor of latent {plan.anchor}")
        frames = [head, *(self._latents[index] for index in plan.latents[1:])]
        self._check()
        with self._recorder.span(STAGE, "context", request.chunk):
            self._denoiser.context(torch.cat(frames, dim=2))

    def _denoise(self, chunk: int) -> torch.Tensor:
        schedule = self._steps()
        noisy = clean = self._take_noise(chunk, 0)
        for step, (timestep, sigma) in enumerate(zip(schedule.timesteps, schedule.sigmas, strict=True)):
            self._check()
            with self._recorder.span(STAGE, "step", chunk, step=step):
                clean = predict_x0(noisy, self._denoiser.denoise(noisy, timestep), sigma)
                if step + 1 < len(schedule):
                    noisy = renoise(clean, self._take_noise(chunk, step + 1), schedule.sigmas[step + 1])
        return clean

    def _steps(self) -> Schedule:
        if self._schedule is None:
            raise RunError("mesh: no denoising steps yet; the first request must carry a control")
        return self._schedule

    def _commit(self, chunk: int, latents: torch.Tensor) -> None:
        with self._recorder.span(STAGE, "commit", chunk):
            self._denoiser.commit(latents)

    def _remember(self, chunk: int, latents: torch.Tensor) -> None:
        if not self._settings.recompute:
            return
        for i in range(CHUNK_LATENTS):
            self._latents[CHUNK_LATENTS * chunk + i] = latents[:, :, i : i + 1]
        keep = latents_kept(chunk + 1, self._settings.window, self._settings.policy)
        self._latents = {index: latent for index, latent in self._latents.items() if index in keep}

    def _fresh(self, chunk: int, step: int) -> torch.Tensor:
        drawn = noise(self._seed, chunk, step, self._settings.shape)
        return drawn.pin_memory() if self._denoiser.device.type == "cuda" else drawn

    def _take_noise(self, chunk: int, step: int) -> torch.Tensor:
        drawn = self._noise.pop((chunk, step), None)
        if drawn is None:
            drawn = self._fresh(chunk, step)
        return drawn.to(self._denoiser.device, non_blocking=True)


def refuse_under_way(request: ChunkRequest | None, got: str) -> None:
    """Raises `RunError` when `request`, of the chunk under way, is not None."""
    if request is not None:
        raise RunError(f"mesh: got {got} while chunk {request.chunk} is under way; receive it first")


class InProcessMesh:
    """A mesh in stage 0's own process, as a `MeshHandle`.

    On CUDA a chunk is launched by `submit` and runs while stage 0 launches its display work on another
    stream. On a CPU, where launching is doing, it runs in `receive`: stage 0 shows a chunk before the next
    one starts, and two threads never fight for the same few cores.
    """

    def __init__(self, mesh: Mesh, *, launch_on_submit: bool) -> None:
        self._mesh, self._launch_on_submit = mesh, launch_on_submit
        self._request: ChunkRequest | None = None
        self._result: ChunkResult | None = None

    @property
    def launches_here(self) -> bool:
        """See `MeshHandle.launches_here`."""
        return self._launch_on_submit

    def set_text(self, chunk: int, embedding: torch.Tensor) -> None:
        """See `MeshHandle.set_text`."""
        refuse_under_way(self._request, f"the prompt of chunk {chunk}")
        self._mesh.set_text(chunk, embedding)

    def submit(self, request: ChunkRequest) -> None:
        """Takes a request; on CUDA its kernels are queued before this returns."""
        refuse_under_way(self._request, f"chunk {request.chunk}")
        self._request = request
        if self._launch_on_submit:
            self._result = self._mesh.run(request)
            self._mesh.draw_ahead(request.chunk + 1)

    def receive(self) -> ChunkResult:
        """The chunk under way; on CUDA its kernels may still be running."""
        if self._request is None:
            raise RunError("mesh: nothing is under way; submit a chunk first")
        result = self._result if self._result is not None else self._mesh.run(self._request)
        self._request = self._result = None
        return result

    def check(self) -> None:
        """This process is alive."""

    def close(self) -> None:
        """Drops what is under way."""
        self._request = self._result = None
