from __future__ import annotations

import random
import time

import numpy as np
import pytest
import torch

from wanrt.telemetry import CudaClock, Recorder, clock_for


class Device:
    """A pretended GPU: its oscillator runs `drift` fast, its queue is `busy_ns` of host time behind."""

    def __init__(self, clock, drift):
        self.clock, self.drift, self.busy_ns = clock, drift, 0

    def event(self, **_):
        return Event(self)


class Event:
    def __init__(self, device):
        self.device = device

    def record(self, stream):
        self.host_ns = self.device.clock.now + self.device.busy_ns

    def query(self):
        return self.device.clock.now >= self.host_ns

    def synchronize(self):
        self.device.clock.now = max(self.device.clock.now, self.host_ns)

    def elapsed_time(self, later):
        return float(np.float32((later.host_ns - self.host_ns) * (1 + self.device.drift) / 1e6))


@pytest.fixture
def device(clock, monkeypatch):
    made = Device(clock, 0.0)
    monkeypatch.setattr(torch.cuda, "Event", made.event)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: None)
    return made


@pytest.mark.parametrize("drift", [0.0, 20e-6, -20e-6])
def test_events_stay_on_the_hosts_clock_for_an_hour(clock, device, drift):
    """20 ppm, a bad oscillator, would be 72 ms off after an hour; polled as a panel does, a few ms are left."""
    device.drift = drift
    rng = random.Random(1)
    recorder = Recorder(clock=clock, device_clock=CudaClock("cuda:0", clock))
    worst = 0
    for chunk in range(3600):
        device.busy_ns = 0
        with recorder.span("mesh", "chunk", chunk):
            started = clock.now
            device.busy_ns = 400_000_000
        for _ in range(4):
            clock.advance(rng.uniform(200, 300))
            recorder.poll()
        span = recorder.recent(10)[-1]
        worst = max(worst, abs(span.start_ns - started))
        assert abs(span.duration_ns - 400_000_000) < 20_000
    assert worst < (100_000 if drift <= 0 else 15_000_000)


def test_a_span_is_known_once_the_device_has_passed_it(clock, device):
    recorder = Recorder(clock=clock, device_clock=CudaClock("cuda:0", clock))
    device.busy_ns = 50_000_000
    with recorder.span("mesh", "step", 0):
        device.busy_ns = 90_000_000
    assert recorder.stats().spans_recorded == 0
    clock.advance(100)
    assert recorder.stats().stage("mesh").spans["step"].p50_ms == pytest.approx(40, abs=0.01)


def test_which_devices_have_a_clock_of_their_own(device, clock):
    assert clock_for(None) is None
    assert clock_for("cpu") is None
    assert clock_for(torch.device("cpu")) is None
    assert isinstance(clock_for("cuda:0"), CudaClock)


@pytest.mark.gpu
def test_a_real_device():
    """A sleep on the device, launched at once: its span covers the sleep, not the launch."""
    recorder = Recorder(device_clock=clock_for("cuda:0"))
    torch.cuda._sleep(1000)
    torch.cuda.synchronize()
    before = time.perf_counter_ns()
    with recorder.span("mesh", "sleep", 0):
        torch.cuda._sleep(100_000_000)
    launched = time.perf_counter_ns()
    torch.cuda.synchronize()
    after = time.perf_counter_ns()
    (span,) = recorder.recent(10)
    assert launched - before < 5_000_000
    assert span.duration_ns > 20_000_000
    assert before <= span.start_ns + 100_000
    assert span.end_ns <= after + 100_000
