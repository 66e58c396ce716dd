"""The second way to make a file: raw frames through a pipe into imageio-ffmpeg's ffmpeg, for what PyAV
lacks."""

from __future__ import annotations

import logging
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import imageio_ffmpeg

from wanrt.errors import OutputError

from .encoder import ENCODERS, EncoderSettings
from .frames import to_block
from .movie import FragmentedSink
from .quality import Quality
from .spec import VideoSpec
from .target import Target

if TYPE_CHECKING:
    from .frames import Pixels

log = logging.getLogger("wanrt.output")

CLOSE_SECONDS = 60  # for the encoder's last frames, once its input has ended
BT709_FLAGS = (
    "-color_range",
    "tv",
    "-colorspace",
    "bt709",
    "-color_primaries",
    "bt709",
    "-color_trc",
    "bt709",
)


def bundled_ffmpeg() -> Path:
    """The ffmpeg that comes with imageio-ffmpeg.

    Raises:
        OutputError: when there is none.
    """
    try:
        return Path(imageio_ffmpeg.get_ffmpeg_exe())
    except RuntimeError as error:
        raise OutputError(f"no ffmpeg: {error}; reinstall imageio-ffmpeg") from error


def bundled_encoders(ffmpeg: Path) -> set[str]:
    """Names of the encoders that an ffmpeg has."""
    command = [str(ffmpeg), "-hide_banner", "-encoders"]
    listing = subprocess.run(command, capture_output=True, text=True, check=False)
    rows = (line.split() for line in listing.stdout.splitlines())
    return {row[1] for row in rows if len(row) > 1 and row[0].startswith("V")}


def choose_pipe_encoder(codec: str, spec: VideoSpec, quality: Quality) -> EncoderSettings:
    """The first software encoder of a codec that the bundled ffmpeg has; a log line says which.

    Raises:
        OutputError: when it has none.
    """
    crf, known = quality.crf(codec), bundled_encoders(bundled_ffmpeg())
    for kind in ENCODERS[codec]:
        if kind.name in known and not kind.hardware:
            log.info("encoding %s with %s at crf %g (imageio-ffmpeg's ffmpeg)", codec, kind.name, crf)
            return EncoderSettings(kind, spec, kind.options(crf))
    raise OutputError(f"no encoder for {codec} in PyAV or imageio-ffmpeg's ffmpeg; try --codec h264")


def pipe_command(ffmpeg: Path, settings: EncoderSettings, target: Path) -> list[str]:
    """ffmpeg's arguments: NV12 frames on stdin to a fragmented MP4, a fragment a frame."""
    spec = settings.spec
    size, rate = f"{spec.width}x{spec.height}", str(spec.fps)
    given = ["-f", "rawvideo", "-pix_fmt", "nv12", "-s", size, "-r", rate, *BT709_FLAGS, "-i", "pipe:0"]
    options = [word for key, value in settings.options.items() for word in (f"-{key}", value)]
    tags = [word for key, value in settings.metadata.items() for word in ("-metadata", f"{key}={value}")]
    encoder = ["-c:v", settings.kind.name, "-pix_fmt", "yuv420p", "-g", str(settings.gop), *BT709_FLAGS]
    threads = ["-threads", str(settings.thread_count)]
    muxer = ["-movflags", "empty_moov+default_base_moof+frag_every_frame", "-flush_packets", "1", "-f", "mp4"]
    quiet = ["-hide_banner", "-nostdin", "-loglevel", "error", "-y"]
    return [str(ffmpeg), *quiet, *given, *encoder, *options, *threads, *tags, *muxer, str(target)]


class PipeSink(FragmentedSink):
    """Encodes in an ffmpeg process.

    The process writes a fragment per frame, so after a SIGKILL of wanrt it sees the end of its input and
    completes the temporary file by itself; after its own death the file plays up to a frame before the last.
    """

    def __init__(
        self, target: Target, settings: EncoderSettings, tags: Mapping[str, str], *, force: bool = False
    ) -> None:
        super().__init__(target, settings.spec, tags, force)
        self._talk = tempfile.TemporaryFile()  # noqa: SIM115 (lives as long as the process)
        command = pipe_command(bundled_ffmpeg(), settings, self.temporary)
        self._process = self._start(command)

    def _start(self, command: Sequence[str]) -> subprocess.Popen[bytes]:
        try:  # a session of its own: Ctrl-C is for wanrt, which then closes the pipe
            return subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.DEVNULL,
                stderr=self._talk,
                start_new_session=True,
            )
        except OSError as error:
            raise OutputError(f"{command[0]}: cannot be started ({error.strerror})") from error

    def write(self, pixels: Pixels) -> None:
        """See `Sink.write`."""
        block = to_block(pixels, self.spec, self.pixel_format)
        assert self._process.stdin
        try:
            self._process.stdin.write(block.numpy().tobytes())
            self._process.stdin.flush()
        except (OSError, ValueError) as error:
            raise OutputError(f"{self.target.path}: {self._last_words()}") from error
        self.frames_written += len(block)

    def _last_words(self) -> str:
        """What the process said last, for the error."""
        try:
            code = self._process.wait(CLOSE_SECONDS)
        except subprocess.TimeoutExpired:
            return f"ffmpeg does not end within {CLOSE_SECONDS} s"
        self._talk.seek(0)
        lines = self._talk.read().decode(errors="replace").strip().splitlines()
        return f"ffmpeg ended with code {code}: {lines[-1] if lines else 'no message'}"

    def _close(self) -> None:
        assert self._process.stdin
        if self._process.returncode is not None:
            return
        try:
            self._process.stdin.close()
            code = self._process.wait(CLOSE_SECONDS)
        except (OSError, subprocess.TimeoutExpired) as error:
            raise OutputError(f"{self.target.path}: {self._last_words()}") from error
        if code:
            raise OutputError(f"{self.target.path}: {self._last_words()}")

    def _release(self) -> None:
        if self._process.poll() is None:
            self._process.kill()
            self._process.wait()
        self._talk.close()
