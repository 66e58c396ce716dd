"""Live streams to real receivers: the bundled ffmpeg as server, and servers that misbehave."""

import contextlib
import logging
import re
import shutil
import socket
import ssl
import subprocess
import sys
import threading
import time

import imageio_ffmpeg
import numpy as np
import psutil
import pytest

from wanrt.errors import OutputError, UsageError
from wanrt.output import QueuedSink, VideoSpec, open_outputs, open_sink
from wanrt.output.address import Address
from wanrt.output.delivery import DeliveryPhase
from wanrt.output.live import LiveSink, default_bits
from wanrt.output.pacing import Pace
from wanrt.output.rtmp import RefusedError, RtmpConnection, bound_unsent
from wanrt.output.tee import TeeSink

SPEC = VideoSpec(96, 64, 48)  # fast, so that two seconds of GOP pass soon


@pytest.fixture
def receiver(tmp_path, eventually):
    """Start the bundled ffmpeg, which listens then; its words go to a log file beside what it writes."""
    started = []

    def start(*arguments):
        command = [imageio_ffmpeg.get_ffmpeg_exe(), "-hide_banner", "-nostdin", "-y", *map(str, arguments)]
        with (tmp_path / "receiver.log").open("wb") as talk:
            process = subprocess.Popen(command, stdout=talk, stderr=talk)
        started.append(process)
        eventually(psutil.Process(process.pid).net_connections)
        return process

    yield start
    for process in started:
        process.kill()
        process.wait()


def phases(sink):
    return [target.phase for target in sink.state.targets]


def test_rtmp_to_ffmpeg(tmp_path, receiver, free_port, decode, movie, psnr, eventually):
    url = f"rtmp://127.0.0.1:{free_port()}/live/s3cret"
    process = receiver("-listen", 1, "-i", url, "-c", "copy", "-f", "flv", tmp_path / "a.flv")
    frames = movie(72)
    sink = LiveSink([url], SPEC, threads=1)
    eventually(lambda: phases(sink) == [DeliveryPhase.LIVE])
    began = time.monotonic()
    for chunk in np.split(frames, [60]):  # the first lasts long: the next must not come late
        sink.write(chunk)
    sink.finish()
    assert time.monotonic() - began >= 70 / 48, "paced: not faster than real time"
    process.wait(60)
    got = decode(tmp_path / "a.flv")
    assert len(got.frames) == 72
    assert psnr(got.frames, frames) >= 35
    assert [start * 1000 for start in got.starts] == [round(1000 * number / 48) for number in range(72)]
    assert re.search(r"Video: h264 \((Main|High)\), yuv420p\(tv, bt709", got.words)
    assert "Audio: aac (LC), 48000 Hz, stereo" in got.words
    state = sink.state
    assert (state.ticks, state.repeated, state.targets[0].sent) == (72, 0, 72)


@pytest.mark.parametrize("scheme", ["udp", "srt"])
def test_transport_streams(tmp_path, receiver, free_port, decode, movie, eventually, scheme):
    url = f"{scheme}://127.0.0.1:{free_port()}"
    listen = "?timeout=4000000" if scheme == "udp" else "?mode=listener"  # UDP has no other end than silence
    process = receiver("-i", url + listen, "-c", "copy", "-f", "mpegts", tmp_path / "a.ts")
    sink = LiveSink([url], SPEC, threads=1)
    eventually(lambda: phases(sink) == [DeliveryPhase.LIVE])
    sink.write(movie(60))
    sink.finish()
    process.wait(60)
    got = decode(tmp_path / "a.ts")
    assert len(got.frames) >= 52, "the last may be under way when the receiver ends"
    assert set(np.diff(got.starts)) <= {1875 * (got.starts[1] - got.starts[0]) / 1875}, "90 kHz / 48 is whole"
    assert "Audio: aac (LC)" in got.words


def test_hls_folder(tmp_path, decode, movie, psnr):
    sink = LiveSink([f"{tmp_path}/new/live.m3u8"], SPEC, threads=1)
    frames = movie(120)
    sink.write(frames[:60])
    sink.write(frames[60:])
    sink.finish()
    playlist = (tmp_path / "new" / "live.m3u8").read_text()
    assert playlist.endswith("#EXT-X-ENDLIST\n")
    assert re.findall(r"#EXTINF:([\d.]+)", playlist) == ["2.000000", "0.500000"]
    got = decode(tmp_path / "new" / "live.m3u8")
    assert len(got.frames) == 120
    assert psnr(got.frames, frames) >= 35


