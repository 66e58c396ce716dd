"""A real browser for tests: a headless Chromium."""

import json
import os
import shutil
import subprocess

import numpy as np
import pytest

PIXELS = """(() => {
    const canvas = document.createElement('canvas'), video = document.querySelector('video');
    [canvas.width, canvas.height] = [video.videoWidth, video.videoHeight];
    const pen = canvas.getContext('2d');
    pen.drawImage(video, 0, 0);
    return Array.from(pen.getImageData(0, 0, canvas.width, canvas.height).data);
})()"""


class Chromium:
    """A headless Chromium, driven over a pipe with the DevTools protocol."""

    def __init__(self, profile):
        to_browser, commands = os.pipe()
        events, from_browser = os.pipe()
        flags = "--headless=new --no-sandbox --disable-gpu --disable-dev-shm-usage --no-first-run"
        flags += " --remote-debugging-pipe --disable-extensions --disable-background-networking --mute-audio"
        shell = f'exec chromium {flags} --user-data-dir="$0" about:blank 3<&{to_browser} 4>&{from_browser}'
        self.process = subprocess.Popen(
            ["bash", "-c", shell, str(profile)],
            pass_fds=(to_browser, from_browser),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        os.close(to_browser)
        os.close(from_browser)
        self._commands, self._events, self._buffer, self._number = commands, events, b"", 0
        self._session = {}

    def call(self, method, **parameters):
        self._number += 1
        message = {"id": self._number, "method": method, "params": parameters, **self._session}
        os.write(self._commands, json.dumps(message).encode() + b"\0")
        while True:
            while b"\0" not in self._buffer:
                data = os.read(self._events, 65536)
                assert data, "chromium has ended"
                self._buffer += data
            text, _, self._buffer = self._buffer.partition(b"\0")
            answer = json.loads(text)
            if answer.get("id") == self._number:
                assert "error" not in answer, answer
                return answer["result"]

    def visit(self, url):
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        self._session = {"sessionId": session}
        self.call("Page.navigate", url=url)

    def run(self, script):
        answer = self.call("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in answer, answer
        return answer["result"].get("value")

    def picture(self):
        """What the page's video shows now: RGBA values, one after the other."""
        return np.array(self.run(PIXELS))

    def close(self):
        self.process.kill()
        self.process.wait()
        os.close(self._commands)
        os.close(self._events)


@pytest.fixture
def chromium(tmp_path):
    if not shutil.which("chromium"):
        pytest.skip("needs chromium")
    browser = Chromium(tmp_path / "profile")
    yield browser
    browser.close()
