"""A real RTMP server for tests: nginx with libnginx-mod-rtmp, on loopback, that can be stopped and started again."""

import shutil
import socket
import subprocess
import time
from pathlib import Path

import pytest

MODULE = Path("/usr/lib/nginx/modules/ngx_rtmp_module.so")
CONFIGURATION = """
load_module {module};
daemon off; master_process off; pid {place}/pid; error_log {place}/error.log info;
events {{ worker_connections 64; }}
rtmp {{ server {{
    listen 127.0.0.1:{port}; chunk_size 4096; ping 1s;
    application live {{ live on; hls on; hls_path {place}/hls; hls_fragment 1s; hls_playlist_length 60s; }}
    application closed {{ live on; deny publish all; }}
}} }}
"""
KEY = "s3cret"


class Nginx:
    """A server that can be stopped and started at the same port."""

    def __init__(self, place, port):
        self.place, self.port, self.process = place, port, None
        (place / "hls").mkdir()
        text = CONFIGURATION.format(module=MODULE, place=place, port=port)
        (place / "nginx.conf").write_text(text)

    def start(self):
        command = ["nginx", "-p", self.place, "-c", self.place / "nginx.conf", "-e", self.place / "error.log"]
        self.process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)

    def stop(self):
        if self.process:
            self.process.kill()
            self.process.wait()

    def wait(self):
        """Until it takes connections."""
        deadline = time.monotonic() + 60
        while True:
            try:
                socket.create_connection(("127.0.0.1", self.port), 1).close()
                return
            except OSError:
                assert time.monotonic() < deadline, (self.place / "error.log").read_text()[-500:]
                time.sleep(0.02)

    def url(self, app="live"):
        return f"rtmp://127.0.0.1:{self.port}/{app}/{KEY}"

    @property
    def playlist(self):
        return self.place / "hls" / f"{KEY}.m3u8"

    def whole(self):
        """What there is of the HLS stream, as a playlist that has an end: ffmpeg would wait for more."""
        path = self.playlist.with_name("whole.m3u8")
        path.write_text(self.playlist.read_text() + "#EXT-X-ENDLIST\n")
        return path


@pytest.fixture
def nginx(tmp_path):
    if not shutil.which("nginx") or not MODULE.exists():
        pytest.skip("needs nginx and libnginx-mod-rtmp (apt install libnginx-mod-rtmp)")
    place = tmp_path / "nginx"
    place.mkdir()
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    server = Nginx(place, port)
    yield server
    server.stop()