def test_several_targets_and_a_recording(tmp_path, decode, movie, caplog, free_port):
    """A target that is never there costs the others and the recording nothing."""
    spec = VideoSpec(96, 64, 48)
    live = LiveSink([f"rtmp://127.0.0.1:{free_port()}/live/s3cret", f"{tmp_path}/live.m3u8"], spec, threads=1)
    recording = QueuedSink(open_sink(tmp_path / "a.mp4", spec, threads=1))
    tee = TeeSink([recording, live])
    with caplog.at_level(logging.DEBUG):
        for chunk in np.split(movie(72), [60]):  # the first lasts long: the next must not come late
            tee.write(chunk)
            tee.flush_chunk()
        assert tee.finish() == tmp_path / "a.mp4"
    assert len(decode(tmp_path / "a.mp4").frames) == 72
    assert len(decode(tmp_path / "live.m3u8").frames) == 72
    absent = live.state.targets[0]
    assert (absent.sent, absent.dropped, absent.connections) == (0, 72, 0)
    assert "rtmp://127.0.0.1: Connection refused; next attempt in 1 s" in caplog.text
    assert "s3cret" not in caplog.text + repr(live.state)


def test_fast_generation_waits(tmp_path, movie):
    frames, began = movie(12), time.monotonic()
    sink = LiveSink([f"{tmp_path}/live.m3u8"], VideoSpec(96, 64, 12), latency=1, threads=1)
    for _ in range(3):
        sink.write(frames)
    took, state = time.monotonic() - began, sink.state
    sink.abort()
    assert took >= 1.8, "the last chunk waits, the others were shown"
    assert 0.1 <= state.blocked <= took


def test_slow_generation_repeats_and_says_so(tmp_path, decode, movie):
    sink = LiveSink([f"{tmp_path}/live.m3u8"], SPEC, pace=Pace.REPEAT, threads=1)
    for _ in range(4):
        sink.write(movie(6))
        time.sleep(0.25)
    sink.finish()
    state = sink.state
    assert state.ticks - state.repeated == 24
    assert state.repeated >= 12
    assert len(decode(tmp_path / "live.m3u8").frames) == state.ticks


def server(handle):
    """A TCP server on loopback that gives its connections to `handle`; returns its port."""
    listener = socket.create_server(("127.0.0.1", 0))

    def serve():
        while True:
            try:
                connection, _ = listener.accept()
            except OSError:
                return
            threading.Thread(target=handle, args=(connection,), daemon=True).start()

    threading.Thread(target=serve, daemon=True).start()
    return listener.getsockname()[1]


@pytest.mark.parametrize(
    ("answer", "match"),
    [
        (
            b"HTTP/1.1 400 Bad Request\r\n\r\n" * 200,
            r"answered with version 72, expected 3; is it an RTMP server",
        ),
        (b"", "closed the connection"),
        (
            b"\x03" + bytes(3072) + b"\xff" * 4000,
            "is it an RTMP server|closed the connection|does not answer",
        ),
        (None, "does not answer as an RTMP server does"),
    ],
)
def test_what_is_no_rtmp_server(answer, match):
    def handle(connection):
        connection.recv(1)
        if answer is None:
            time.sleep(2)
        else:
            connection.sendall(answer)
            connection.shutdown(socket.SHUT_WR)
            time.sleep(1)

    address = Address.parse(f"rtmp://127.0.0.1:{server(handle)}/live/s3cret")
    with pytest.raises(OutputError, match=match) as caught:
        RtmpConnection(address, connect_seconds=0.5)
    assert str(caught.value).startswith("rtmp://127.0.0.1: ")
    assert "s3cret" not in str(caught.value)


