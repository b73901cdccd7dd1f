"""A Triton driver that launches nothing: what a call takes in Python, and what it would launch,
without a GPU. Kernels are compiled for sm_90; tensors lie on the CPU, in float16 or float32."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

from vitfast.runtime import kernel_calls
from vitfast.runtime import triton as runtime

_DEVICE = 10_000
"""That kernels are compiled for: of none that exists, since Triton keeps them by its number."""


class _Utils:
    """What a CompiledKernel asks of a GPU."""

    def load_binary(self, *args: Any) -> tuple[int, int, int, int, int]:
        return 1, 1, 32, 0, 1024

    def get_device_properties(self, device: int) -> dict[str, int]:
        return {"max_shared_mem": 232_448, "multiprocessor_count": 132, "warpSize": 32}

    def unload_module(self, module: int) -> None:
        pass


class Driver:
    """launches: the arguments of each launch, in the order of Triton's launchers. kernels: all that
    were compiled."""

    def __init__(self, keep: bool) -> None:
        self._keep = keep
        self.launches: list[tuple[Any, ...]] = []
        self.kernels: set[Any] = set()
        self.utils = _Utils()

    def launcher_cls(self, src: Any, metadata: Any) -> Any:
        self.kernels.add(src.fn)

        def launch(*args: Any) -> None:
            enter = args[7]  # a profiler's hook, with what it is told
            if enter is not None:
                enter(args[6])
            if self._keep:
                self.launches.append(args)

        return launch

    def get_current_device(self) -> int:
        return _DEVICE

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")


@contextlib.contextmanager
def launching_nothing(keep: bool = True) -> Iterator[Driver]:
    """Within, ops on the CPU that are asked for `backend="triton"` compute nothing: their results
    are whatever their memory holds.

    Args:
        keep: launches with their tensors; without, memory is used again as on a GPU.

    Raises:
        RuntimeError: TRITON_INTERPRET is set, so that there are no compiled kernels.
    """
    if triton.knobs.runtime.interpret:
        raise RuntimeError("kernels run in Triton's interpreter, which compiles none")
    found, interpreting, before = Driver(keep), runtime.interpreting, driver._active
    driver.set_active(found)
    runtime.interpreting = lambda: True  # type: ignore[assignment]
    try:
        yield found
    finally:
        runtime.interpreting = interpreting
        kernel_calls.forget_prepared()
        for kernel in found.kernels:
            kernel.device_caches.pop(_DEVICE, None)
        driver.set_active(before)
