"""Launches of Triton kernels that are prepared once for each kind of call.

`kernel[grid](...)` binds, classifies and hashes all arguments in every launch, which takes longer
than the small kernels of a batch of one. What it finds depends on the dtypes of tensors, on whether
their addresses are divisible by 16, and on the values of everything else: where those are as in a
call before, the kernel that was compiled for that is launched at once.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from contextvars import ContextVar
from typing import Any, NamedTuple

import torch
from torch.utils._python_dispatch import _disable_current_modes

from vitfast.runtime.launches import Launch, choose_anew

_MOST = 4096
"""Kinds of calls that are remembered."""


class Prepared(NamedTuple):
    """What launches a kernel of Triton without looking at its arguments.

    compiled: a triton.compiler.CompiledKernel, which keeps the kernel alive.
    run, function, metadata: its launcher, handle and number of threads, as that takes them.
    tail: the constants, which come after the arguments.
    """

    compiled: Any
    run: Any
    function: Any
    metadata: Any
    tail: tuple[Any, ...]


_PREPARED: dict[tuple[Any, ...], Prepared] = {}


class Launched(NamedTuple):
    """A launch that ran.

    args, options: as in kernel[(programs,)](*args, **options), which launches it again.
    prepared: what launches it with other addresses in place of tensors; None in the interpreter and
    on AMD's GPUs, whose kernels differ by the size of a tensor's memory, too.
    """

    kernel: Any
    programs: int
    args: tuple[Any, ...]
    options: Mapping[str, Any]
    prepared: Prepared | None


recorder: ContextVar[list[Launched] | None] = ContextVar("recorder", default=None)
"""Where each launch of this context is noted."""


def launch(
    kernel: Any, programs: int, args: tuple[Any, ...], constants: Mapping[str, Any], config: Launch
) -> None:
    """kernel[(programs,)](*args, **constants, and what the config says), on the current device.

    Args:
        kernel: a `triton.jit` function whose parameters are the arguments and then the constants.
        args: tensors, None for those that are absent, integers and floats.
        constants: of the kernel's constexpr parameters those that the config does not give.
    """
    import triton

    options = {**constants, **config.blocks}
    noted = recorder.get()
    if not isinstance(kernel, triton.runtime.JITFunction) or torch.version.hip:
        options |= config.options()
        if noted is None:
            kernel[(programs,)](*args, **options)
            return
        with _disable_current_modes():  # which would see the interpreter at work
            kernel[(programs,)](*args, **options)
        noted.append(Launched(kernel, programs, args, options, None))
        return
    active = triton.runtime.driver.active
    device = active.get_current_device()
    key = (
        id(kernel), device, config.num_warps, config.num_stages, *options.values(),
        *[
            (a.dtype, a.data_ptr() % 16) if isinstance(a, torch.Tensor)
            else float if type(a) is float else a
            for a in args
        ],
    )  # fmt: skip
    found = _PREPARED.get(key)
    if found is None or is_profiled():
        compiled = kernel[(programs,)](*args, **options, **config.options())
        names = kernel.arg_names[len(args) :]
        if hasattr(compiled, "packed_metadata") and set(names) == set(options):
            if len(_PREPARED) >= _MOST:
                _PREPARED.clear()
            found = Prepared(
                compiled, compiled.run, compiled.function, compiled.packed_metadata,
                tuple(options[name] for name in names),
            )  # fmt: skip
            _PREPARED[key] = found
    else:
        issue(found, programs, args, active.get_current_stream(device))
    if noted is not None:
        noted.append(Launched(kernel, programs, args, {**options, **config.options()}, found))


def issue(prepared: Prepared, programs: int, args: Sequence[Any], stream: int) -> None:
    """Launch a kernel on the current device, whose arguments are as those it was compiled for.

    Args:
        args: as of `launch`; addresses may stand for tensors.
        stream: of the current device, as torch tells it.
    """
    _, run, function, metadata, tail = prepared
    run(programs, 1, 1, stream, function, metadata, None, None, None, *args, *tail)


def is_profiled() -> bool:
    """Whether a profiler waits for Triton's launches; its chain of hooks is there without, too."""
    triton = sys.modules.get("triton")
    if triton is None:
        return False
    hooks = triton.knobs.runtime
    return any(
        hook is not None and bool(getattr(hook, "calls", True))
        for hook in (hooks.launch_enter_hook, hooks.launch_exit_hook)
    )


def forget_prepared() -> None:
    """After the driver has changed, which what is prepared was compiled for."""
    _PREPARED.clear()
    choose_anew()


def cdiv(a: int, b: int) -> int:
    """a / b rounded up; Triton's own takes microseconds, since kernels may call it, too."""
    return -(-a // b)


def next_power_of_2(n: int) -> int:
    """The smallest power of two that is not below n, from 1 on."""
    return 1 << (n - 1).bit_length()
