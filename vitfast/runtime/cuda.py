"""Kernels of csrc/cuda: compiled at their first use, kept on the disk, launched on torch's stream.

NVRTC compiles them for the GPU that is there: torch's CUDA wheels bring it, and `cuda-bindings`,
which calls it and the driver, so that nobody needs a CUDA toolkit. `csrc/README.md` says why not
nvcc. What is compiled lies in `cuda` of the user's cache folder, by a hash of all that it depends
on.

A kernel takes one structure of arguments, which a `Launch` describes as `struct` does, with tensors
for pointers.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import importlib.util
import struct
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch

from vitfast.errors import BackendUnavailableError
from vitfast.runtime.files import whole_file
from vitfast.settings import cache_folder, logger, settings

TYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
"""`enum Type` of csrc/cuda/intrinsics.h."""
NAMES = {torch.float32: "f32", torch.bfloat16: "bf16", torch.float16: "f16"}
"""What kernels are called by."""
_IN_C = {torch.float32: "float", torch.bfloat16: "bfloat16", torch.float16: "half"}
MOST_SHARED = 48 << 10
"""Bytes of shared memory that a block has on every GPU without asking for more."""
OLDEST = 75
"""Compute capability, major and minor, from which on there is a kernel."""


class Launch(NamedTuple):
    """One launch.

    Args:
        source: name of a file of csrc/cuda, without its suffix.
        kernel: name of a kernel in it.
        defines: macros that leave the kernels of one dtype and size to be compiled.
        blocks, threads: of the grid, and of a block.
        shared: bytes of dynamic shared memory a block, at most `MOST_SHARED`.
        layout: the kernel's structure as `struct` has it, "P" for pointers.
        values: its fields; a tensor or None for a pointer.
    """

    source: str
    kernel: str
    defines: tuple[str, ...]
    blocks: int
    threads: int
    shared: int
    layout: str
    values: Sequence[Any]

    def arguments(self) -> bytes:
        """The structure, in the layout of C, whose size is a multiple of its alignment."""
        given = (v.data_ptr() if isinstance(v, torch.Tensor) else v or 0 for v in self.values)
        return struct.pack(f"@{self.layout}0q", *given)


class Runner(Protocol):
    """What runs kernels in place of a GPU: tests/cuda/running.py has two."""

    def __call__(self, launch: Launch) -> None: ...


stand_in: list[Runner] = []
"""The last one runs kernels on tensors of the CPU, where there is one."""


def available() -> list[str]:
    """Why kernels of csrc/cuda could never run in this process; empty when they can."""
    if settings.disable:
        return ["VITFAST_DISABLE is set"]
    if stand_in:
        return []
    if torch.version.hip is not None:
        return ["they are for NVIDIA's GPUs"]
    if not torch.cuda.is_available():
        return ["there is no GPU"]
    if (
        importlib.util.find_spec("cuda") is None
        or importlib.util.find_spec("cuda.bindings") is None
    ):
        return ["cuda-bindings is not installed (pip install cuda-bindings)"]
    return []


def reasons(*tensors: torch.Tensor | None) -> list[str]:
    """Why a kernel of csrc/cuda cannot take these tensors; empty when it can."""
    given = [t for t in tensors if t is not None]
    device = given[0].device
    if device.type != "cuda" and not (device.type == "cpu" and stand_in):
        return [f"tensors are on {device}, not on a GPU"]
    why = available()
    for dtype in dict.fromkeys(t.dtype for t in given):
        if dtype not in TYPES:
            why.append(f"{dtype} is not implemented, float32, bfloat16 and float16 are")
    if device.type == "cuda" and not why and capability(device) < OLDEST:
        why.append(f"compute capability {capability(device) / 10} is too old: 7.5 is needed")
    return why


@functools.cache
def capability(device: torch.device) -> int:
    """Major and minor in one number, such as 90."""
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


def launch(given: Launch, device: torch.device) -> None:
    """Launches on torch's current stream of the device; nothing waits for it.

    Raises:
        BackendUnavailableError: the kernel could not be compiled, loaded or launched.
    """
    if device.type == "cpu":
        stand_in[-1](given)
        return
    from cuda.bindings import driver

    index = torch.cuda.current_device() if device.index is None else device.index
    packed = given.arguments()
    structure = ctypes.create_string_buffer(packed, len(packed))
    pointers = (ctypes.c_void_p * 1)(ctypes.addressof(structure))
    with torch.cuda.device(index):
        function = _function(given.source, given.kernel, given.defines, index)
        stream = torch.cuda.current_stream(index).cuda_stream
        grid = (given.blocks, 1, 1, given.threads, 1, 1)
        _check(
            driver.cuLaunchKernel(
                function, *grid, given.shared, stream, ctypes.addressof(pointers), 0
            )
        )


# ---- compiling -----------------------------------------------------------------------------------


def folder() -> Path:
    """Where the sources are: in the package, or in the checkout that it is run from."""
    packaged = Path(__file__).parents[1] / "_cuda"
    return packaged if packaged.exists() else Path(__file__).parents[2] / "csrc" / "cuda"


@functools.cache
def text(name: str) -> str:
    return (folder() / name).read_text(encoding="utf-8")


def defines_of(dtype: torch.dtype, **others: int) -> tuple[str, ...]:
    """Macros by which a source has the kernels of one dtype alone."""
    macros = {"NAME": NAMES[dtype], "TYPE": _IN_C[dtype], **others}
    return tuple(f"VITFAST_{name}={value}" for name, value in macros.items())


def options(defines: tuple[str, ...], architecture: str) -> list[str]:
    """NVRTC's, for "sm_75" or another architecture."""
    return [
        f"--gpu-architecture={architecture}", "--std=c++17", "--fmad=true", "--ftz=false",
        "--prec-div=true", "--prec-sqrt=true", *(f"-D{macro}" for macro in defines),
    ]  # fmt: skip