@pytest.fixture
def certificate(tmp_path):
    """A certificate for 127.0.0.1 that signs itself, with its key, in one file."""
    if not shutil.which("openssl"):
        pytest.skip("needs openssl")
    key, signed, both = (tmp_path / name for name in ("key.pem", "signed.pem", "both.pem"))
    names = ["-subj", "/CN=127.0.0.1", "-addext", "subjectAltName=IP:127.0.0.1"]
    command = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", *names]
    subprocess.run([*command, "-keyout", key, "-out", signed], check=True, capture_output=True)
    both.write_bytes(key.read_bytes() + signed.read_bytes())
    return both


def pump(source, sink):
    with contextlib.suppress(OSError):
        while data := source.recv(65536):
            sink.sendall(data)
        sink.shutdown(socket.SHUT_WR)


def test_rtmps(tmp_path, receiver, free_port, certificate, monkeypatch, decode, movie, eventually):
    """TLS ends in a proxy here; behind it ffmpeg speaks RTMP. Without trust in the certificate nothing is sent."""
    behind = free_port()
    receiver("-listen", 1, "-i", f"rtmp://127.0.0.1:{behind}/live/s3cret", "-c", "copy", tmp_path / "a.flv")
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate)

    def handle(plain):
        with contextlib.suppress(OSError), context.wrap_socket(plain, server_side=True) as outside:
            inside = socket.create_connection(("127.0.0.1", behind))
            threading.Thread(target=pump, args=(inside, outside), daemon=True).start()
            pump(outside, inside)

    url = f"rtmps://127.0.0.1:{server(handle)}/live/s3cret"
    with pytest.raises(OutputError, match="certificate verify failed") as caught:
        RtmpConnection(Address.parse(url), connect_seconds=2)
    assert "s3cret" not in str(caught.value)
    monkeypatch.setenv("SSL_CERT_FILE", str(certificate))
    sink = LiveSink([url], SPEC, threads=1)
    eventually(lambda: phases(sink) == [DeliveryPhase.LIVE])
    sink.write(movie(48))
    sink.finish()
    eventually(lambda: (tmp_path / "a.flv").exists() and len(decode(tmp_path / "a.flv").frames) == 48)


def test_rtmps_needs_a_certificate_that_holds():
    def handle(connection):
        connection.recv(1)
        connection.sendall(b"not TLS at all")
        connection.close()

    address = Address.parse(f"rtmps://127.0.0.1:{server(handle)}/live/s3cret")
    with pytest.raises(OutputError, match=r"^rtmps://127\.0\.0\.1: ") as caught:
        RtmpConnection(address, connect_seconds=2)
    assert "s3cret" not in str(caught.value)


def test_a_server_that_stops_reading(receiver, free_port, tmp_path, movie, eventually):
    """SIGSTOP closes its TCP window: generation goes on, queued frames are dropped, delivery resumes at a keyframe."""
    import signal

    url = f"rtmp://127.0.0.1:{free_port()}/live/s3cret"
    process = receiver("-listen", 1, "-i", url, "-c", "copy", "-f", "flv", tmp_path / "a.flv")
    sink = LiveSink([url], SPEC, latency=0.25, bits=40_000_000, threads=1)  # fills the socket's buffers soon
    eventually(lambda: phases(sink) == [DeliveryPhase.LIVE])
    sink.write(movie(12))
    eventually(lambda: sink.state.targets[0].sent >= 6)
    process.send_signal(signal.SIGSTOP)
    ticks, began = sink.state.ticks, time.monotonic()
    while not sink.state.targets[0].dropped and time.monotonic() - began < 60:
        sink.write(movie(12))
    target = sink.state.targets[0]
    assert target.dropped > 0
    assert target.queued <= 0.25
    assert sink.state.ticks >= ticks + 12, "generation and the schedule go on, server or not"
    process.send_signal(signal.SIGCONT)
    sent = target.sent
    began = time.monotonic()
    while sink.state.targets[0].sent < sent + 24 and time.monotonic() - began < 60:
        sink.write(movie(12))
    assert sink.state.targets[0].sent >= sent + 24
    assert sink.state.targets[0].connections == 1
    sink.abort()


