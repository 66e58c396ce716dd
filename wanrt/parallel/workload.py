"""What a job asks of its devices, in whole numbers: parameters, tokens, bytes, operations. No torch, no weights."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from wanrt.parallel.topology import MeshKind, ModelShape, Topology
from wanrt.parallel.vae_traffic import VaeSizes, decode_exchange, encode_exchange

if TYPE_CHECKING:
    from wanrt.script import RenderJob

CHUNK = 3  # latent frames
# Of a prompt, on whose length times depend: about what Wan's own prompt extension writes, 80 to 100 words
# (Wan-Video/Wan2.1 wan/utils/prompt_extend.py at 9737cba).
PROMPT_TOKENS = 128
LATENT_CHANNELS = 16
FP32_BYTES = 4
SCALE_BYTES = 4  # of a channel of an fp8 weight, or a row of fp8 values
MIB = 1 << 20
GIB = 1 << 30

# Decoder state of the Wan 2.1 VAE in 16 bits: 831 MiB at 576x320 for base dim 96, in proportion to both; counted
# on the feature cache of Wan-Video/Wan2.1 wan/modules/vae.py at 9737cba.
STATE_PER_PIXEL = 831 * MIB / (576 * 320)
VAE_PARAMETERS = 126_892_531  # of Wan2.1_VAE.pth, base dim 96
# Activations of the decoder's last stage: four frames of 96 channels, some four of them alive at once.
DECODE_ALIVE = 4 * 4 * 96
RUNTIME = int(
    1.5 * GIB
)  # CUDA context, cuBLAS and NCCL workspaces, fragmentation; measured on H200: 1.2 to 1.6


@dataclass(frozen=True)
class Workload:
    """The sizes of one job. `steps`: denoising steps of a chunk.

    prompt_tokens: as many as a random embedding has, with which `wanrt bench` measures; no more than `text_len`.
    element: bytes of a transformer weight and of an activation; fp8: the large products' weights take one byte, as
    `wanrt.models.fp8.plan_for` names them.
    """

    dim: int
    ffn_dim: int
    layers: int
    heads: int
    text_dim: int
    text_len: int
    freq_dim: int
    width: int
    height: int
    window: int
    steps: int
    recompute: bool
    element: int
    vae_dim: int
    text_encoder: int  # parameters
    vae_blocks: int = 2  # residual blocks of a level
    vae_splits: bool = True  # whether this kind of VAE can be split over devices
    fp8: bool = False
    prompt_tokens: int = PROMPT_TOKENS

    @classmethod
    def of(cls, job: RenderJob) -> Workload:
        """The workload of a job; `auto` precision counts as bf16."""
        t, text = job.preset.transformer, job.preset.text
        encoder_layer = 4 * text.dim * text.attn_dim + 3 * text.dim * text.ffn_dim
        return cls(
            dim=t.dim,
            ffn_dim=t.ffn_dim,
            layers=t.num_layers,
            heads=t.num_heads,
            text_dim=t.text_dim,
            text_len=t.text_len,
            freq_dim=t.freq_dim,
            width=job.width,
            height=job.height,
            window=job.window,
            steps=len(job.steps),
            recompute=job.preset.cache.policy == "recompute",
            element=4 if job.precision == "fp32" else 2,
            vae_dim=job.preset.vae.base_dim,
            text_encoder=text.vocab * text.dim + text.num_layers * encoder_layer,
            vae_blocks=job.preset.vae.num_res_blocks,
            vae_splits=job.preset.vae.kind == "wan",
            fp8=job.precision == "fp8",
        )

    @property
    def frame_tokens(self) -> int:
        """Tokens of a latent frame."""
        return (self.width // 16) * (self.height // 16)

    @property
    def prompt_keys(self) -> int:
        """Keys of a prompt: its own and one for all of its padding, as `wanrt.models.attention.attend_text` takes."""
        return min(self.prompt_tokens + 1, self.text_len)

    @property
    def pixels(self) -> int:
        """Of one frame."""
        return self.width * self.height

    @property
    def shape(self) -> ModelShape:
        """What a split must divide."""
        return ModelShape(self.heads, self.ffn_dim, self.frame_tokens, max(self.height, self.width) // 8)

    @property
    def vae_sizes(self) -> VaeSizes:
        """Sizes of the VAE and its latents."""
        return VaeSizes(self.vae_dim, self.height // 8, self.width // 8, self.vae_blocks)

    @property
    def split_parameters(self) -> int:
        """Parameters of the transformer that tensor parallelism splits."""
        d, f = self.dim, self.ffn_dim
        attention = 4 * d * d + 3 * d + 2 * d  # q, k, v with bias, o without, two norms
        return self.layers * (2 * attention + 2 * d * f + f)

    @property
    def whole_parameters(self) -> int:
        """Parameters that every rank of a mesh holds."""
        d = self.dim
        layer = 2 * d + d + 2 * d + 6 * d  # biases of o and ffn, norm3, modulation
        patch = 4 * LATENT_CHANNELS * d + d
        text = self.text_dim * d + d + d * d + d
        time = self.freq_dim * d + d + d * d + d + 6 * (d * d + d)
        head = 4 * LATENT_CHANNELS * (d + 1) + 2 * d
        return self.layers * layer + patch + text + time + head

    @property
    def fp8_layers(self) -> int:
        """Layers whose products fp8 takes: all but the first and the last."""
        return max(self.layers - 2, 0)

    @property
    def fp8_parameters(self) -> int:
        """Parameters whose weights fp8 stores in a byte; tensor parallelism splits them all."""
        d = self.dim
        return self.fp8_layers * (6 * d * d + 2 * d * self.ffn_dim)

    @property
    def fp8_scales(self) -> int:
        """Channels with a scale of four bytes each, on one device; a rank of several holds fewer."""
        return self.fp8_layers * (7 * self.dim + self.ffn_dim)

    def passes(self) -> list[tuple[int, int]]:
        """(tokens, keys) of every forward of a steady chunk: context or commit pass, then the steps."""
        context, chunk = self.window * self.frame_tokens, CHUNK * self.frame_tokens
        clean = (context, context) if self.recompute else (chunk, context + chunk)
        return [clean] + [(chunk, context + chunk)] * self.steps


@dataclass(frozen=True)
class DeviceMemory:
    """Bytes on one device, by what they are for."""

    weights: int = 0
    cache: int = 0
    vae: int = 0
    text: int = 0
    work: int = 0

    @property
    def total(self) -> int:
        """All together."""
        return self.weights + self.cache + self.vae + self.text + self.work


def memory(work: Workload, topology: Topology) -> list[DeviceMemory]:
    """Estimated bytes on each device, in the order of `topology.ranks()`."""
    return [
        DeviceMemory(
            weights=_weights(work, topology) if rank.mesh is not None else 0,
            cache=_cache(work, topology.mesh) if rank.mesh is not None else 0,
            vae=_vae(work, topology.vae) if rank.vae is not None else 0,
            text=2 * work.text_encoder if rank.stage0 else 0,
            work=RUNTIME + (_passes_room(work, topology) if rank.mesh is not None else 0),
        )
        for rank in topology.ranks()
    ]


def _weights(work: Workload, topology: Topology) -> int:
    parts = topology.mesh if topology.kind is MeshKind.TP else 1
    whole = work.element * (work.split_parameters // parts + work.whole_parameters)
    if not work.fp8:
        return whole
    return whole - (work.element - 1) * work.fp8_parameters // parts + SCALE_BYTES * work.fp8_scales


def _cache(work: Workload, mesh: int) -> int:
    """Keys and values of self-attention (and the un-rotated keys of a rolling cache), and of the prompt."""
    slots = 2 * (work.window + CHUNK) + (0 if work.recompute else work.window)
    tokens = slots * work.frame_tokens + 2 * work.text_len
    return work.element * work.layers * work.dim * tokens // mesh


def _vae(work: Workload, parts: int) -> int:
    wide = work.vae_dim / 96
    state = STATE_PER_PIXEL * work.pixels * wide
    alive = 2 * DECODE_ALIVE * work.pixels * wide
    return int(2 * VAE_PARAMETERS * wide * wide + (state + alive) / parts)


def _passes_room(work: Workload, topology: Topology) -> int:
    return _activations(work, topology) + exchange_buffers(work, topology)


def _activations(work: Workload, topology: Topology) -> int:
    """The widest moment of a layer: residual, q, k, v, attention output and the feed-forward's hidden values."""
    tokens = max(work.window, CHUNK) * work.frame_tokens
    if topology.kind is MeshKind.ULYSSES:
        tokens //= topology.mesh
    parts = topology.mesh if topology.kind is MeshKind.TP else 1
    return work.element * tokens * (8 * work.dim + 2 * work.ffn_dim // parts)


def exchange_buffers(work: Workload, topology: Topology) -> int:
    """Bytes of the buffers that a mesh rank shares with ranks that reach its memory, but for its cache.

    They are as large as the largest pass needs, and stay. Those of `FusedExchange`, in its order: partial products,
    normalised tokens (the head's in fp32, for a chunk), mean squares of two projections from every rank, fp8 rows with
    their scales. Those of `PeerMemory`: queries, outputs, and a commit's raw keys.
    """
    chunk, n, element = CHUNK * work.frame_tokens, topology.mesh, work.element
    if n == 1:
        return 0
    tokens = max(work.window * work.frame_tokens, chunk) if work.recompute else chunk
    if topology.kind is MeshKind.TP:
        head = 0 if element == FP32_BYTES else FP32_BYTES * chunk * work.dim
        rows = tokens * (work.dim + SCALE_BYTES) if work.fp8 and work.fp8_layers else 0
        return 2 * element * tokens * work.dim + head + FP32_BYTES * 2 * n * tokens + rows
    if topology.kind is MeshKind.ULYSSES:
        commit = 0 if work.recompute else chunk
        return element * (2 * tokens + commit) * work.dim // n
    return 0


@dataclass(frozen=True)
class Traffic:
    """Bytes of one chunk. mesh: sent by each mesh rank to the others; stage0: between stage 0 and the mesh.

    vae: sent by the busiest rank of a split VAE to the others, for halos, attention and the anchor; pixels: from
    all of them to stage 0, as floats.
    """

    mesh: int
    stage0: int
    vae: int = 0
    pixels: int = 0


def traffic(work: Workload, topology: Topology, *, shared: bool = True) -> Traffic:
    """What moves between devices for one chunk. shared: the mesh's ranks reach each other's memory.

    An all-reduce of x bytes sends x (N-1)/N a rank to sum and as much to gather; an all-to-all of a 1/N share sends
    x (N-1)/N^2. Tensor parallelism has three of the former a layer, Ulysses four of the latter (q, k, v there, the
    output back). In shared memory tensor parallelism gathers what the next product takes, in fp8 a byte a value.
    """
    n = topology.mesh
    values = sum(tokens for tokens, _ in work.passes()) * work.dim * work.layers
    quantised = work.fp8_layers / work.layers if work.fp8 and shared else 0.0
    gathered = quantised + (1 - quantised) * work.element
    mesh = {
        MeshKind.SINGLE: 0.0,
        MeshKind.TP: 3 * (n - 1) / n * (work.element + gathered) * values,
        MeshKind.ULYSSES: 4 * (n - 1) / n**2 * work.element * values,
    }[topology.kind]
    latent = LATENT_CHANNELS * (work.height // 8) * (work.width // 8) * 4
    element = 4 if work.element == 4 else 2
    decode = decode_exchange(work.vae_sizes, topology.vae, element).bytes
    encode = encode_exchange(work.vae_sizes, topology.vae, element).bytes
    pixels = CHUNK * 4 * 3 * 4 * work.pixels * (topology.vae - 1) // topology.vae
    stage0 = (CHUNK + 1) * latent if topology.pp1 else 0
    return Traffic(int(mesh), stage0, CHUNK * decode + encode, pixels)


def operations(work: Workload) -> tuple[float, float]:
    """Floating point operations of one chunk's forwards: (matrix products, attention)."""
    d, f = work.dim, work.ffn_dim
    products = sum(2.0 * tokens * (6 * d * d + 2 * d * f) for tokens, _ in work.passes())
    attention = sum(4.0 * tokens * (keys + work.prompt_keys) * d for tokens, keys in work.passes())
    return work.layers * products, work.layers * attention
