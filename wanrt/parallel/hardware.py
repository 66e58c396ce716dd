"""Figures of devices and links, each measured, and the cost of a chunk that follows from them."""

from __future__ import annotations

from dataclasses import dataclass, replace
from enum import StrEnum

from wanrt.parallel.topology import MeshKind, Topology
from wanrt.parallel.vae_axis import axis_of, band_cost
from wanrt.parallel.vae_traffic import Exchange, decode_exchange, encode_exchange
from wanrt.parallel.workload import Workload, operations, traffic
from wanrt.telemetry.simulator import StageCosts


class Link(StrEnum):
    """How devices of one machine reach each other."""

    NVLINK = "nvlink"
    HOST = "host"  # through host memory: PCIe boards without peer-to-peer


@dataclass(frozen=True)
class Device:
    """A kind of GPU. products, attention: reached TFLOP/s in bf16; fp8: of products in fp8, scales a row; decode,
    encode: ns a pixel of the VAE.

    layer: ms that a layer's forward needs beyond its operations, on a mesh of any size: kernels whose last tiles fill
    a part of the device, weights on their way, norms, launches.
    """

    name: str
    products: float
    attention: float
    decode: float
    encode: float
    layer: float
    fp8: float | None = None  # None: no such products, or not measured


# H100 SXM in steady runs, where its power limit lowers its clock. Fitted to the passes of 14B on one and two of them,
# bf16 and fp8, at both sizes (tests/parallel/test_workload.py has the ten times, all met within 1.2 %); they give
# the passes of 1.3B within 3 %. For comparison, alone and cool: products in bf16 740 to 778 TFLOP/s, attention 661
# and 712. VAE: 12.0 and 26.6 ms a latent at 576x320 and 832x480, 1.41 and 2.83 an anchor's encode.
H100 = Device("H100", products=660, attention=620, decode=65.8, encode=7.4, layer=31.5 / (5 * 40), fp8=1065)
# The same processor and power limit with faster memory, which these kernels do not wait for: the first form of
# the passes, in PyTorch's own kernels, took 521 ms a chunk at 576x320 on an H200 and 508 on an H100.
H200 = replace(H100, name="H200")
DEVICES = (H100, H200)
# The same processor with fewer parts or less power.
SLOWER = ("PCIe", "NVL")


@dataclass(frozen=True)
class Rates:
    """GB/s that a rank sends, in an all-reduce and in whatever else is exchanged."""

    reduce: float
    exchange: float


# NVLink: its nominal rate, at which kernels that store on other GPUs leave nothing to fit. Through the host, by NCCL,
# chunks of 14B on two H100 (tests/measurements/h100-two.json): under TP 833 ms at 576x320 and, with later kernels, 1628
# at 832x480, of which exchanges are 25 and 28 GB/s; under Ulysses 488 and 1080, 20 and 22 GB/s. On H200 NCCL alone
# reached 28 and 23 to 26 GB/s, on two ranks and on four.
LINKS = {Link.NVLINK: Rates(450.0, 450.0), Link.HOST: Rates(26.3, 21.5)}
# Of a split VAE, each exchange of borders: 10.6 us on two H100, and what convolutions of a band lose to the same part
# of a whole picture's. From 7.32 and 14.74 ms a latent on two, 1.21 and 1.96 an encode, at 576x320 and 832x480.
DECODE_BORDER_US, ENCODE_BORDER_US = 40.0, 19.0
TRANSFER_MS = (
    0.2  # latents up and envelope down: anchor path against decode and encode under pp1+tp=1 on two H100
)


def known(name: str) -> Device | None:
    """The figures for a device by the name that its driver gives, or None."""
    if any(slower.lower() in name.lower() for slower in SLOWER):
        return None
    return next((device for device in DEVICES if device.name.lower() in name.lower()), None)


def akin(name: str) -> Device | None:
    """The figures of a device, or of one with the same processor: H100 PCIe is H100 with fewer parts at work.

    Good for proportions between topologies, not for times.
    """
    return next((device for device in DEVICES if device.name.lower() in name.lower()), None)


def mesh_ms(work: Workload, topology: Topology, device: Device, link: Link) -> float:
    """Milliseconds of one chunk's forwards on the mesh, communication included."""
    products, attention = operations(work)
    quantised = work.fp8_layers / work.layers if work.fp8 and device.fp8 else 0.0
    products *= (1 - quantised) / device.products + quantised / (device.fp8 or device.products)
    split = (products + attention / device.attention) * 1e-9 / topology.mesh
    fixed = device.layer * work.layers * len(work.passes())
    rates = LINKS[link]
    rate = rates.reduce if topology.kind is MeshKind.TP else rates.exchange
    sent = traffic(work, topology, shared=link is Link.NVLINK).mesh
    return split + fixed + sent / rate * 1e-6


def vae_ms(
    alone: float, work: Workload, topology: Topology, exchange: Exchange, border_us: float, link: Link
) -> float:
    """Milliseconds of a VAE call that takes `alone` on one device: the widest band's tiles, and the exchanges."""
    if topology.vae == 1:
        return alone
    height, width = work.vae_sizes.height, work.vae_sizes.width
    axis = axis_of(height, width, topology.vae)
    share = band_cost(axis, height, width, topology.vae) / band_cost(axis, height, width, 1)
    return alone * share + exchange.bytes / LINKS[link].exchange * 1e-6 + exchange.messages * border_us * 1e-3


def predict(work: Workload, topology: Topology, device: Device, link: Link) -> StageCosts:
    """Stage costs of a topology, for the simulator."""
    pixels = work.pixels * (work.vae_dim / 96) ** 2 * 1e-6
    about = work.vae_sizes, topology.vae, 2
    decode, encode = decode_exchange(*about), encode_exchange(*about)
    return StageCosts(
        mesh=mesh_ms(work, topology, device, link),
        decode=vae_ms(device.decode * pixels, work, topology, decode, DECODE_BORDER_US, link),
        encode=vae_ms(device.encode * pixels, work, topology, encode, ENCODE_BORDER_US, link),
        transfer=TRANSFER_MS if topology.pp1 else 0.0,
    )


def rescale(
    measured: StageCosts, work: Workload, topology: Topology, device: Device, link: Link
) -> StageCosts:
    """Costs measured on one device carried over to `topology`, in the proportions of `predict`."""
    base, there = predict(work, Topology(), device, link), predict(work, topology, device, link)
    return StageCosts(
        mesh=measured.mesh * there.mesh / base.mesh,
        decode=measured.decode * there.decode / base.decode,
        encode=measured.encode * there.encode / base.encode,
        convert=measured.convert,
        transfer=there.transfer,
    )
