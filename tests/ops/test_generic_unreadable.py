"""Tensors that are not what lies at their address: every op gives what it gives for their copies.

Negated views and zero tensors without memory are torch's dispatcher's to write out, which every
public call passes.
"""

from __future__ import annotations

import functools

import pytest
import torch

import vitfast.ops as ops
from vitfast.testing.cases import CONSTANT
from vitfast.testing.inputs import materialise

UNREADABLE = {
    "negative": lambda t: torch._neg_view(-t),
    "imaginary_part_of_a_conjugate": lambda t: torch.complex(t, -t).conj().imag,
    "zero": lambda t: torch._efficientzerotensor(t.shape, dtype=t.dtype),
    "inference": lambda t: inference(t),
}


def inference(t):
    with torch.inference_mode():
        return t.clone()


@functools.cache
def small_calls():
    """A call for each tensor argument that the samples of any op have, the smallest."""
    found = {}
    for op in ops.NAMES:
        spec = ops.spec_of(op)
        for sample in (s for s in spec.samples if "real" not in s.tags):
            call = materialise(spec, sample, torch.float32)
            size = sum(t.numel() for _, t in call.tensors())
            for name in call.floating():
                if size and size < found.get((op, name), (1 << 18,))[0]:
                    found[op, name] = size, call
    return {key: call for key, (_, call) in found.items()}


@pytest.mark.parametrize("kind", UNREADABLE)
def test_tensors_that_are_not_what_lies_at_their_address(kind):
    """As an argument, in the forward and the backward, and as the gradient that comes back."""
    for (op, name), call in small_calls().items():
        public = ops.spec_of(op).public
        odd = UNREADABLE[kind](call.arguments[name])
        plain, odd = (call.changed(**{name: t}) for t in (odd.clone(), odd))
        with torch.no_grad():
            torch.testing.assert_close(
                odd.run(public), plain.run(public), msg=f"{op} {name}", equal_nan=True
            )
        if kind == "inference":  # autograd saves none
            continue
        names = [n for n in call.floating() if n not in CONSTANT]
        grads = call.output_grads(plain.run(public))
        want = plain.gradients(public, grads, names=names)
        got = odd.gradients(public, [torch._neg_view(-g) for g in grads], names=names)
        torch.testing.assert_close(got, want, msg=f"{op} {name}", equal_nan=True)
