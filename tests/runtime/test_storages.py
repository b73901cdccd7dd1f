"""Large results lie in memory that is kept for the next one."""

import io
import os
import pickle
import subprocess
import sys
import weakref
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from timm.models.vision_transformer import Block

from vitfast import ops
from vitfast.runtime import native
from vitfast.runtime.storages import Storages
from vitfast.swap import swap

pytestmark = [
    pytest.mark.skipif(
        sys.platform != "linux" or bool(native.reasons()), reason="needs the extension, on Linux"
    ),
    pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning"),
]
LARGE = 8 << 20


@pytest.fixture(autouse=True)
def kept(monkeypatch):
    """What is kept: nothing at first, at most 64 MiB."""
    storages = Storages(64 << 20)
    monkeypatch.setattr(native, "RESULTS", storages)
    return storages


def large(fill=None, dtype=torch.float32, nbytes=LARGE):
    t = native.empty((2, nbytes // dtype.itemsize // 2), dtype)
    return t if fill is None else t.fill_(fill)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_freed_memory_is_taken_again(dtype):
    first = large(dtype=dtype)
    assert first.dtype == dtype and first.is_contiguous() and not first._is_view()
    address = first.data_ptr()
    del first
    again = large(dtype=dtype)
    assert again.data_ptr() == address
    assert again.dtype == dtype and again.is_contiguous() and not again._is_view()
    assert again.untyped_storage().nbytes() == LARGE


def grad_fn(t):
    return (t.view(-1)[:4].requires_grad_() * t.view(-1)[:4]).grad_fn


HOLDERS = {
    "view": lambda t: t[1:, 5:],
    "detached": lambda t: t.detach(),
    "storage": lambda t: t.untyped_storage(),
    "part_of_the_storage": lambda t: t.untyped_storage()[4:8],
    "numpy": lambda t: t.numpy()[1:],
    "memoryview": lambda t: memoryview(t.numpy()),
    "dlpack": lambda t: torch.from_dlpack(t),
    "capsule": lambda t: t.__dlpack__(),
    "autograd": grad_fn,
    "weakref": lambda t: weakref.ref(t.untyped_storage()),
    "set": lambda t: torch.empty(0).set_(t),
    "parameter": lambda t: torch.nn.Parameter(t),
    "typed": lambda t: torch.storage.TypedStorage(wrap_storage=t.untyped_storage(),
                                                  dtype=t.dtype, _internal=True),
    "thread": lambda t: ThreadPoolExecutor(1).submit(lambda: t.untyped_storage()),
}  # fmt: skip


@pytest.mark.parametrize("holder", HOLDERS)
def test_not_while_anything_holds_it(holder):
    first = large(1.0)
    held = HOLDERS[holder](first)
    address = first.data_ptr()
    del first
    others = [large(float(i)) for i in range(2, 5)]
    assert address not in [other.data_ptr() for other in others]
    if holder in ("view", "storage", "numpy", "dlpack"):  # by then the others' would come first
        del held
        assert address in [t.data_ptr() for t in [large() for _ in range(2)]]


def test_so_much_is_kept_and_no_more(kept):
    together = [large(nbytes=n << 20) for n in (24, 24, 24, 72)]
    assert kept.nbytes() == 48 << 20
    oldest, *newer, largest = (t.data_ptr() for t in together)
    del together
    assert {large(nbytes=24 << 20).data_ptr() for _ in range(1)} <= set(newer)


def test_a_child_that_forks_while_a_thread_takes_does_not_wait(kept, fork_while_held):
    fork_while_held(kept._lock, large)


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


def test_other_devices_and_small_tensors_are_torchs(kept):
    assert native.empty((4, 1 << 22), torch.float32, torch.device("meta")).is_meta
    assert native.empty((3, 0, 1 << 30), torch.float32).numel() == 0
    assert native.empty((16,), torch.float32).shape == (16,)
    assert kept.nbytes() == 0
    with torch.device("meta"):
        assert large().is_cpu and large().is_cpu
    assert kept.nbytes() == 2 * LARGE


def an_op():
    return ops.layer_norm(torch.randn(4096, 1024), backend="cpu")


def a_block():
    block = Block(192, 3, qkv_bias=True).eval()
    swap(block)
    with torch.no_grad():
        return [block(torch.ones(8, 1024, 192)) for _ in range(5)][-1]


def resized(y):
    shape = y.shape
    return y.resize_(2, *shape)[0]


def concatenated(y):
    half = y.clone()
    return torch.cat([half, half], out=y)[len(half) :]


def offloaded(y):
    saved, storage = y.clone(), y.untyped_storage()
    storage.resize_(0)
    assert storage.nbytes() == 0
    large(2.0, nbytes=saved.nbytes)
    storage.resize_(saved.nbytes)
    return y.copy_(saved)


def pickled(y):
    found = pickle.loads(pickle.dumps(y))
    assert found.untyped_storage().nbytes() == y.nbytes
    return found


def shared(y):
    y.share_memory_()
    assert y.is_shared()
    return y


@pytest.mark.parametrize("make", [an_op, a_block])
@pytest.mark.filterwarnings("ignore:An output with one or more elements was resized")
@pytest.mark.parametrize("use", [resized, concatenated, offloaded, pickled, shared])
def test_storages_are_ordinary(make, use):
    for _ in range(2):  # the second time in memory that is used again
        y = make()
        expected = y.clone()
        assert y.nbytes > 4 << 20 and y.untyped_storage().resizable()
        changed = use(y)
        torch.testing.assert_close(changed, expected, rtol=0, atol=0)
        after = [large(7.0, nbytes=expected.nbytes) for _ in range(3)]  # none of them is y's
        torch.testing.assert_close(changed, expected, rtol=0, atol=0)
        del after


FREE = """
import resource
import torch
from vitfast.runtime import native

together = [native.empty((2, 2 << 20), torch.float32) for _ in range(4)]
del together
with open("/proc/self/statm") as file:
    mapped = int(file.read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (mapped + (8 << 20),) * 2)
print(native.empty((2, 5 << 20), torch.float32).nbytes)
"""


def test_what_is_free_does_not_stand_in_the_way():
    """In a process of its own: what others left in this one would count, too."""
    done = subprocess.run([sys.executable, "-c", FREE], capture_output=True, text=True, check=True)
    assert int(done.stdout) == 40 << 20


def test_nothing_is_kept_where_memory_is_low(kept, monkeypatch):
    monkeypatch.setattr(native.settings, "memory", "low")
    large()
    assert kept.nbytes() == 0
