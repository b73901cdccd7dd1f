"""Large results lie in memory that is kept for the next one."""

import io
import os
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from vitfast import ops
from vitfast.runtime import native

pytestmark = pytest.mark.skipif(
    sys.platform != "linux" or bool(native.reasons()), reason="needs the extension, on Linux"
)
LARGE = 8 << 20


@pytest.fixture(autouse=True)
def nothing_kept():
    module = native._with_pages()
    module.limit_pages(0)
    module.limit_pages(64 << 20)
    yield module
    native._with_pages.cache_clear()


def large(fill=None, dtype=torch.float32, nbytes=LARGE):
    t = native.empty((2, nbytes // dtype.itemsize // 2), dtype)
    return t if fill is None else t.fill_(fill)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_freed_memory_is_taken_again(dtype, nothing_kept):
    taken = nothing_kept.pages_use()[0]
    first = large(dtype=dtype)
    assert first.dtype == dtype and first.is_contiguous() and not first._is_view()
    assert nothing_kept.pages_use() == (taken + LARGE, 0)
    address = first.data_ptr()
    del first
    assert nothing_kept.pages_use() == (taken, LARGE)
    assert large().data_ptr() == address


def test_not_while_anything_looks_at_it():
    first = large(1.0)
    look, saved = first[1:, 5:], first.untyped_storage()
    address = first.data_ptr()
    del first
    assert large(2.0).data_ptr() != address
    del saved
    assert large(3.0).data_ptr() != address
    assert (look == 1).all()


def test_not_for_what_is_much_smaller(nothing_kept):
    first = large(nbytes=2 * LARGE)
    address = first.data_ptr()
    del first
    assert large().data_ptr() != address
    assert large(nbytes=2 * LARGE - (2 << 20)).data_ptr() == address


def test_so_much_is_kept_and_no_more(nothing_kept):
    together = [large(nbytes=40 << 20) for _ in range(3)]
    newest = together[-1].data_ptr()
    while together:
        together.pop(0)
    assert nothing_kept.pages_use()[1] == 40 << 20
    assert large(nbytes=40 << 20).data_ptr() == newest


def test_a_capsule_that_nobody_takes_is_given_back(nothing_kept):
    before = nothing_kept.pages_use()[0]
    capsule = nothing_kept.pages_tensor((LARGE,), 2, 32)
    assert nothing_kept.pages_use()[0] == before + 4 * LARGE
    del capsule
    assert nothing_kept.pages_use()[0] == before


def test_threads_get_memory_of_their_own():
    def work(i):
        for _ in range(50):
            t = large(float(i))
            if not (t == i).all():
                return False
        return True

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(work, range(8)))


def test_results_are_ordinary_tensors():
    x = torch.randn(4096, 1024)
    y = ops.layer_norm(x, backend="cpu")
    assert y.nbytes >= LARGE
    file = io.BytesIO()
    torch.save(y, file)
    file.seek(0)
    assert torch.equal(torch.load(file), y)
    kept = y.clone()
    y.add_(1)
    assert torch.equal(y, kept + 1)
    leaf = x.requires_grad_()
    z = ops.layer_norm(leaf, backend="cpu")
    z.mul_(2).sum().backward()
    assert leaf.grad.shape == x.shape


def test_a_child_process_has_its_own():
    first = large(1.0)
    child = os.fork()
    if child == 0:  # so little at a time that no thread of the parent is missed
        second = large()
        second[0, :8] = 2
        first[0, :8] = 3
        os._exit(0 if second[0, :8].sum() == 16 else 1)
    assert os.waitpid(child, 0)[1] == 0
    assert (first == 1).all()


def test_other_devices_and_small_tensors_are_torchs(nothing_kept):
    before = nothing_kept.pages_use()
    assert native.empty((4, 1 << 22), torch.float32, torch.device("meta")).is_meta
    assert native.empty((3, 0, 1 << 30), torch.float32).numel() == 0
    assert native.empty((16,), torch.float32).shape == (16,)
    with torch.device("meta"):
        assert large().is_cpu
    assert nothing_kept.pages_use()[0] == before[0]


def test_what_is_free_does_not_stand_in_the_way():
    import resource

    together = [large(nbytes=16 << 20) for _ in range(4)]
    del together
    child = os.fork()
    if child == 0:
        with open("/proc/self/statm") as file:
            mapped = int(file.read().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (mapped + (8 << 20),) * 2)
        try:
            fits = large(nbytes=40 << 20).nbytes == 40 << 20
        except RuntimeError:
            fits = False
        os._exit(0 if fits else 1)
    assert os.waitpid(child, 0)[1] == 0
