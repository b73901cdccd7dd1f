"""Poisoned memory shows unwritten outputs, and reads and writes outside a tensor."""

from __future__ import annotations

import pytest
import torch

from vitfast.testing.poison import ZONE, guard, guard_all, poisoned_memory

FACTORIES = {
    "empty": lambda: torch.empty(3, 5),
    "empty_scalar": lambda: torch.empty(()),
    "empty_bfloat16": lambda: torch.empty((4, 4), dtype=torch.bfloat16),
    "empty_channels_last": lambda: torch.empty(2, 3, 4, 5, memory_format=torch.channels_last),
    "empty_like": lambda: torch.empty_like(torch.zeros(5, 3).T),
    "empty_strided": lambda: torch.empty_strided((4, 3), (1, 9)),
    "empty_permuted": lambda: torch.empty_permuted((2, 3, 4), (2, 0, 1)),
    "new_empty": lambda: torch.zeros(2, dtype=torch.float64).new_empty(7),
    "new_empty_strided": lambda: torch.zeros(2).new_empty_strided((4, 2), (1, 4)),
}


@pytest.mark.parametrize("name", FACTORIES)
def test_uninitialised_memory_is_nan_and_otherwise_as_usual(name):
    usual = FACTORIES[name]()
    with poisoned_memory():
        t = FACTORIES[name]()
        assert t.isnan().all()
    assert (t.shape, t.stride(), t.dtype) == (usual.shape, usual.stride(), usual.dtype)
    assert t.data_ptr() % 64 == usual.data_ptr() % 64 == 0
    assert t._base is None
    assert not FACTORIES[name]().isnan().all() or usual.isnan().all()


def test_integers_and_booleans_are_poisoned_too():
    with poisoned_memory():
        assert torch.empty(4, dtype=torch.int32).eq(-1).all()
        assert torch.empty(4, dtype=torch.uint8).eq(255).all()


def test_factories_are_restored_after_an_exception():
    before = torch.empty, torch.empty_like, torch.Tensor.new_empty
    with pytest.raises(KeyError), poisoned_memory():
        raise KeyError
    assert (torch.empty, torch.empty_like, torch.Tensor.new_empty) == before
    assert "new_empty" not in vars(torch.Tensor)


def test_meta_tensors_and_out_are_left_alone():
    with poisoned_memory() as allocated:
        assert torch.empty(3, device="meta").device.type == "meta"
        out = torch.zeros(3)
        assert torch.empty(3, out=out) is out
        assert not allocated


def test_requires_grad_is_kept():
    with poisoned_memory():
        assert torch.empty(3, requires_grad=True).requires_grad
        assert not torch.empty(3).requires_grad


@pytest.mark.parametrize("offset", [-ZONE, -1, 6, 6 + ZONE - 1])
def test_a_write_outside_an_allocation_is_caught(offset):
    with pytest.raises(AssertionError, match=f"offset {offset} "), poisoned_memory():
        t = torch.empty(2, 3)
        t.zero_()
        position = t.storage_offset() + offset
        torch.as_strided(t, (1,), (1,), position).fill_(1.0)


def test_writes_inside_are_fine_and_gaps_are_not():
    with poisoned_memory():
        torch.empty_strided((3, 2), (4, 1)).zero_()
    with pytest.raises(AssertionError, match="offset 2 "), poisoned_memory():
        t = torch.empty_strided((3, 2), (4, 1))
        torch.as_strided(t, (4,), (1,), t.storage_offset()).zero_()


INPUTS = {
    "contiguous": lambda: torch.randn(3, 4),
    "transposed": lambda: torch.randn(3, 4).T,
    "strided": lambda: torch.randn(4, 6, 40)[:, ::2],
    "expanded": lambda: torch.randn(1, 5).expand(6, 5),
    "expanded_inside": lambda: torch.randn(3, 1, 2).expand(3, 4, 2),
    "offset": lambda: torch.randn(30)[7:],
    "scalar": lambda: torch.tensor(3.0),
    "empty": lambda: torch.randn(0, 4),
    "bool": lambda: torch.randn(4, 4) > 0,
    "bfloat16": lambda: torch.randn(4, 4).bfloat16(),
}


@pytest.mark.parametrize("shift", [0, 1])
@pytest.mark.parametrize("name", INPUTS)
def test_a_guarded_copy_has_the_same_values_and_strides(name, shift):
    t = INPUTS[name]()
    guarded = guard(t, shift=shift)
    assert torch.equal(guarded.tensor, t)
    assert guarded.tensor.stride() == t.stride()
    assert guarded.tensor.dtype == t.dtype
    assert guarded.tensor.data_ptr() % 64 == shift * t.element_size() % 64 or not t.numel()
    guarded.check()


@pytest.mark.parametrize("name", [n for n in INPUTS if n not in ("bool", "empty")])
def test_a_read_outside_gives_nan(name):
    t = guard(INPUTS[name]()).tensor
    span = 1 + sum((n - 1) * s for n, s in zip(t.shape, t.stride(), strict=True))
    around = torch.as_strided(t, (ZONE + span + ZONE,), (1,), t.storage_offset() - ZONE)
    assert around[:ZONE].isnan().all() and around[-ZONE:].isnan().all()


def test_gaps_between_elements_are_nan():
    t = guard(torch.randn(4, 6)[:, ::2]).tensor
    assert torch.as_strided(t, (4, 6), t.stride()[:1] + (1,))[:, 1::2][:, :-1].isnan().all()


def test_a_write_outside_or_inside_an_input_is_caught():
    guarded = guard(torch.randn(3, 4), "x")
    torch.as_strided(guarded.tensor, (13,), (1,)).neg_()
    with pytest.raises(AssertionError, match="x .*outside"):
        guarded.check()
    guarded = guard(torch.randn(3, 4), "x")
    guarded.tensor[1, 2] += 1
    with pytest.raises(AssertionError, match="x .*was overwritten"):
        guarded.check()


def test_guard_keeps_requires_grad_and_walks_nested_arguments():
    found = []
    x = torch.randn(3, requires_grad=True)
    args = guard_all((x, [x], {"k": x}, 3, None), found)
    assert len(found) == 3 and args[3:] == (3, None)
    assert args[0].requires_grad and args[0].is_leaf
    assert found[2].name == "input[2].k"
