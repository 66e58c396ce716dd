"""One live target whose network misbehaves: drops, reconnects, refusals, stuck calls."""

import logging
import threading
import time

import pytest

from wanrt.errors import OutputError
from wanrt.output.address import Address
from wanrt.output.delivery import Delivery, DeliveryPhase, LivePacket
from wanrt.output.rtmp import RefusedError

ADDRESS = Address.parse("rtmp://host.example/live/s3cret")


class Wire:
    """A connection that keeps what it gets; `gate` holds it up, `broken` breaks it."""

    def __init__(self):
        self.packets, self.closed, self.cut = [], False, threading.Event()
        self.gate, self.broken = threading.Event(), False
        self.gate.set()

    def deliver(self, packet):
        while not self.gate.wait(0.01):
            if self.cut.is_set():
                raise OutputError("rtmp://host.example: cut")
        if self.broken:
            raise OutputError("rtmp://host.example: connection reset")
        self.packets.append(packet)

    def idle(self):
        if self.broken:
            raise OutputError("rtmp://host.example: closed the connection")

    def close(self):
        self.closed = True

    def shut(self):
        self.cut.set()


class Network:
    """Hands out wires, or the errors it was given first."""

    def __init__(self, *errors):
        self.errors, self.wires, self.attempts = list(errors), [], 0

    def __call__(self):
        self.attempts += 1
        if self.errors and (error := self.errors.pop(0)):
            raise error
        self.wires.append(Wire())
        return self.wires[-1]


def eventually(condition, seconds=60):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "did not happen"
        time.sleep(0.002)


@pytest.fixture
def delivery():
    """Start one at 10 fps with a second of latency and short waits; counts the keyframes it asks for."""
    made = []

    def start(network, latency=1.0):
        wanted = []
        target = Delivery(
            ADDRESS,
            network,
            fps=10,
            latency=latency,
            want_keyframe=lambda: wanted.append(1),
            backoff=(0.02, 0.1),
        )
        target.wanted = wanted
        made.append(target)
        return target

    yield start
    for target in made:
        for wire in target._connect.wires:
            wire.gate.set()
        target.close(1)


def packet(number, keyframe=False):
    return LivePacket(b"x", number, keyframe)


def live(target):
    return target.state.phase is DeliveryPhase.LIVE


def test_delivery_begins_with_a_keyframe(delivery):
    network = Network()
    target = delivery(network)
    eventually(lambda: live(target))
    assert target.wanted
    for number in range(6):
        target.offer(packet(number, keyframe=number == 2))
    eventually(lambda: target.state.sent == 4)
    assert [sent.number for sent in network.wires[0].packets] == [2, 3, 4, 5]
    assert target.state.dropped == 2


def test_a_slow_network_gets_the_newest(delivery):
    network = Network()
    target = delivery(network)
    eventually(lambda: live(target))
    target.offer(packet(0, keyframe=True))
    eventually(lambda: target.state.sent == 1)
    network.wires[0].gate.clear()
    asked = len(target.wanted)
    began = time.monotonic()
    for number in range(1, 31):
        target.offer(packet(number))
    assert time.monotonic() - began < 0.5, "offer never waits"
    assert len(target.wanted) > asked
    assert target.state.queued <= 1.0
    target.offer(packet(31, keyframe=True))
    target.offer(packet(32))
    network.wires[0].gate.set()
    eventually(lambda: network.wires[0].packets[-1].number == 32)
    numbers = [sent.number for sent in network.wires[0].packets]
    assert numbers in ([0, 1, 31, 32], [0, 31, 32]), "the one under way, then from the keyframe on"
    assert target.state.dropped + target.state.sent == 33


def test_a_broken_connection_is_made_again(delivery, caplog):
    network = Network(OutputError("rtmp://host.example: Connection refused"))
    with caplog.at_level(logging.INFO, "wanrt.output"):
        target = delivery(network)
        eventually(lambda: live(target))
        target.offer(packet(0, keyframe=True))
        eventually(lambda: target.state.sent == 1)
        network.wires[0].broken = True
        target.offer(packet(1))
        eventually(lambda: len(network.wires) == 2 and live(target))
    assert target.state.connections == 2
    assert network.attempts == 3
    assert network.wires[0].cut.is_set()
    target.offer(packet(2))
    target.offer(packet(3, keyframe=True))
    eventually(lambda: network.wires[1].packets)
    assert network.wires[1].packets[0].number == 3
    assert "live again (connection 2)" in caplog.text
    assert "s3cret" not in caplog.text + repr(target.state)


def test_an_idle_connection_that_breaks_is_noticed(delivery):
    network = Network()
    target = delivery(network)
    eventually(lambda: live(target))
    network.wires[0].broken = True
    eventually(lambda: len(network.wires) == 2)


def test_refused_at_once_is_final(delivery):
    network = Network(RefusedError("rtmp://host.example: refused"))
    target = delivery(network)
    eventually(lambda: target.state.phase is DeliveryPhase.FAILED)
    assert target.state.error == "rtmp://host.example: refused"
    target.offer(packet(0, keyframe=True))
    assert network.attempts == 1


def test_refused_later_is_tried_again(delivery):
    """A restarted server may hold the old session for a while and call the key in use."""
    network = Network(None, RefusedError("rtmp://host.example: refused: in use"))
    target = delivery(network)
    eventually(lambda: live(target))
    network.wires[0].broken = True
    target.offer(packet(0, keyframe=True))
    eventually(lambda: len(network.wires) == 2)


def test_a_defect_in_a_connection_is_survived(delivery):
    network = Network(ZeroDivisionError("rtmp://x/live/s3cret"))
    target = delivery(network)
    eventually(lambda: live(target))
    assert target.state.error == "rtmp://host.example: ZeroDivisionError"


def test_close_delivers_what_waits(delivery):
    network = Network()
    target = delivery(network)
    eventually(lambda: live(target))
    for number in range(8):
        target.offer(packet(number, keyframe=number == 0))
    target.close()
    assert len(network.wires[0].packets) == 8
    assert network.wires[0].closed
    assert target.state.phase is DeliveryPhase.CLOSED


def test_close_does_not_wait_for_a_stuck_network(delivery):
    network = Network()
    target = delivery(network)
    eventually(lambda: live(target))
    network.wires[0].gate.clear()
    target.offer(packet(0, keyframe=True))
    began = time.monotonic()
    target.close(0.2)
    assert time.monotonic() - began < 1
    assert not target._thread.is_alive()


def test_close_does_not_wait_for_the_next_attempt():
    target = Delivery(
        ADDRESS,
        Network(*[OutputError("rtmp://host.example: gone")] * 9),
        fps=10,
        latency=1,
        want_keyframe=lambda: None,
        backoff=(30, 30),
    )
    eventually(lambda: target.state.phase is DeliveryPhase.WAITING)
    began = time.monotonic()
    target.close()
    assert time.monotonic() - began < 1
