"""Read a video with the bundled ffmpeg and compare what it holds with what was ordered."""

import argparse
import subprocess
import sys

import imageio_ffmpeg
import numpy as np


def decode(path: str, width: int, height: int) -> np.ndarray:
    """All frames as uint8 `[T, H, W, 3]`; ffmpeg's complaints end the program."""
    command = [
        imageio_ffmpeg.get_ffmpeg_exe(),
        "-v",
        "error",
        "-i",
        path,
        "-f",
        "rawvideo",
        "-pix_fmt",
        "rgb24",
        "-",
    ]
    ran = subprocess.run(command, capture_output=True, check=True)
    if ran.stderr:
        sys.exit(f"{path}: {ran.stderr.decode()}")
    return np.frombuffer(ran.stdout, np.uint8).reshape(-1, height, width, 3)


def main() -> None:
    """Exit with a message unless the file is as ordered and shows something that moves."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("path")
    parser.add_argument("--frames", type=int, required=True)
    parser.add_argument("--size", required=True)
    parser.add_argument("--fps", type=float, required=True)
    wanted = parser.parse_args()
    width, height = map(int, wanted.size.split("x"))
    frames = decode(wanted.path, width, height)
    about = imageio_ffmpeg.read_frames(wanted.path).__next__()
    got = (len(frames), about["size"], about["fps"])
    if got != (wanted.frames, (width, height), wanted.fps):
        sys.exit(f"{wanted.path}: got frames, size, fps {got}")
    motion = np.abs(np.diff(frames.astype(np.int16), axis=0)).mean()
    if frames.std() < 5 or motion < 0.1:
        sys.exit(
            f"{wanted.path}: a still or empty picture (deviation {frames.std():.1f}, motion {motion:.2f})"
        )
    print(f"{wanted.path}: {got[0]} frames of {width}x{height} at {got[2]:g} fps, motion {motion:.1f}")


if __name__ == "__main__":
    main()
