"""Which device, which precision, how many threads: chosen once, said in one log line each."""

from __future__ import annotations

import logging
import os
import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING

from wanrt.errors import UsageError

if TYPE_CHECKING:
    import torch

    from wanrt.models.attention import AttentionBackend

log = logging.getLogger("wanrt.pipeline")


@dataclass(frozen=True)
class Precision:
    """Dtypes of the models' weights. Latents between passes are float32 throughout.

    fp8: the transformer's large products are fp8, the rest of it in `transformer`; see `wanrt.models.fp8`.
    """

    transformer: torch.dtype
    vae: torch.dtype
    text: torch.dtype
    fp8: bool = False


def choose_device(name: str) -> torch.device:
    """The device called `name`; "auto" is the first CUDA device, or else the CPU.

    Raises `UsageError` for a name that torch does not know or a device that is not there.
    """
    import torch

    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise UsageError(f"device {name!r}: expected auto, cpu, cuda or cuda:N") from error
    if device.type not in ("cpu", "cuda"):
        raise UsageError(f"device {name!r}: expected auto, cpu, cuda or cuda:N")
    if device.type == "cpu":
        return device
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if (device.index or 0) >= count:
        raise UsageError(f"device {name!r}: {count} CUDA devices here; `wanrt doctor` lists what will work")
    return torch.device("cuda", device.index or 0)


def choose_precision(name: str, device: torch.device) -> Precision:
    """Dtypes for `auto`, `fp32`, `bf16`, `fp16` or `fp8` on `device`.

    The VAE never runs in bf16: a bf16 anchor encode inside a causal rollout costs SSIM 0.98 -> 0.76
    (hao-ai-lab/FastVideo #1472). The text encoder never runs in fp16, where UMT5-XXL overflows. On a CPU, `auto`
    is fp32. Raises `UsageError` for `fp8` on a device without fp8 products: nothing else is taken silently.
    """
    import torch

    on_gpu = device.type == "cuda"
    if name == "auto":
        name = "bf16" if on_gpu else "fp32"
    if name == "fp32":
        return Precision(torch.float32, torch.float32, torch.float32)
    if name == "bf16":
        return Precision(torch.bfloat16, torch.float16 if on_gpu else torch.float32, torch.bfloat16)
    if name == "fp16":
        return Precision(torch.float16, torch.float16 if on_gpu else torch.float32, torch.bfloat16)
    if name == "fp8":
        _refuse_without_fp8(device)
        return Precision(torch.bfloat16, torch.float16, torch.bfloat16, fp8=True)
    raise UsageError(f"precision {name!r}: expected auto, bf16, fp16, fp32 or fp8")


def _refuse_without_fp8(device: torch.device) -> None:
    from wanrt.models.fp8 import why_no_fp8

    if reason := why_no_fp8(device):
        raise UsageError(f"precision fp8: {reason}; take --precision bf16")


def choose_attention(
    name: str, device: torch.device, precision: Precision, head_dim: int
) -> AttentionBackend:
    """The backend called `name`, one of `ATTENTIONS`; "auto" is resolved where attention is computed.

    Raises `UsageError` for one that cannot run there: nothing else is taken silently.
    """
    from wanrt.models.attention import AttentionBackend, why_not

    backend = AttentionBackend(name)
    if reason := why_not(backend, device, precision.transformer, head_dim):
        raise UsageError(f"attention {name}: {reason}; take --attention auto")
    return backend


def usable_cores() -> int:
    """Cores this process may use: its affinity, cut by the control group's quota where there is one."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        with open("/sys/fs/cgroup/cpu.max", encoding="ascii") as file:  # noqa: PTH123 (no pathlib for one word)
            quota, period = file.read().split()[:2]
        return cores if quota == "max" else max(1, min(cores, int(quota) // int(period)))
    except (OSError, ValueError):
        return cores


def wait_passively() -> None:
    """Lets OpenMP's idle threads sleep instead of spin; only before torch is imported does this do anything.

    Spinning wins microseconds on an idle machine and loses seconds on a busy one, where a spinning thread keeps
    the core from the one it waits for: measured on 2 cores under load, 7.5 against 10 frames/s of wan-tiny, and
    the first frame after 9.1 instead of 2.5 s. The encoder's thread is such a load.
    """
    if "torch" in sys.modules:
        log.debug("torch is imported already: OpenMP keeps its wait policy")
        return
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")


def set_threads(device: torch.device, processes: int = 1) -> int:
    """Gives torch this process's share of the usable cores, unless OMP_NUM_THREADS says otherwise.

    `processes`: how many share the CPU. One process on CUDA is left alone: there the host's threads hardly matter. But
    ranks cut their parts out of a checkpoint's lines with them: 7 GB/s with 32 threads, 50 with 4 (H100 host of 32
    cores, PyTorch 2.11). Returns the number of threads.
    """
    import torch

    if (device.type == "cpu" or processes > 1) and "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(max(1, usable_cores() // processes))
    return torch.get_num_threads()
