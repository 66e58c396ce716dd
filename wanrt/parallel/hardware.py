"""Figures of devices and links, each measured, and the cost of a chunk that follows from them."""

from __future__ import annotations

from dataclasses import dataclass
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

    fixed: the part of a forward that does not shrink with the mesh (launches, whole-width norms and embeddings).
    """

    name: str
    products: float
    attention: float
    decode: float
    encode: float
    fixed: float
    slack: float
    fp8: float | None = None  # None: no such products, or not measured


# H200, bf16, 14B with random weights. Products: cuBLAS in the model's shapes; attention: cuDNN, 0.37 ms for a layer
# of 2160 queries and 4320 keys; fixed: see LINKS; slack: a compiled eager model against the sum of its parts, 521 ms
# against 450. VAE: 17.0 and 36.6 ms a latent at 576x320 and 832x480 (fastvae 0.1.0), the lone-frame encode from its
# 0.44 TFLOP. fp8: `torch._scaled_mm` with a scale a row, 1260 to 1360 in the model's shapes.
H200 = Device("H200", products=770, attention=500, decode=92.0, encode=16.0, fixed=0.04, slack=1.15, fp8=1300)
DEVICES = (H200,)

# GB/s that a rank sends, and microseconds that each message costs before it flows. Fitted, with `fixed`, to chunks of
# 14B on two H100 (bf16, without VAE, ms at 576x320 and 832x480; tests/measurements/h100-two.json), of which one needs
# 508 and 1222. NVLink, at its nominal rate: Ulysses 278 and 660, TP 299 and 689. Through the host: Ulysses 488 and
# 1080, TP 833. All within 5 %.
LINKS = {Link.NVLINK: (450.0, 5.9), Link.HOST: (23.5, 0.0)}
# Messages a layer and peer that wait; those of an all-reduce are in its bandwidth already.
PER_LAYER = {MeshKind.SINGLE: 0, MeshKind.TP: 0, MeshKind.ULYSSES: 4}
TRANSFER_MS = 0.5  # latents up and envelope down, a few hundred kilobytes with their launch and wake-up


def known(name: str) -> Device | None:
    """The figures for a device by the name that its driver gives, or None."""
    return next((device for device in DEVICES if device.name.lower() in name.lower()), None)


def akin(name: str) -> Device | None:
    """The figures of a device, or of one with the same processor: H100 SXM is H200 with other memory.

    Good for proportions between topologies, not for times.
    """
    return known(name) or (H200 if "H100" in name else None)


def mesh_ms(
    work: Workload, topology: Topology, device: Device, link: Link, slack: float | None = None
) -> float:
    """Milliseconds of one chunk's forwards on the mesh, communication included."""
    products, attention = operations(work)
    quantised = work.fp8_layers / work.layers if work.fp8 and device.fp8 else 0.0
    products *= (1 - quantised) / device.products + quantised / (device.fp8 or device.products)
    alone = (products + attention / device.attention) * 1e-9
    alone *= device.slack if slack is None else slack
    shared = alone * (device.fixed + (1 - device.fixed) / topology.mesh)
    rate, latency = LINKS[link]
    messages = PER_LAYER[topology.kind] * (topology.mesh - 1) * work.layers * len(work.passes())
    return shared + traffic(work, topology).mesh / rate * 1e-6 + messages * latency * 1e-3


def vae_ms(alone: float, work: Workload, topology: Topology, exchange: Exchange, link: Link) -> float:
    """Milliseconds of a VAE call that takes `alone` on one device: the widest band's tiles, and the exchanges."""
    if topology.vae == 1:
        return alone
    height, width = work.vae_sizes.height, work.vae_sizes.width
    axis = axis_of(height, width, topology.vae)
    share = band_cost(axis, height, width, topology.vae) / band_cost(axis, height, width, 1)
    rate, latency = LINKS[link]
    return alone * share + exchange.bytes / rate * 1e-6 + exchange.messages * latency * 1e-3


def predict(work: Workload, topology: Topology, device: Device, link: Link) -> StageCosts:
    """Stage costs of a topology, for the simulator."""
    wide = (work.vae_dim / 96) ** 2
    about = work.vae_sizes, topology.vae, 2
    return StageCosts(
        mesh=mesh_ms(work, topology, device, link),
        decode=vae_ms(
            device.decode * work.pixels * wide * 1e-6, work, topology, decode_exchange(*about), link
        ),
        encode=vae_ms(
            device.encode * work.pixels * wide * 1e-6, work, topology, encode_exchange(*about), link
        ),
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
