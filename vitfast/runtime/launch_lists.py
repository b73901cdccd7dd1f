"""What a function does on a GPU, recorded once and issued again as one list.

Between two kernels of a block Python takes longer than a small kernel does: to check arguments, to
choose a backend and a config, to take views. Where a function of tensors does the same in every
call of a kind, as in inference, only this is left of it: an allocation, the launches with addresses
filled in, and torch's own kernels that run between them.

Triton's kernels get addresses: of inputs, of weights, and in one piece of memory for all that lies
between kernels and that no op of torch touches. What ops of torch read or write are tensors.
"""

from __future__ import annotations

import contextlib
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_leaves, tree_unflatten

from vitfast.runtime import kernel_calls
from vitfast.runtime.kernel_calls import Launched
from vitfast.runtime.library import without_autocast
from vitfast.runtime.recordings import ALLOCATIONS, lay_out, storage, storages, under

_ALIGNMENT = 256
"""Bytes; of what lies between kernels. A kernel was compiled for addresses that 16 divides."""
_MOST_BYTES = 64 << 20
"""Of memory between kernels. A call that needs more keeps a GPU busy for longer than Python is."""

_BY_VALUE = {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape}
"""What torch says of ops whose results outside the GPU depend on values."""

_Step = Callable[[list[int], list[Any], int], None]
"""step(addresses, tensors, stream): by the numbers that a recording gave them."""


class LaunchList:
    """The steps of a function of tensors.

    It takes tensors like those that it was recorded with: of the same shapes, strides, dtypes and
    device, their addresses alike in whether 16 divides them. What the function read besides has to
    stay at its addresses; values are read anew in every call.

    Args:
        steps: what is to be done, in order.
        size: bytes of the piece of memory between kernels.
        addresses, tensors: how many the steps number. The first are the inputs'; the address after
            those is that of the piece.
        result: the number of the tensor that is given.
        calls_torch: whether a step calls an op of torch.
    """

    def __init__(
        self, steps: Sequence[_Step], size: int, addresses: int, tensors: int, result: int,
        calls_torch: bool,
    ) -> None:  # fmt: skip
        self._steps, self._size, self._result = tuple(steps), size, result
        self._addresses, self._tensors, self.calls_torch = addresses, tensors, calls_torch

    def __call__(self, *inputs: torch.Tensor) -> torch.Tensor:
        """As the function, on the current stream of the inputs' device."""
        x, stream = inputs[0], 0
        if x.is_cuda:
            index = x.device.index
            if torch._C._cuda_getDevice() != index:
                with torch.cuda.device(index):
                    return self(*inputs)
            stream = torch._C._cuda_getCurrentRawStream(index)
        addresses = [t.data_ptr() for t in inputs]
        tensors: list[Any] = [*inputs]
        addresses += [0] * (self._addresses - len(inputs))
        tensors += [None] * (self._tensors - len(inputs))
        if self._size:
            piece = torch.empty(self._size, dtype=torch.uint8, device=x.device)
            addresses[len(inputs)] = piece.data_ptr()
        if self.calls_torch:
            with without_autocast(x.device):  # whose casts are steps
                for step in self._steps:
                    step(addresses, tensors, stream)
        else:
            for step in self._steps:
                step(addresses, tensors, stream)
        found: torch.Tensor = tensors[self._result]
        return found


def record(
    function: Callable[[], torch.Tensor],
    inputs: Sequence[torch.Tensor],
    constants: Sequence[torch.Tensor],
) -> tuple[torch.Tensor, LaunchList | None]:
    """function(), which reads the inputs, and its list; None where it may not be issued again.

    It may not where it reads values back from the GPU, writes to an input or a constant, computes
    with tensors that are neither, launches Triton's kernels past `kernel_calls.launch`, needs much
    memory, or where its result is not made of its own.

    Args:
        inputs: the first is on the device that it runs on.
        constants: tensors that it may read besides: weights, that stay at their addresses.
    """
    if is_recording():
        return function(), None
    steps: list[Any] = []
    watch = _Watch(steps)
    with _counting() as launches:
        out = under(watch, kernel_calls.recorder, steps, function)
    if launches is None or len(launches) > sum(isinstance(step, Launched) for step in steps):
        return out, None
    try:
        return out, _Compiler(inputs, constants, steps, out).compiled()
    except (
        _Unrepeatable,
        NotImplementedError,
        RuntimeError,
    ):  # torch's, of memory that is no plain
        return out, None


