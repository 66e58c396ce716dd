"""File names: which container and codec they mean, whether they may be written, and the temporary name
beside them."""

from __future__ import annotations

import logging
import os
import re
import secrets
from dataclasses import dataclass
from pathlib import Path

import psutil

from wanrt.errors import OutputError, UsageError

log = logging.getLogger("wanrt.output")

# container -> codecs it takes, the default first
CONTAINER_CODECS: dict[str, tuple[str, ...]] = {
    "mp4": ("h264", "hevc", "av1"),
    "mov": ("h264", "hevc"),
    "mkv": ("h264", "hevc", "av1", "vp9"),
    "webm": ("vp9", "av1"),
    "gif": ("gif",),
    "png": ("png",),
}
CODEC_ALIASES = {"avc": "h264", "x264": "h264", "h265": "hevc", "x265": "hevc"}
FRAME_NUMBER = re.compile(r"%0?(\d*)d")
PART_NAME = re.compile(r"^\.(?P<name>.+)\.(?P<pid>\d+)-[0-9a-f]{6}\.part\.\w+$")


@dataclass(frozen=True)
class Target:
    """Where a video goes and as what.

    Attributes:
        path: the file, or for PNG the pattern of the frames' names (with one `%05d`-like field).
        container: one of `CONTAINER_CODECS`.
        codec: one of its codecs.
    """

    path: Path
    container: str
    codec: str

    @classmethod
    def parse(cls, path: str | os.PathLike[str], codec: str | None = None) -> Target:
        """Read a name: `.mp4 .mov .mkv .webm .gif`, `frame_%05d.png`, or a directory ending in / (PNG
        frames).

        Raises:
            UsageError: for an unknown extension or codec, or a codec that the container does not take.
        """
        text = os.fspath(path)
        if text.endswith("/"):
            text += "frame_%05d.png"
        target = Path(text).expanduser()
        container = target.suffix.lower().lstrip(".")
        if container not in CONTAINER_CODECS:
            allowed = " ".join(f".{name}" for name in CONTAINER_CODECS)
            got = repr(target.suffix) if target.suffix else "none"
            raise UsageError(f"{path}: extension {got}, expected {allowed}, or a directory ending in /")
        if container == "png" and len(FRAME_NUMBER.findall(target.name)) != 1:
            raise UsageError(
                f"{path}: a PNG sequence needs one frame number in its name, such as {target.stem}_%05d.png"
            )
        return cls(target, container, _codec_for(container, codec))

    @property
    def name(self) -> str:
        """The last part of the path."""
        return self.path.name

    def frame_path(self, index: int) -> Path:
        """The file of frame `index` (from 1, as image sequences are numbered) of a PNG sequence."""
        before, width, after = self._frame_name()
        return self.path.with_name(f"{before}{index:0{width}d}{after}")

    def frames_on_disk(self) -> dict[int, Path]:
        """The sequence's frames that exist, by number."""
        before, _, after = self._frame_name()
        pattern = re.compile(re.escape(before) + r"(\d+)" + re.escape(after))
        found = {}
        for file in self.path.parent.iterdir() if self.path.parent.is_dir() else ():
            if match := pattern.fullmatch(file.name):
                found[int(match[1])] = file
        return found

    def _frame_name(self) -> tuple[str, int, str]:
        """Text before the frame number, its digits (0: as many as it takes), text after."""
        match = FRAME_NUMBER.search(self.name)
        assert match, "parse has looked for it"
        return self.name[: match.start()], int(match[1] or 0), self.name[match.end() :]

    def temporary(self, suffix: str) -> Path:
        """A hidden name in the same directory, unique to this process: `.NAME.PID-XXXXXX.part.SUFFIX`."""
        return self.path.with_name(f".{self.name[:120]}.{os.getpid()}-{secrets.token_hex(3)}.part.{suffix}")

    def partial(self, suffix: str) -> Path:
        """A free visible name for what is kept after a failure: `STEM.partial.SUFFIX`, then
        `STEM.partial-2`..."""
        for number in range(1, 1000):
            count = f"-{number}" if number > 1 else ""
            path = self.path.with_name(f"{self.path.stem}.partial{count}.{suffix}")
            if not path.exists():
                return path
        raise OutputError(f"{self.path}: 1000 partial files beside it; remove some")


def _codec_for(container: str, codec: str | None) -> str:
    allowed = CONTAINER_CODECS[container]
    if codec in (None, "", "auto") or container in ("gif", "png"):
        return allowed[0]
    name = CODEC_ALIASES.get(str(codec).lower(), str(codec).lower())
    if name not in allowed:
        raise UsageError(f"codec: got {codec!r}, expected {' or '.join(allowed)} for .{container}")
    return name


def check_target(path: str | os.PathLike[str], force: bool = False, codec: str | None = None) -> Target:
    """Find out before any model loads whether a video can be written there. Creates nothing that stays.

    Raises:
        UsageError: the name is not understood, the codec does not fit, or the file exists and `force` is not
        given, the directory is missing or is not one. OutputError: it cannot be written.
    """
    target = Target.parse(path, codec)
    _check_directory(target)
    if target.path.is_dir():
        raise UsageError(
            f"{path}: is a directory; for PNG frames write {path}/, for a video name a file in it"
        )
    if not force:
        refuse_existing(target)
    return target


def refuse_existing(target: Target) -> None:
    """Raise UsageError when the file, or a frame of the sequence, is already there."""
    if target.container == "png":
        if frames := target.frames_on_disk():
            raise UsageError(f"{target.path}: {len(frames)} such frames exist; --force replaces them")
    elif target.path.exists():
        raise UsageError(f"{target.path}: exists; --force replaces it, -o names another file")


def _check_directory(target: Target) -> None:
    directory = target.path.parent
    if target.container == "png" and not directory.exists():  # made at open, as its user expects of DIR/
        directory = next(parent for parent in directory.absolute().parents if parent.exists())
    if not directory.exists():
        raise UsageError(f"{directory}: no such directory; create it with mkdir -p")
    if not directory.is_dir():
        raise UsageError(f"{directory}: is a file, expected a directory to write {target.name} in")
    trial = directory / f".{secrets.token_hex(6)}.wanrt"
    try:  # os.access knows neither read-only mounts nor quotas
        trial.touch(exist_ok=False)
        trial.unlink()
    except OSError as error:
        raise OutputError(
            f"{directory}: cannot write there ({error.strerror}); choose another directory"
        ) from error


def report_leftovers(target: Target) -> None:
    """Say which temporary files of killed runs lie beside the target; they play, and only their owner may
    drop them."""
    for file in target.path.parent.glob(f".{_glob_escaped(target.name[:120])}.*.part.*"):
        match = PART_NAME.match(file.name)
        if match and not psutil.pid_exists(int(match["pid"])):
            log.warning("%s: left by a run that was killed; it plays up to its last chunk", file)


def _glob_escaped(name: str) -> str:
    return re.sub(r"([*?\[])", r"[\1]", name)
