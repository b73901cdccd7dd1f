"""The shared argument checks name the op, the argument, what came and what was wanted."""

from __future__ import annotations

import math

import pytest
import torch

from vitfast.errors import (
    DeviceError,
    InputTypeError,
    InputValueError,
    UnsupportedInputError,
    VitfastError,
)
from vitfast.runtime.checks import (
    FLOATS,
    check_eps,
    check_same_device,
    check_same_dtype,
    check_shape,
    check_tensor,
)


@pytest.mark.parametrize("dtype", FLOATS)
def test_dense_floats_pass(dtype):
    check_tensor("op", "x", torch.zeros(2, 3, dtype=dtype).T)


@pytest.mark.parametrize(
    ("value", "error", "message"),
    [
        (3, InputTypeError, "op: x must be a torch.Tensor, got int"),
        (None, InputTypeError, "got NoneType"),
        (torch.zeros(2, dtype=torch.int64), InputTypeError, "x has dtype torch.int64, expected"),
        (torch.zeros(2, dtype=torch.complex64), InputTypeError, "torch.complex64"),
        (torch.zeros(2, dtype=torch.bool), InputTypeError, "torch.bool"),
        (torch.zeros(2).to(torch.float8_e4m3fn), UnsupportedInputError, "float8_e4m3fn"),
        (torch.zeros(2, 2).to_sparse(), UnsupportedInputError, "sparse"),
        (
            torch.nested.nested_tensor([torch.zeros(2), torch.zeros(3)], layout=torch.jagged),
            UnsupportedInputError,
            "dense",
        ),
    ],
    ids=["int", "none", "int64", "complex", "bool", "fp8", "sparse", "nested"],
)
def test_anything_else_is_refused(value, error, message):
    with pytest.raises(error, match=message) as caught:
        check_tensor("op", "x", value)
    assert isinstance(caught.value, VitfastError)


def test_other_dtypes_can_be_allowed():
    check_tensor("op", "image", torch.zeros(2, dtype=torch.uint8), (torch.uint8,))


def test_devices():
    check_same_device("op", x=torch.zeros(2), bias=None)
    with pytest.raises(DeviceError, match="x is on cpu, but bias is on meta"):
        check_same_device("op", x=torch.zeros(2), weight=None, bias=torch.zeros(2, device="meta"))


def test_dtypes():
    check_same_dtype("op", q=torch.zeros(2), k=None, v=torch.ones(2))
    with pytest.raises(InputTypeError, match="q has dtype torch.float32, but v has torch.bfloat16"):
        check_same_dtype("op", q=torch.zeros(2), v=torch.zeros(2).bfloat16())


def test_shapes():
    check_shape("op", "weight", None, (3,))
    check_shape("op", "weight", torch.zeros(3), (3,))
    with pytest.raises(InputValueError, match=r"op: weight has shape \(2,\), expected \(3,\)"):
        check_shape("op", "weight", torch.zeros(2), (3,))


@pytest.mark.parametrize("eps", [0, -1e-6, math.nan, math.inf, "1e-6", None])
def test_eps_must_be_a_positive_number(eps):
    with pytest.raises(InputValueError, match="eps must be a positive number"):
        check_eps("op", eps)


def test_good_eps():
    check_eps("op", 1e-6)
    check_eps("op", 1)


@pytest.mark.parametrize(
    ("error", "builtin"),
    [
        (InputValueError, ValueError),
        (InputTypeError, TypeError),
        (UnsupportedInputError, NotImplementedError),
        (DeviceError, RuntimeError),
    ],
)
def test_errors_are_the_built_in_ones_too(error, builtin):
    assert issubclass(error, builtin) and issubclass(error, VitfastError)