def is_recording() -> bool:
    """Whether what this thread launches is being recorded."""
    return kernel_calls.recorder.get() is not None


class _Unrepeatable(Exception):
    """Why there can be no list."""


class _Op(NamedTuple):
    """An op of torch that ran."""

    op: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    out: Any

    @property
    def given(self) -> list[torch.Tensor]:
        return _tensors((self.args, self.kwargs))

    @property
    def made(self) -> list[torch.Tensor]:
        return _tensors(self.out)

    @property
    def written(self) -> list[torch.Tensor]:
        """Those given that it writes to."""
        parameters = self.op._schema.arguments
        values = {p.name: value for p, value in zip(parameters, self.args, strict=False)}
        values |= self.kwargs
        writes = [p.name for p in parameters if p.alias_info is not None and p.alias_info.is_write]
        return _tensors([values[name] for name in writes if name in values])

    @property
    def allocates(self) -> bool:
        return self.op.overloadpacket.__name__ in ALLOCATIONS

    @property
    def views(self) -> bool:
        """Whether all it gives is memory that it was given, unchanged."""
        return not self.op._schema.is_mutable and storages(self.made) <= storages(self.given)


def _tensors(values: Any) -> list[torch.Tensor]:
    return [t for t in tree_leaves(values) if isinstance(t, torch.Tensor)]


class _Watch(TorchDispatchMode):
    """Notes what torch does on this thread."""

    def __init__(self, steps: list[Any]) -> None:
        super().__init__()
        self._steps = steps

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        # What an op is made of may depend on what a caller has set: which SDPA kernel runs, say.
        with self:
            out = func.decompose(*args, **kwargs)
        if out is NotImplemented:
            out = func(*args, **kwargs)
            self._steps.append(_Op(func, args, kwargs, out))
        return out


@contextlib.contextmanager
def _counting() -> Iterator[list[None] | None]:
    """Gives an item for each launch that Triton's own `kernel[grid]` makes within, of this thread;
    `kernel_calls.launch` then makes all of its by that. None where they cannot be counted. The
    interpreter has no hooks."""
    found: list[None] = []
    triton, thread = sys.modules.get("triton"), threading.get_ident()
    if triton is None:  # without it there are lists of torch's own kernels
        yield found
        return
    chain = triton.knobs.runtime.launch_enter_hook
    if not hasattr(chain, "add"):  # somebody has put a hook of another kind there, or None
        yield None
        return

    def note(metadata: Any) -> None:
        if threading.get_ident() == thread:
            found.append(None)

    chain.add(note)
    try:
        yield found
    finally:
        chain.remove(note)


