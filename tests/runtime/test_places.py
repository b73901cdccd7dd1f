"""Where a plan's tensors lie, as a list of launches asks in each call: by the extension, and in
Python where there is none."""

from __future__ import annotations

import pytest
import torch

from vitfast.blocks import launched
from vitfast.runtime import native

_extension = native.extension()
IMPLEMENTATIONS = [launched._Places, *([_extension.Places] if _extension is not None else [])]


def _tensors():
    return torch.nn.Parameter(torch.randn(4, 6), False), torch.randn(6).half(), torch.empty(0)


def _other_memory(t):
    t.data = t.data.clone()


def _other_shape(t):
    t.data = t.data.view(6, 4)


def _other_strides(t):
    t.data = t.data.as_strided((4, 6), (1, 4))


def _other_dtype(t):
    t.data = t.data.view(torch.int32)


def _other_place_in_its_memory(t):
    t.data = t.data.view(-1)[1:]


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize(
    "change",
    [_other_memory, _other_shape, _other_strides, _other_dtype, _other_place_in_its_memory],
)
def test_what_a_kernel_is_told_is_seen_to_change(implementation, change):
    tensors = _tensors()
    places = implementation(tensors)
    found = places.storages(tensors)
    assert [s.data_ptr() for s in found] == [t.untyped_storage().data_ptr() for t in tensors]
    kept = tensors[0].data  # so that no new memory has its address
    change(tensors[0])
    assert places.storages(tensors) is None
    tensors[0].data = kept
    assert places.storages(tensors) is not None


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_values_are_no_matter(implementation):
    tensors = _tensors()
    places = implementation(tensors)
    with torch.no_grad():
        tensors[0].add_(1)
    assert places.storages(tensors) is not None


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_fewer_or_more_tensors_are_others(implementation):
    tensors = _tensors()
    places = implementation(tensors)
    assert places.storages(tensors[:2]) is None
    assert places.storages((*tensors, torch.empty(1))) is None
