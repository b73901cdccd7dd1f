"""Launches of Triton kernels that are prepared once for each kind of call.

`kernel[grid](...)` binds, classifies and hashes all arguments in every launch, which takes longer
than the small kernels of a batch of one. What it finds depends on the dtypes of tensors, on whether
their addresses are divisible by 16, and on the values of everything else: where those are as in a
call before, the kernel that was compiled for that is launched at once.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch

from vitfast.runtime.launches import Launch

_MOST = 4096
"""Kinds of calls that are remembered."""


class _Prepared(NamedTuple):
    compiled: Any  # triton.compiler.CompiledKernel, which keeps the kernel alive
    tail: tuple[Any, ...]  # the constants, which come after the arguments


_PREPARED: dict[tuple[Any, ...], _Prepared] = {}


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
    if not isinstance(kernel, triton.runtime.JITFunction) or torch.version.hip:
        # The interpreter's; and AMD's compiler looks at the size of a tensor's memory as well.
        kernel[(programs,)](*args, **options, **config.options())
        return
    active, hooks = triton.runtime.driver.active, triton.knobs.runtime
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
    if found is None or _calls(hooks.launch_enter_hook) or _calls(hooks.launch_exit_hook):
        compiled = kernel[(programs,)](*args, **options, **config.options())
        names = kernel.arg_names[len(args) :]
        if hasattr(compiled, "packed_metadata") and set(names) == set(options):
            if len(_PREPARED) >= _MOST:
                _PREPARED.clear()
            _PREPARED[key] = _Prepared(compiled, tuple(options[name] for name in names))
        return
    compiled = found.compiled
    compiled.run(
        programs, 1, 1, active.get_current_stream(device), compiled.function,
        compiled.packed_metadata, None, None, None, *args, *found.tail,
    )  # fmt: skip


def forget_prepared() -> None:
    """After the driver has changed, which what is prepared was compiled for."""
    _PREPARED.clear()


def _calls(hook: Any) -> bool:
    """Whether a profiler waits for launches; Triton's chain of hooks is there without any, too."""
    return hook is not None and bool(getattr(hook, "calls", True))


def cdiv(a: int, b: int) -> int:
    """a / b rounded up; Triton's own takes microseconds, since kernels may call it, too."""
    return -(-a // b)


def next_power_of_2(n: int) -> int:
    """The smallest power of two that is not below n, from 1 on."""
    return 1 << (n - 1).bit_length()