def accepted(bound):
    """Bytes that go into a connection nobody reads from."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 32_768)
        with socket.create_connection(listener.getsockname()) as line, listener.accept()[0]:
            if bound is not None:
                bound_unsent(line, bound)
            line.settimeout(0.5)
            total = 0
            with contextlib.suppress(TimeoutError):
                while total < 50_000_000:
                    total += line.send(bytes(4096))
            return total


@pytest.mark.skipif(sys.platform != "linux", reason="what other systems do differs")
def test_little_waits_below_the_queue_for_a_server_that_stops_reading():
    """Else seconds, or minutes, of old video would be sent when it reads again."""
    free, bound = accepted(None), accepted(16_384)
    assert bound < free / 4
    assert accepted(65_536) - bound == pytest.approx(65_536 - 16_384, abs=32_768)


def test_refused_everywhere_is_an_error(monkeypatch, movie, eventually):
    def refuse(*_):
        raise RefusedError(
            "rtmp://127.0.0.1: refused: NetStream.Publish.BadName; check application and stream key"
        )

    monkeypatch.setattr("wanrt.output.live.connect", refuse)
    sink = LiveSink(["rtmp://127.0.0.1/live/s3cret"], SPEC, threads=1)
    eventually(lambda: phases(sink) == [DeliveryPhase.FAILED])
    with pytest.raises(OutputError, match=r"refused: NetStream\.Publish\.BadName; check"):
        sink.write(movie(1))
    sink.abort()


def test_an_encoder_failure_reaches_the_producer(monkeypatch, tmp_path, movie, eventually):
    sink = LiveSink([f"{tmp_path}/a.m3u8"], SPEC, threads=1)
    monkeypatch.setattr(sink._encoder, "encode", lambda *_, **__: 1 / 0)
    sink.write(movie(2))
    eventually(lambda: sink._error)
    with pytest.raises(OutputError, match="live encoder: division by zero"):
        sink.write(movie(2))
    with pytest.raises(OutputError, match="live encoder"):
        sink.finish()


def test_wrong_targets_are_usage_errors():
    with pytest.raises(UsageError, match="scheme 'http'"):
        LiveSink(["http://host/live/s3cret"], SPEC)


def test_default_bit_rate_grows_with_the_picture():
    assert default_bits(VideoSpec(224, 128, 8)) == 250_000
    assert default_bits(VideoSpec(832, 480, 16)) == pytest.approx(767_000, rel=0.01)


def test_open_outputs(tmp_path, decode, movie):
    sink = open_outputs([tmp_path / "a.mp4", f"{tmp_path}/a.m3u8", f"{tmp_path}/a.gif"], SPEC, quality=100)
    sink.write(movie(24))
    assert sink.finish() == tmp_path / "a.mp4"
    assert [len(decode(tmp_path / name).frames) for name in ("a.mp4", "a.m3u8", "a.gif")] == [24, 24, 24]


def test_open_outputs_is_all_or_nothing(tmp_path):
    with pytest.raises(UsageError, match="scheme 'ftp'"):
        open_outputs([tmp_path / "a.mp4", "ftp://host/live/s3cret"], SPEC)
    with pytest.raises(UsageError, match="stream key is missing"):
        open_outputs([tmp_path / "a.mp4", "rtmp://host/live"], SPEC)
    assert list(tmp_path.iterdir()) == []


def test_tee_leaves_out_what_fails(tmp_path, movie, caplog):
    spec = VideoSpec(96, 64, 16)
    good, bad = open_sink(tmp_path / "a.mp4", spec), open_sink(tmp_path / "b.gif", spec)
    tee = TeeSink([bad, good])
    tee.write(movie(3))
    bad.write = lambda _: (_ for _ in ()).throw(OutputError("b.gif: the disk is full"))
    tee.write(movie(3))
    with pytest.raises(OutputError, match=r"^b\.gif: the disk is full$"):
        tee.finish()
    assert (tmp_path / "a.mp4").exists()
    assert (tmp_path / "b.partial.gif").exists()
    assert "the other outputs go on" in caplog.text


def test_tee_of_nothing_left_raises(tmp_path, movie):
    sink = open_sink(tmp_path / "a.mp4", VideoSpec(96, 64, 16))
    tee = TeeSink([sink])
    sink.write = lambda _: (_ for _ in ()).throw(OutputError("a.mp4: gone"))
    with pytest.raises(OutputError, match=r"a\.mp4: gone"):
        tee.write(movie(1))
    with pytest.raises(OutputError, match="no target given"):
        TeeSink([])