def compiled(source: str, defines: tuple[str, ...], architecture: str) -> bytes:
    """The cubin of a source's kernels; needs NVRTC, no GPU.

    Raises:
        BackendUnavailableError: it does not compile; with the compiler's words.
    """
    from cuda.bindings import nvrtc

    failed, program = nvrtc.nvrtcCreateProgram(
        text(f"{source}.cu").encode(), f"{source}.cu".encode(), 1,
        [text("intrinsics.h").encode()], [b"intrinsics.h"],
    )  # fmt: skip
    _check((failed,))
    given = [option.encode() for option in options(defines, architecture)]
    (failed,) = nvrtc.nvrtcCompileProgram(program, len(given), given)
    if failed != nvrtc.nvrtcResult.NVRTC_SUCCESS:
        size = _check(nvrtc.nvrtcGetProgramLogSize(program))
        log = b" " * size
        _check(nvrtc.nvrtcGetProgramLog(program, log))
        words = log.decode(errors="replace").strip("\0 \n")
        raise BackendUnavailableError(f"{source}.cu does not compile for {architecture}:\n{words}")
    cubin = b" " * _check(nvrtc.nvrtcGetCUBINSize(program))
    _check(nvrtc.nvrtcGetCUBIN(program, cubin))
    _check(nvrtc.nvrtcDestroyProgram(program))
    return cubin


def cubin(source: str, defines: tuple[str, ...], architecture: str) -> bytes:
    """As `compiled`, from the user's cache folder where it is there already."""
    from cuda.bindings import nvrtc

    version = _check(nvrtc.nvrtcVersion())
    facts = [text(f"{source}.cu"), text("intrinsics.h"), *options(defines, architecture), *version]
    key = hashlib.sha256("\0".join(map(str, facts)).encode()).hexdigest()[:24]
    path = cache_folder() / "cuda" / f"{source}-{architecture}-{key}.cubin"
    try:
        return path.read_bytes()
    except OSError:
        logger.info("compiling %s.cu for %s", source, architecture)
    found = compiled(source, defines, architecture)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with whole_file(path) as draft:
            draft.write_bytes(found)
    except OSError as error:
        logger.warning("%s is not kept: %s", path, error)
    return found


# ---- the driver ----------------------------------------------------------------------------------


@functools.cache
def _module(source: str, defines: tuple[str, ...], device: int) -> Any:
    """A source's kernels in the context of a GPU, which is the current one."""
    from cuda.bindings import driver

    architecture = f"sm_{capability(torch.device('cuda', device))}"
    if architecture == "sm_90":
        architecture = "sm_90a"
    return _check(driver.cuModuleLoadData(cubin(source, defines, architecture)))


@functools.cache
def _function(source: str, kernel: str, defines: tuple[str, ...], device: int) -> Any:
    from cuda.bindings import driver

    module = _module(source, defines, device)
    return _check(driver.cuModuleGetFunction(module, kernel.encode()))


def _check(answer: tuple[Any, ...]) -> Any:
    """What a call of cuda-bindings returned beside its status: nothing, one thing or a tuple."""
    status, *found = answer
    if int(status) != 0:
        raise BackendUnavailableError(f"CUDA: {status.name} (error {int(status)})")
    return found[0] if len(found) == 1 else tuple(found) or None
