"""The live page: its requests one by one, then all of it in a headless Chromium."""

import http.client
import json
import logging
import threading
import time
from urllib.parse import urlsplit

import numpy as np
import pytest

from wanrt.errors import OutputError, UsageError
from wanrt.output import VideoSpec, open_outputs
from wanrt.output.feed import Reader
from wanrt.output.live import LiveSink
from wanrt.output.serve import PageServer, is_loopback

SPEC = VideoSpec(96, 64, 24)


class Session:
    """What a stream session would be to the page."""

    def __init__(self):
        self.said = []

    def say(self, text, blend):
        if text == "refused":
            raise UsageError("prompt: got 'refused', expected another")
        self.said.append((text, blend))
        return 7

    def stats(self):
        return {"fps": 8.5, "prompt": "<b>a ball</b>", "chunk": len(self.said)}


@pytest.fixture
def session():
    return Session()


@pytest.fixture
def page(session):
    server = PageServer(session.say, session.stats)
    yield server
    server.close()


@pytest.fixture
def ask(page):
    """Send a request to a path below the token; gives (status, body, headers)."""

    def asked(path, body=None, *, method=None, headers=None, whole=False):
        place = urlsplit(page.url)
        connection = http.client.HTTPConnection(place.hostname, place.port, timeout=30)
        kind = {"Content-Type": "application/json"} if body is not None else {}
        data = body if body is None or isinstance(body, bytes) else json.dumps(body)
        where = path if whole else place.path + path
        connection.request(method or ("GET" if body is None else "POST"), where, data, kind | (headers or {}))
        answer = connection.getresponse()
        return answer.status, answer.read(), answer.headers

    return asked


@pytest.fixture
def streaming(page, movie):
    """Stream to the page until the test ends."""
    sink = LiveSink([page], SPEC, threads=1)
    stop = threading.Event()

    def generate():
        frames = movie(48)
        while not stop.is_set():
            sink.write(frames)

    thread = threading.Thread(target=generate)
    thread.start()
    yield sink
    stop.set()
    thread.join(60)
    sink.abort()


def test_files_of_the_page(ask):
    for name, kind in (("", "text/html"), ("page.js", "text/javascript"), ("page.css", "text/css")):
        status, body, headers = ask(name)
        assert (status, headers.get_content_type()) == (200, kind)
        assert len(body) > 500
        assert headers["Referrer-Policy"] == "no-referrer"
        assert "default-src 'self'" in headers["Content-Security-Policy"]
        assert b"http://" not in body, "nothing from outside"
        assert b"https://" not in body


def test_without_the_token_there_is_nothing(page, ask):
    token = urlsplit(page.url).path.strip("/")
    assert len(token) >= 20
    for path in (
        "/",
        "/stats",
        "/stream",
        f"/{token}x/",
        f"/{token[:-1]}/",
        "//",
        "/%e9/",
        f"/x/{token}/stats",
    ):
        status, body, _ = ask(path, whole=True)
        assert status == 404, path
        assert token.encode() not in body
    assert ask("/say", {"text": "x"}, whole=True)[0] == 404
    assert ask(f"/{token}", whole=True)[0] == 308


def test_names_are_no_paths(ask):
    for name in ("../serve.py", "%2e%2e/serve.py", "index.html/../../serve.py", "nothing", "/etc/passwd"):
        assert ask(name)[0] == 404


def test_tokens_differ_and_are_not_logged(session, ask, page, caplog):
    with caplog.at_level(logging.DEBUG):
        other = PageServer(session.say, session.stats)
        ask("stats")
        ask("nothing")
        other.close()
    assert other.url != page.url
    for server in (page, other):
        assert urlsplit(server.url).path.strip("/") not in caplog.text + str(server.address) + repr(
            server.address
        )


def test_say(ask, session):
    status, body, _ = ask("say", {"text": "  a green star \u2605 ", "blend": 2})
    assert (status, json.loads(body)) == (200, {"chunk": 7})
    ask("say", {"text": "next"})
    ask("say", {"text": "now", "blend": 0})
    assert session.said == [("a green star \u2605", 2.0), ("next", None), ("now", 0.0)]


@pytest.mark.parametrize(
    ("body", "headers", "status"),
    [
        (b"not json", {}, 400),
        (b"\xff\xfe", {}, 400),
        (b"[" * 60000, {}, 400),
        (["text"], {}, 400),
        ({"text": 5}, {}, 400),
        ({"text": "  "}, {}, 400),
        ({"text": "x", "blend": "2"}, {}, 400),
        ({"text": "x", "blend": -1}, {}, 400),
        ({"text": "x", "blend": True}, {}, 400),
        (b'{"text": "x", "blend": NaN}', {}, 400),
        (b'{"text": "x", "blend": 1e999}', {}, 400),
        ({"text": "x" * 70_000}, {}, 413),
        ({"text": "x"}, {"Content-Type": "text/plain"}, 415),
        ({"text": "refused"}, {}, 422),
    ],
)
def test_bad_prompts_are_refused_with_words(ask, session, body, headers, status):
    got, answer, _ = ask("say", body, headers=headers)
    assert got == status
    assert json.loads(answer)["error"]
    assert session.said == []


