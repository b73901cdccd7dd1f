"""The autograd of `linear_act` and `mlp`, whose x may be the norm of a tensor that is kept anyway.

Both ops describe a call by records of one form. A `Call` begins with x and with what x is the norm
of, and the op returns what the backward needs, z, beside its result. A `BackwardCall` has fields of
the same names, and `grad`, `z` and `wanted`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch

from vitfast.ops.common import recompute
from vitfast.ops.common.recompute import Normed
from vitfast.runtime.dispatch import Dispatcher


def with_norm(call: Any, normed: Normed | None) -> Any:
    """The call (a `Call`), with what its x is the norm of, if it is one."""
    if normed is None:
        return call
    return call._replace(
        source=normed.source,
        norm_weight=normed.weight,
        norm_bias=normed.bias,
        eps=normed.eps,
        kind=normed.kind,
    )


@dataclass(frozen=True)
class Recorded:
    """What `runtime.library.define` takes to make such an op differentiable.

    Args:
        dispatcher: the op's.
        call, backward_call: the classes of its records.
        inputs: names of the differentiable inputs, x first, in the order of the gradients that the
            backward op returns.
    """

    dispatcher: Dispatcher
    call: Any
    backward_call: Any
    inputs: tuple[str, ...]

    @cached_property
    def _places(self) -> tuple[int, ...]:
        """Of each input, its place among the op's arguments."""
        return tuple(self.call._fields.index(name) for name in self.inputs)

    @cached_property
    def _options(self) -> tuple[str, ...]:
        """Fields of both records that are no tensors."""
        tensors = {*self.inputs, "norm_weight", "norm_bias"}
        shared = set(self.call._fields) & set(self.backward_call._fields)
        return tuple(sorted(shared - tensors))

    def setup_context(self, ctx: Any, inputs: tuple[Any, ...], output: tuple[Any, ...]) -> None:
        """Saves what the backward needs; for x the tensor that it is the norm of, if it is one."""
        *fields, ctx.backend = inputs
        call = self.call(*fields)
        kept = recompute.kept(call.x, call.source, call.norm_weight, call.norm_bias)
        others = (getattr(call, name) for name in self.inputs[1:])
        ctx.save_for_backward(*kept, *others, output[1])
        ctx.options = {name: getattr(call, name) for name in self._options}
        ctx.mark_non_differentiable(output[1])

    def autograd(self, backward_op: Callable[..., Any]) -> Callable[..., tuple[Any, ...]]:
        """The autograd formula on the backward op: a gradient or None for each argument."""

        def formula(ctx: Any, grad: torch.Tensor, _: Any) -> tuple[Any, ...]:
            x, norm_weight, norm_bias, *others, z = ctx.saved_tensors
            tensors = dict(zip(self.inputs, (x, *others), strict=True))
            wanted = [
                t is not None and ctx.needs_input_grad[place]
                for t, place in zip(tensors.values(), self._places, strict=True)
            ]
            call = self.backward_call(
                grad=grad,
                norm_weight=norm_weight,
                norm_bias=norm_bias,
                z=z,
                wanted=wanted,
                **tensors,
                **ctx.options,
            )
            result: list[Any] = [None] * (len(self.call._fields) + 1)  # the backend is one, too
            found = backward_op(*call, ctx.backend)
            for place, gradient, is_wanted in zip(self._places, found, wanted, strict=True):
                result[place] = gradient if is_wanted else None
            return tuple(result)

        return formula

    def backward(self, *args: Any) -> tuple[torch.Tensor, ...]:
        """The backward op: x is made again where it is the norm of something and is read."""
        *fields, backend = args
        call = self.backward_call(*fields)
        given, dtype = call.x, call.grad.dtype
        if call.kind:
            call = call._replace(x=given.new_empty(given.shape, dtype=dtype))
        found = self.dispatcher.pick_backward(backend, call.forward_call)
        if call.kind and call.multiplies_x:
            norm = (call.norm_weight, call.norm_bias, call.eps, call.kind)
            call = call._replace(x=recompute.again(given, *norm, dtype))
        return found(call)

    def backward_fake(self, *args: Any) -> tuple[torch.Tensor, ...]:
        """The shapes and dtypes of what `backward` gives; empty where nothing is wanted."""
        call = self.backward_call(*args[:-1])
        call = call._replace(x=call.grad.new_empty(call.x.shape))
        tensors = (getattr(call, name) for name in self.inputs)
        return tuple(
            t.new_empty(t.shape) if is_wanted and t is not None else call.grad.new_empty(0)
            for t, is_wanted in zip(tensors, call.wanted, strict=True)
        )
