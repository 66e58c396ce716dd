"""CUDA C++ at run time: compiled by the NVRTC that PyTorch brings, launched on PyTorch's streams.

For what Triton cannot say (matrix tiles of 96 columns). Nothing here needs a compiler or headers on the machine.
"""

from __future__ import annotations

import ctypes
import importlib.util
import os
from collections.abc import Iterator, Sequence
from functools import cache
from pathlib import Path

import torch

OPTIONS = ("--std=c++17",)  # of every compilation
MAX_DYNAMIC_SHARED = 8  # CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES


class NvrtcError(RuntimeError):
    """A library that is missing, or a source that does not compile."""


@cache
def nvrtc() -> ctypes.CDLL:
    """The compiler's library. Raises `NvrtcError` when there is none."""
    majors = ("13", "12") if torch.version.cuda is None else (torch.version.cuda.split(".")[0],)
    for name in (f"libnvrtc.so.{major}" for major in majors):
        for folder in (None, *_folders()):
            try:
                return _open(name, folder)
            except OSError:
                continue
    raise NvrtcError("NVRTC is not installed; it comes with PyTorch's CUDA builds")


def _open(name: str, folder: Path | None) -> ctypes.CDLL:
    if folder is None:
        return ctypes.CDLL(name)
    # it looks for its builtins by name only: they must be there before
    for builtins in folder.glob("libnvrtc-builtins.so*"):
        ctypes.CDLL(str(builtins), mode=ctypes.RTLD_GLOBAL)
    return ctypes.CDLL(str(folder / name))


def _folders() -> Iterator[Path]:
    """Where PyTorch's wheels and CUDA's own installer put it."""
    spec = importlib.util.find_spec("nvidia")
    for root in [] if spec is None else spec.submodule_search_locations or []:
        yield from sorted(Path(root).glob("*/lib"), reverse=True)
    yield Path(os.environ.get("CUDA_HOME", "/usr/local/cuda"), "lib64")


@cache
def driver() -> ctypes.CDLL:
    """The driver's library. Raises `NvrtcError` when there is none."""
    try:
        return ctypes.CDLL("libcuda.so.1")
    except OSError as error:
        raise NvrtcError(f"no CUDA driver: {error}") from error


@cache
def version() -> str:
    """The compiler's, as in "13.0". Raises `NvrtcError` when there is none."""
    major, minor = ctypes.c_int(), ctypes.c_int()
    _compiled(nvrtc().nvrtcVersion(ctypes.byref(major), ctypes.byref(minor)))
    return f"{major.value}.{minor.value}"


def compile_cubin(source: str, architecture: str) -> bytes:
    """Machine code of a CUDA C++ source for one architecture (`sm_90a`). Raises `NvrtcError` with the log's end."""
    library, program = nvrtc(), ctypes.c_void_p()
    _compiled(library.nvrtcCreateProgram(ctypes.byref(program), source.encode(), b"kernel.cu", 0, None, None))
    try:
        options = [option.encode() for option in (f"--gpu-architecture={architecture}", *OPTIONS)]
        result = library.nvrtcCompileProgram(
            program, len(options), (ctypes.c_char_p * len(options))(*options)
        )
        if result:
            log = _bytes(library.nvrtcGetProgramLogSize, library.nvrtcGetProgramLog, program)
            raise NvrtcError(f"NVRTC: {log.rstrip(chr(0).encode()).decode(errors='replace')[-2000:]}")
        return _bytes(library.nvrtcGetCUBINSize, library.nvrtcGetCUBIN, program)
    finally:
        library.nvrtcDestroyProgram(ctypes.byref(program))


def _compiled(result: int) -> None:
    if result:
        raise NvrtcError(f"NVRTC: error {result}")


def _bytes(size_of: ctypes._CFuncPtr, content_of: ctypes._CFuncPtr, program: ctypes.c_void_p) -> bytes:  # type: ignore[name-defined]
    size = ctypes.c_size_t()
    _compiled(size_of(program, ctypes.byref(size)))
    content = ctypes.create_string_buffer(size.value)
    _compiled(content_of(program, content))
    return content.raw


def check(result: int) -> None:
    """Raise `NvrtcError` with the driver's own words for a result that is not success."""
    if result:
        words = ctypes.c_char_p()
        driver().cuGetErrorString(result, ctypes.byref(words))
        raise NvrtcError(f"CUDA driver: {(words.value or b'unknown error').decode()} ({result})")


class Function:
    """A kernel of a loaded module, on the device that was current when it was loaded."""

    def __init__(self, cubin: bytes, name: str, shared_bytes: int) -> None:
        torch.cuda.current_stream()  # PyTorch makes the device's context
        self._module, self._function = ctypes.c_void_p(), ctypes.c_void_p()
        self._shared = shared_bytes
        check(driver().cuModuleLoadData(ctypes.byref(self._module), cubin))
        check(driver().cuModuleGetFunction(ctypes.byref(self._function), self._module, name.encode()))
        check(driver().cuFuncSetAttribute(self._function, MAX_DYNAMIC_SHARED, shared_bytes))

    def __call__(
        self, blocks: int, threads: int, arguments: Sequence[ctypes._SimpleCData | ctypes.Array]
    ) -> None:
        """Launch on the current stream; arguments as ctypes values, passed as they are."""
        pointers = (ctypes.c_void_p * len(arguments))(*(ctypes.addressof(value) for value in arguments))
        stream = ctypes.c_void_p(torch.cuda.current_stream().cuda_stream)
        check(
            driver().cuLaunchKernel(
                self._function, blocks, 1, 1, threads, 1, 1, self._shared, stream, pointers, None
            )
        )
