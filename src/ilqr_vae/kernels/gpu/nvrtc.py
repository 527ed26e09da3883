"""Compiles CUDA C++ while running (NVRTC), and launches it by the driver.

Both come with ``cuda-bindings``, which torch's CUDA builds bring along. Machine code is kept on
disk, as that of the CPU's kernels is.
"""

from __future__ import annotations

import ctypes
import hashlib
import logging
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from ilqr_vae.kernels.cache import cache_folder

_log = logging.getLogger(__name__)

_OPTIONS = ("--std=c++17",)


class NoKernelError(RuntimeError):
    """A kernel cannot be had: no driver, no compiler, or a problem too large for a block."""


@cache
def _bindings() -> tuple[Any, Any]:
    try:
        from cuda.bindings import driver, nvrtc
    except ImportError as error:
        raise NoKernelError(f"cuda-bindings cannot be imported ({error})") from error
    return driver, nvrtc


def _checked(answer: tuple[Any, ...]) -> Any:
    """What a call of the bindings answers, without its status. Raises NoKernelError."""
    status, *rest = answer
    if int(status) != 0:
        raise NoKernelError(f"{type(status).__name__}: {status.name}")
    return rest[0] if len(rest) == 1 else tuple(rest)


def compile_source(source: str, architecture: str, *more: str) -> bytes:
    """Machine code of CUDA C++ for an architecture such as sm_90; needs no GPU.

    Args:
        more: options of NVRTC.

    Raises:
        NoKernelError: there is no NVRTC, or it refuses the source.
    """
    _, nvrtc = _bindings()
    try:
        program = _checked(nvrtc.nvrtcCreateProgram(source.encode(), b"step.cu", 0, [], []))
    except RuntimeError as error:  # where the library is not there, the bindings raise theirs
        raise NoKernelError(f"no NVRTC ({error})") from error
    options = [o.encode() for o in (f"--gpu-architecture={architecture}", *_OPTIONS, *more)]
    (status,) = nvrtc.nvrtcCompileProgram(program, len(options), options)
    if int(status) != 0:
        said = b" " * _checked(nvrtc.nvrtcGetProgramLogSize(program))
        _checked(nvrtc.nvrtcGetProgramLog(program, said))
        raise NoKernelError(f"NVRTC: {said.decode(errors='replace').strip()[:2000]}")
    code = b" " * _checked(nvrtc.nvrtcGetCUBINSize(program))
    _checked(nvrtc.nvrtcGetCUBIN(program, code))
    _checked(nvrtc.nvrtcDestroyProgram(program))
    return code


def _compiled(source: str, architecture: str) -> bytes:
    """``compile_source``, from disk where it was compiled before."""
    _, nvrtc = _bindings()
    version = _checked(nvrtc.nvrtcVersion())
    name = hashlib.sha256(repr((source, architecture, version, _OPTIONS)).encode()).hexdigest()
    folder = cache_folder(Path(__file__).parent)
    file = None if folder is None else folder / f"{name[:32]}.cubin"
    if file is not None and file.exists():
        return file.read_bytes()
    code = compile_source(source, architecture)
    if file is not None:
        with suppress(OSError):
            part = file.with_suffix(f".{id(code)}")
            part.write_bytes(code)
            part.replace(file)
    return code


class Kernel:
    """The kernel ``horizon_step`` of a source, on the current CUDA device.

    Args:
        source: with the kernel, and its ``sizes``.
        threads: of a block.

    Attributes:
        window: bytes of global memory that a block needs.
        multiprocessors: of the device.
        resident: blocks that the device runs at once.

    Raises:
        NoKernelError: it cannot be compiled, or a block does not fit.
    """

    def __init__(self, source: str, threads: int) -> None:
        driver, _ = _bindings()
        device = _checked(driver.cuCtxGetDevice())
        attribute = driver.CUdevice_attribute

        def about(name: str) -> int:
            which = getattr(attribute, f"CU_DEVICE_ATTRIBUTE_{name}")
            return int(_checked(driver.cuDeviceGetAttribute(which, device)))

        major, minor = (about(f"COMPUTE_CAPABILITY_{part}") for part in ("MAJOR", "MINOR"))
        code = _compiled(source, f"sm_{major}{minor}")
        self._threads, self._driver = threads, driver
        self._module = _checked(driver.cuModuleLoadData(code))
        self._function = _checked(driver.cuModuleGetFunction(self._module, b"horizon_step"))
        place, size = _checked(driver.cuModuleGetGlobal(self._module, b"sizes"))
        sizes = np.empty(2, np.int64)
        _checked(driver.cuMemcpyDtoH(sizes.ctypes.data, place, size))
        self._shared, self.window = (int(x) for x in sizes)
        largest = about("MAX_SHARED_MEMORY_PER_BLOCK_OPTIN")
        if self._shared > largest:
            raise NoKernelError(f"a block needs {self._shared} bytes of shared memory of {largest}")
        dynamic = driver.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
        _checked(driver.cuFuncSetAttribute(self._function, dynamic, self._shared))
        self.multiprocessors = about("MULTIPROCESSOR_COUNT")
        each = driver.cuOccupancyMaxActiveBlocksPerMultiprocessor(
            self._function, threads, self._shared
        )
        self.resident = self.multiprocessors * max(1, int(_checked(each)))

    def launch(self, argument: bytes, blocks: int, stream: int) -> None:
        """Launch on a stream; the argument is copied.

        Raises:
            NoKernelError: the driver refuses, or an earlier launch failed.
        """
        kept = ctypes.create_string_buffer(argument, len(argument))
        pointers = (ctypes.c_void_p * 1)(ctypes.addressof(kept))
        _checked(
            self._driver.cuLaunchKernel(
                self._function, blocks, 1, 1, self._threads, 1, 1, self._shared, stream,
                ctypes.addressof(pointers), 0,
            )
        )  # fmt: skip