class _Compiler:
    """Makes the list of a recording. Tensors are told apart by `id`: the recording keeps all."""

    def __init__(
        self,
        inputs: Sequence[torch.Tensor],
        constants: Sequence[torch.Tensor],
        recorded: Sequence[_Op | Launched],
        out: torch.Tensor,
    ) -> None:
        self._recorded, self._out, self._device = recorded, out, inputs[0].device
        self._ops = [step for step in recorded if isinstance(step, _Op)]
        self._inputs = {storage(t): (i, t.data_ptr()) for i, t in enumerate(inputs)}
        self._constants = storages(constants)
        if len(self._inputs) < len(inputs) or self._inputs.keys() & self._constants:
            raise _Unrepeatable("inputs share memory")
        if not all(t.numel() for t in inputs):
            raise _Unrepeatable("there is nothing to compute")
        self._made_by = {
            storage(t): step for step in self._ops for t in step.made
            if t.numel() and storage(t) not in storages(step.given)
        }  # fmt: skip
        self._numbers = {id(t): i for i, t in enumerate(inputs)}
        self._addresses = len(inputs) + 1
        self._address_of: dict[int, int] = {}  # that of a tensor's memory, by storage
        self._wanted = self._find_wanted()
        self._offsets, self._size = self._lay_out()

    def _find_wanted(self) -> set[int]:
        """Tensors that have to be there as such: what ops compute from and with, and the result."""
        wanted = {id(self._out)}
        for step in reversed(self._recorded):
            if isinstance(step, Launched):
                if step.prepared is None:
                    wanted.update(map(id, _tensors(step.args)))
            elif step.allocates:
                continue
            elif not step.views or not wanted.isdisjoint(map(id, step.made)):
                wanted.update(map(id, (*step.given, *step.made)))
        return wanted

    def _lay_out(self) -> tuple[dict[int, int], int]:
        """Where in the piece of memory that lies which only Triton's kernels see; its size."""
        tensors = {storage(t) for op in self._ops for t in op.made if id(t) in self._wanted}
        nbytes = {s: step.made[0].untyped_storage().nbytes() for s, step in self._made_by.items()}
        if sum(nbytes.values()) > _MOST_BYTES:
            raise _Unrepeatable("it needs much memory")
        between = [s for s in self._made_by if s not in tensors]
        users: dict[int, list[int]] = {s: [] for s in between}
        for i, step in enumerate(self._recorded):
            if isinstance(step, Launched):
                for s in storages(step.args) & users.keys():
                    users[s].append(i)
        offsets, size = lay_out([nbytes[s] for s in between], list(users.values()), _ALIGNMENT)
        return dict(zip(between, offsets, strict=True)), size if any(users.values()) else 0

    def compiled(self) -> LaunchList:
        written: set[int] = set()
        steps: list[_Step] = []
        calls_torch = False
        for step in self._recorded:
            if isinstance(step, Launched):
                steps.append(self._launch(step))
                written |= storages(step.args)
                continue
            self._check(step, written)
            if not step.allocates and not step.views:
                written |= storages((step.made, step.written))
                calls_torch = True
            elif not any(id(t) in self._wanted for t in step.made):
                continue
            elif step.views and not any(id(t) in self._numbers for t in step.given):
                continue  # of constants: it stays
            steps.append(self._call(step))
        if storage(self._out) not in written & self._made_by.keys():
            raise _Unrepeatable("the result is not its own")
        result = self._number(self._out)
        return LaunchList(
            steps, self._size, self._addresses, len(self._numbers), result, calls_torch
        )

    def _check(self, step: _Op, written: set[int]) -> None:
        """That an op may run again, on memory that something which was noted has written to."""
        if not step.made or _BY_VALUE.intersection(step.op.tags):
            raise _Unrepeatable(f"{step.op} gives values")
        if any(t.device != self._device for t in step.made):
            raise _Unrepeatable(f"{step.op} copies to another device")
        if any(isinstance(a, torch.UntypedStorage) for a in step.args):
            raise _Unrepeatable(f"{step.op} takes memory by itself")
        targets = storages(step.written)
        if not targets <= self._made_by.keys():
            raise _Unrepeatable(f"{step.op} writes to what was there before")
        if step.allocates or step.views:
            return
        for t in step.given:
            s = storage(t)
            if s in self._made_by and s not in targets and s not in written:
                raise _Unrepeatable(f"{step.op} reads what nobody wrote")

    def _number(self, t: torch.Tensor) -> int:
        """That of a tensor which steps before have made."""
        found = self._numbers.get(id(t))
        if found is None:
            raise _Unrepeatable("a tensor came from nowhere")
        return found

    def _is_constant(self, t: torch.Tensor) -> bool:
        return id(t) not in self._numbers and (not t.numel() or storage(t) in self._constants)

    def _call(self, step: _Op) -> _Step:
        """An op of torch, or an allocation as it was."""
        if step.allocates:
            return self._allocate(*step.made)
        op = step.op
        leaves, spec = tree_flatten((step.args, step.kwargs))
        places = self._take_out(leaves)
        made = [
            (i, *self._introduce(t)) for i, t in enumerate(tree_leaves(step.out))
            if isinstance(t, torch.Tensor)
        ]  # fmt: skip

        def call(addresses: list[int], tensors: list[Any], stream: int) -> None:
            filled = leaves.copy()
            for i, number in places:
                filled[i] = tensors[number]
            args, kwargs = tree_unflatten(filled, spec)
            found = tree_leaves(op(*args, **kwargs))
            for i, number, address, offset in made:
                tensors[number] = found[i]
                addresses[address] = found[i].data_ptr() - offset

        return call

    def _allocate(self, t: torch.Tensor) -> _Step:
        shape, stride, dtype, device = t.shape, t.stride(), t.dtype, t.device
        number, address, _ = self._introduce(t)

        def allocate(addresses: list[int], tensors: list[Any], stream: int) -> None:
            found = torch.empty_strided(shape, stride, dtype=dtype, device=device)
            tensors[number], addresses[address] = found, found.data_ptr()

        return allocate

    def _take_out(self, leaves: list[Any]) -> list[tuple[int, int]]:
        """Takes the tensors of one call out of these: where they were, and their numbers."""
        found = []
        for i, t in enumerate(leaves):
            if not isinstance(t, torch.Tensor):
                continue
            if not self._is_constant(t):
                found.append((i, self._number(t)))
                leaves[i] = None
            elif t._is_view():
                leaves[i] = t.data  # without its base, which others may want to be alone with
        return found

    def _introduce(self, t: torch.Tensor) -> tuple[int, int, int]:
        """The number of a tensor from now on, and as `_publish`."""
        return self._numbers.setdefault(id(t), len(self._numbers)), *self._publish(t)

    def _publish(self, t: torch.Tensor) -> tuple[int, int]:
        """The number of the address of a tensor's memory, and how far behind it the tensor is."""
        s = storage(t)
        if s in self._inputs:
            number, base = self._inputs[s]
            return number, t.data_ptr() - base
        if s not in self._address_of:
            self._address_of[s] = self._addresses
            self._addresses += 1
        return self._address_of[s], t.data_ptr() - s

    def _launch(self, step: Launched) -> _Step:
        """A launch with addresses, or with tensors where it is not prepared."""
        if step.prepared is None:
            return self._launch_tensors(step)
        template, places = list(step.args), []
        for i, a in enumerate(step.args):
            if not isinstance(a, torch.Tensor):
                continue
            s, template[i] = storage(a), 0
            if self._is_constant(a):
                template[i] = a.data_ptr()
            elif s in self._offsets:
                places.append((i, len(self._inputs), a.data_ptr() - s + self._offsets[s]))
            elif s in self._inputs or s in self._address_of:
                places.append((i, *self._publish(a)))
            else:
                raise _Unrepeatable("a kernel reads a tensor that came from nowhere")
        prepared, programs, issue = step.prepared, step.programs, kernel_calls.issue

        def launch(addresses: list[int], tensors: list[Any], stream: int) -> None:
            args = template.copy()
            for i, number, offset in places:
                args[i] = addresses[number] + offset
            issue(prepared, programs, args, stream)

        return launch

    def _launch_tensors(self, step: Launched) -> _Step:
        kernel, grid, options = step.kernel, (step.programs,), step.options
        template = list(step.args)
        places = self._take_out(template)

        def launch(addresses: list[int], tensors: list[Any], stream: int) -> None:
            args = template.copy()
            for i, number in places:
                args[i] = tensors[number]
            kernel[grid](*args, **options)

        return launch
