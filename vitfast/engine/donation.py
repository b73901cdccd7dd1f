"""Results written into the memory of an input that nobody needs any more: buffer donation.

At 2160 x 3840 the residual stream of a Swin or ConvNeXt is 200 MB, and a block that allocates its
result needs two of it. Who calls blocks one after the other (`vitfast.blocks.in_turn`) knows that
only the next of them reads what one made, and gives it to that one; a step of the engine whose rows
or lines are read before they are written then writes there. The idea is that of `jax.jit`'s
`donate_argnums`.

What may be written to (`give`) and what a step made (`result`, `is_made`) are told by address, for
the calls of one thread. The caller keeps the tensor that it gives during that call, so that no
other can lie at its address.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Sequence

import torch

from vitfast.runtime import native


class _State(threading.local):
    given = 0  # the address of what may be written to; 0 for nothing
    made = 0  # the address of the last result of a step that looks at `given`


_STATE = _State()


def given() -> int:
    """The address of the tensor that was given, for `give` to be called with it afterwards."""
    return _STATE.given


def is_given(x: torch.Tensor) -> bool:
    """Whether the elements of x may be overwritten by the result of the call that x came in."""
    return _STATE.given != 0 and x.data_ptr() == _STATE.given


def give(address: int) -> None:
    """Let the next call write to the tensor at this address, which is its input; 0 for none. What
    was made before is no longer told."""
    _STATE.given, _STATE.made = address, 0


def withdraw() -> None:
    """Give nothing after all, and tell of nothing that was made: others than the engine compute the
    call, who may read its input again and have shown its result to anybody."""
    if not torch.compiler.is_compiling():
        give(0)


def give_back(address: int, made: bool) -> None:
    """What was given before the caller gave tensors of its own is given again.

    Args:
        made: whether the last result of its calls was seen by nobody else, so that its own caller
            may give that away.
    """
    _STATE.given = address
    if not made:
        _STATE.made = 0


def is_made(x: torch.Tensor) -> bool:
    """Whether x is the last `result` since `give`, in new memory or in what was given."""
    return _STATE.made != 0 and x.data_ptr() == _STATE.made


def release_rest(x: torch.Tensor, out: torch.Tensor) -> None:
    """Give the system what memory of x a smaller `result` of it did not take, where that lies in x:
    it is still mapped, but takes no room until something writes there."""
    module = native.extension()
    if module is not None and out.data_ptr() == x.data_ptr():
        module.release_pages(out.data_ptr() + out.nbytes, x.nbytes - out.nbytes)


def result(x: torch.Tensor, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
    """A contiguous tensor on the CPU to write a step's result to: the first elements of its input x
    where that was given, is contiguous, of this dtype and no smaller; else of new memory.

    Only for steps that read no element after they wrote to its place.
    """
    count = math.prod(shape)
    if (
        is_given(x)
        and x.dtype == dtype
        and count <= x.numel()
        and x.is_contiguous()
        and native.recorder.get() is None  # a replay writes to memory of its own
    ):
        out = x.view(-1)[:count].view(shape)
    else:
        out = native.empty(shape, dtype)
    _STATE.made = out.data_ptr()
    return out
