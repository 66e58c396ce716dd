from __future__ import annotations

import multiprocessing
import os
import queue
import time
import traceback

import pytest
import torch
import torch.distributed as dist


def rank_main(rank, size, work, results, body, arguments):
    """One rank: a gloo group over a file, then `body(group, *arguments)`; its result or traceback goes home."""
    torch.set_num_threads(1)
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    try:
        dist.init_process_group("gloo", init_method=f"file://{work}/rendezvous", rank=rank, world_size=size)
        results.put((rank, body(dist.group.WORLD, *arguments), None))
        dist.barrier()
        dist.destroy_process_group()
    except Exception:
        results.put((rank, None, traceback.format_exc()))


def collect(results, processes, limit_s=280):
    """One result of each rank; fails at once when a rank is gone without one."""
    found, deadline = [], time.monotonic() + limit_s
    while len(found) < len(processes):
        try:
            found.append(results.get(timeout=1))
        except queue.Empty:
            gone = [p.exitcode for p in processes if p.exitcode]
            assert not gone, f"ranks ended without a result, exit codes {gone}"
            assert time.monotonic() < deadline, f"{len(found)} of {len(processes)} ranks answered"
    return found


@pytest.fixture
def on_ranks(tmp_path):
    """Run a module-level function on N gloo ranks, each a process; their results in rank order.

    The processes come from a fork server that has imported torch once.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch", "wanrt.parallel.apply", "wanrt.pipeline.denoiser"])

    def run(size, body, *arguments):
        results = context.Queue()
        work = tmp_path / f"ranks{size}-{body.__name__}"
        work.mkdir()
        processes = [
            context.Process(
                target=rank_main, args=(r, size, str(work), results, body, arguments), daemon=True
            )
            for r in range(size)
        ]
        for process in processes:
            process.start()
        found = collect(results, processes)
        for process in processes:
            process.join(20)
        for rank, _, error in found:
            assert error is None, f"rank {rank}:\n{error}"
        return [value for _, value, _ in sorted(found, key=lambda item: item[0])]

    return run