def test_stats_and_info(ask):
    assert json.loads(ask("stats")[1]) == {"fps": 8.5, "prompt": "<b>a ball</b>", "chunk": 0, "viewers": 0}
    assert json.loads(ask("info")[1]) == {}
    assert ask("stream")[0] == 503


def test_the_stream_is_a_video_that_begins_at_once(page, ask, streaming, eventually, tmp_path, decode):
    eventually(lambda: json.loads(ask("info")[1]))
    info = json.loads(ask("info")[1])
    assert (info["width"], info["height"], info["fps"]) == (96, 64, 24.0)
    assert info["codec"].startswith('video/mp4; codecs="avc1.64')
    place = urlsplit(page.url)
    connection = http.client.HTTPConnection(place.hostname, place.port, timeout=30)
    connection.request("GET", place.path + "stream")
    answer = connection.getresponse()
    assert answer.getheader("Content-Type") == "video/mp4"
    data = b""
    while len(data) < 60_000:
        data += answer.read1(65536)
    assert json.loads(ask("stats")[1])["viewers"] == 1
    connection.close()
    path = tmp_path / "a.mp4"
    path.write_bytes(data)
    got = decode(path)
    assert len(got.frames) >= 12
    steps = {b - a for a, b in zip(got.starts, got.starts[1:], strict=False)}
    assert steps <= {got.starts[1] - got.starts[0]}
    eventually(lambda: json.loads(ask("stats")[1])["viewers"] == 0)


def test_closing_ends_viewers(session, movie, eventually):
    page = PageServer(session.say, session.stats)
    sink = open_outputs([], SPEC, page=page)
    sink.write(movie(4))
    eventually(lambda: page.feed)
    answers = []

    def watch():
        place = urlsplit(page.url)
        connection = http.client.HTTPConnection(place.hostname, place.port, timeout=30)
        connection.request("GET", place.path + "stream")
        answers.append(connection.getresponse().read())

    thread = threading.Thread(target=watch)
    thread.start()
    eventually(lambda: page.feed.readers)
    sink.finish()
    page.close()
    thread.join(60)
    assert answers
    assert answers[0].startswith(b"\0\0\0")


def test_a_reader_that_is_too_slow_goes_on_at_a_keyframe():
    reader = Reader(limit=3)
    assert reader.offer(b"early", False)
    assert [reader.offer(b"%d" % n, n == 0) for n in range(4)] == [True, True, True, False]
    assert reader.offer(b"4", False), "asked for once"
    reader.offer(b"K", True)
    reader.offer(b"5", False)
    reader.end()
    assert list(reader) == [b"K5"]


def test_where_it_listens(session, caplog):
    assert is_loopback("127.0.0.1")
    assert is_loopback("::1")
    assert is_loopback("localhost")
    assert not is_loopback("0.0.0.0")
    assert not is_loopback("example.org")
    first = PageServer(session.say, session.stats)
    port = urlsplit(first.url).port
    with pytest.raises(OutputError, match=rf"cannot listen at 127\.0\.0\.1:{port} .*choose another port"):
        PageServer(session.say, session.stats, port=port)
    with pytest.raises(OutputError, match="cannot listen at"):
        PageServer(session.say, session.stats, port=99999)
    first.close()
    with caplog.at_level(logging.WARNING):
        PageServer(session.say, session.stats, host="0.0.0.0").close()
    assert "everybody there who knows the address" in caplog.text


def test_in_chromium_the_video_plays_and_a_typed_prompt_arrives(
    chromium, page, session, streaming, eventually
):
    chromium.visit(page.url)
    eventually(
        lambda: chromium.run("document.readyState === 'complete' && !!document.querySelector('video')")
    )
    if not chromium.run("MediaSource.isTypeSupported('video/mp4; codecs=\"avc1.64000c\"')"):
        pytest.skip("this chromium plays no H.264")
    eventually(lambda: chromium.run("document.querySelector('video').currentTime > 0"))
    before = chromium.run("document.querySelector('video').currentTime")
    eventually(lambda: chromium.run("document.querySelector('video').currentTime") > before + 1)
    size = "(v => [v.videoWidth, v.videoHeight])(document.querySelector('video'))"
    assert chromium.run(size) == [96, 64]
    first = chromium.picture()
    time.sleep(0.5)
    second = chromium.picture()
    assert first.std() > 20, "a picture, not a black box"
    assert np.abs(first - second).mean() > 1, "that moves"
    behind = "(v => v.buffered.end(v.buffered.length - 1) - v.currentTime)(document.querySelector('video'))"
    eventually(lambda: chromium.run(behind) < 1.5)
    type_and_send = """document.getElementById('prompt').value = 'a green star \u2605';
        document.getElementById('blend').value = '2.5';
        document.getElementById('say').click()"""
    chromium.run(type_and_send)
    eventually(lambda: session.said == [("a green star \u2605", 2.5)])
    eventually(lambda: "from chunk 7" in chromium.run("document.getElementById('said').textContent"))
    eventually(lambda: "viewers1" in chromium.run("document.getElementById('stats').textContent"))
    assert "<b>a ball</b>" in chromium.run("document.getElementById('stats').textContent"), (
        "text, never markup"
    )
