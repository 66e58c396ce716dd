"""wanrt: live video from prompts with causal Wan2.1 models, on one to eight GPUs."""

from importlib.metadata import PackageNotFoundError, version

try:
    __version__ = version("wanrt")
except PackageNotFoundError:  # a source tree that was never installed
    __version__ = "0+unknown"
