"""Kernels of csrc/cuda on the CPU: tests/cuda/host compiled with them, plainly and with sanitizers.

The library runs them on tensors of this process. The program runs one launch, whose buffers are
copies of the launch's tensors, with AddressSanitizer and UndefinedBehaviorSanitizer ("address") or
ThreadSanitizer ("thread").
"""

import contextlib
import ctypes
import os
import struct
import subprocess
from pathlib import Path

import torch

from vitfast.runtime import cuda

ROOT = Path(__file__).parents[2]
HERE = Path(__file__).parent / "host"
KINDS = {
    "address": ["-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-DVITFAST_ASAN"],
    "thread": ["-fsanitize=thread", "-DVITFAST_TSAN"],
}
FLAGS = [
    "-std=c++17",
    "-O1",
    "-g",
    "-Wall",
    "-Wextra",
    "-Werror",
    "-Wno-unknown-pragmas",
    f"-I{HERE}",
]


class HostError(Exception):
    """What the host, or a sanitizer, said of a launch."""


def compile_host(
    folder: Path, kind: str | None, sources: Path = ROOT / "csrc" / "cuda", defines=()
):
    """The library (kind None) or program of all kernels in `sources`."""
    flags = [*FLAGS, *(f"-D{d}" for d in defines), *KINDS.get(kind, ["-O2", "-fPIC"])]
    objects = []
    for source in (HERE / "host.cpp", HERE / "main.cpp", *sorted(sources.glob("*.cu"))):
        made = folder / f"{source.stem}.o"
        given = list(flags)
        if kind is not None and source.suffix == ".cpp":
            given.append("-DVITFAST_HOST_PROGRAM")
            given = [f for f in given if f != "-fsanitize=thread"]  # host.cpp says why
        command = ["g++", *given, "-x", "c++", "-c", source, "-o", made]
        subprocess.run(command, check=True)
        objects.append(made)
    out = folder / ("host.so" if kind is None else "host")
    link = ["-shared"] if kind is None else [f for f in flags if f.startswith("-fsanitize")]
    subprocess.run(["g++", *link, *objects, "-o", out], check=True)
    return out


def in_process(library: Path):
    """A runner on tensors of this process."""
    call = ctypes.CDLL(str(library)).vitfast_host_launch
    call.restype = ctypes.c_char_p

    def run(launch: cuda.Launch) -> None:
        assert launch.shared <= cuda.MOST_SHARED
        given = launch.arguments()
        error = call(
            launch.kernel.encode(), ctypes.c_int64(launch.blocks), launch.threads,
            ctypes.c_int64(launch.shared), given, ctypes.c_int64(len(given)),
        )  # fmt: skip
        if error is not None:
            raise HostError(error.decode())

    return run


def _numbers(*values):
    return struct.pack(f"{len(values)}q", *values)


def as_program(program: Path, folder: Path):
    """A runner that copies a launch's tensors into a program of its own, and back."""

    def run(launch: cuda.Launch) -> None:
        tensors = [v for v in launch.values if isinstance(v, torch.Tensor)]
        storages = {t.untyped_storage().data_ptr(): t.untyped_storage() for t in tensors}
        order, addresses = list(storages), []
        for i, value in enumerate(launch.values):  # pointers come first in every structure
            if isinstance(value, torch.Tensor):
                base = value.untyped_storage().data_ptr()
                addresses += [8 * i, order.index(base), value.data_ptr() - base]
        name, given = launch.kernel.encode(), launch.arguments()
        case = [_numbers(len(name)), name, _numbers(launch.blocks, launch.threads, launch.shared)]
        case += [_numbers(len(given)), given, _numbers(len(addresses) // 3, *addresses)]
        sizes = [storage.nbytes() for storage in storages.values()]
        case.append(_numbers(len(sizes)))
        for base, size in zip(order, sizes, strict=True):
            case += [_numbers(size), ctypes.string_at(base, size)]
        (folder / "case").write_bytes(b"".join(case))
        done = subprocess.run(
            [program, folder / "case", folder / "result"], capture_output=True, text=True,
            errors="replace", env={**os.environ, "TSAN_OPTIONS": "halt_on_error=1"},
        )  # fmt: skip
        if done.returncode:
            raise HostError(done.stderr[-20000:] or f"exit {done.returncode}")
        result = (folder / "result").read_bytes()
        for base, size in zip(order, sizes, strict=True):
            ctypes.memmove(base, result[:size], size)
            result = result[size:]

    return run


@contextlib.contextmanager
def standing_in(runner):
    cuda.stand_in.append(runner)
    try:
        yield
    finally:
        cuda.stand_in.pop()
