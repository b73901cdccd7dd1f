"""vitfast among processes, threads, forks and missing packages, and over many calls."""

from __future__ import annotations

import socket
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import torch.nn.functional as F

import vitfast.ops as ops
from vitfast.runtime import native

needs_native = pytest.mark.skipif(bool(native.reasons()), reason="no native extension")


def python(code: str, timeout: float = 120) -> str:
    """Output of a fresh process."""
    run = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=timeout
    )
    assert run.returncode == 0, run.stderr[-3000:]
    return run.stdout


FORK = """
import torch
torch.set_num_threads(2)
import vitfast.ops as ops

def work(seed):
    x = torch.randn(4, 197, 96, generator=torch.Generator().manual_seed(seed))
    qkv = x.reshape(4, 197, 3, 2, 16)
    return torch.cat([ops.layer_norm(x).flatten(), ops.attention(qkv).flatten(),
                      ops.linear_act(x, torch.eye(96), act="gelu").flatten()])

class Data(torch.utils.data.Dataset):
    def __len__(self):
        return 6
    def __getitem__(self, i):
        return work(i)

if __name__ == "__main__":
    expected = torch.stack([work(i) for i in range(6)])  # native kernels, two threads, first
    loader = torch.utils.data.DataLoader(
        Data(), batch_size=1, num_workers=2, multiprocessing_context="fork", timeout=50)
    got = torch.cat(list(loader))
    print(torch.equal(got, expected) or float((got - expected).abs().max()))
"""


@needs_native
def test_forked_loader_workers_after_a_threaded_call():
    """libgomp does not survive a fork after a parallel region; one thread must not need it."""
    result = python(FORK, timeout=60).strip()
    assert result == "True" or float(result) < 1e-5


def test_eight_threads_calling_the_same_ops():
    g = torch.Generator().manual_seed(0)
    inputs = [torch.randn(2, 50, 96, generator=g) for _ in range(8)]
    weight = torch.randn(64, 96, generator=g)

    def work(x):
        x = x.clone().requires_grad_()
        w = weight.clone().requires_grad_()
        out = ops.attention(x.view(2, 50, 3, 2, 16)).flatten(2)
        y = ops.linear_act(ops.layer_norm(x), w, act="gelu").sum() + out.square().sum()
        return torch.autograd.grad(y, (x, w))

    expected = [work(x) for x in inputs]
    with ThreadPoolExecutor(8) as pool:
        results = list(pool.map(work, inputs * 20, timeout=240))
    for got, want in zip(results, expected * 20, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


def test_a_weight_shared_by_threads_and_changed_between_is_never_stale():
    weight = torch.nn.Parameter(torch.randn(64, 96))
    x = torch.randn(4, 96)
    for step in range(5):
        with torch.no_grad():
            weight.add_(1)
            want = F.gelu(F.linear(x, weight))
        with ThreadPoolExecutor(4) as pool:
            results = pool.map(lambda _: _inference(x, weight), range(8))
        for got in results:
            torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4, msg=f"step {step}")


@torch.no_grad()
def _inference(x, weight):
    return ops.linear_act(x, weight, act="gelu")


SOAK = """
import resource, torch
import vitfast.ops as ops
torch.set_num_threads(2)

def rss():
    with open("/proc/self/statm") as f:
        return int(f.read().split()[1]) * resource.getpagesize()

def call(i):
    n, c = 1 + 37 * i % 200, 48 * (1 + i % 4)
    x = torch.randn(1 + i % 3, n, c, requires_grad=True)
    w = torch.randn(2 * c, c, requires_grad=True)
    y = ops.layer_norm(x, torch.ones(c), torch.zeros(c))
    residual, y = ops.add_norm(x, y)
    a = ops.attention(y.view(*y.shape[:2], 3, c // 48, 16))
    z = ops.linear_act(y, w, act="gelu")
    (z.mean() + a.mean() + residual.mean()).backward()
    with torch.no_grad():
        ops.linear_act(y, w, act="gelu")

for i in range(200):
    call(i)
before = rss()
for i in range(500):
    call(i)
print(rss() - before)
"""


@needs_native
def test_five_hundred_calls_of_varied_shapes_leave_no_memory_behind():
    assert int(python(SOAK, timeout=300)) < 20 * 2**20


NO_TIMM = """
import sys

class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {blocked!r}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)

sys.meta_path.insert(0, Blocker())
import torch, vitfast, vitfast.ops as ops
x = torch.randn(2, 5, 48)
y = ops.layer_norm(x)
residual, normed = ops.add_norm(x, y)
out = ops.attention(y.view(2, 5, 3, 2, 8))
z = ops.linear_act(normed, torch.randn(7, 48), act="gelu")
tokens = ops.patch_embed(torch.randn(1, 3, 8, 8), torch.randn(6, 3, 4, 4))
print(*(tuple(t.shape) for t in (out, z, tokens)))
"""


@pytest.mark.parametrize(
    "blocked", [["timm"], ["timm", "triton", "rich", "xformers", "torchvision"]]
)
def test_ops_work_without_optional_packages(blocked):
    out = python(NO_TIMM.format(blocked=blocked))
    assert out.strip() == "(2, 5, 2, 8) (2, 5, 7) (1, 4, 6)"


def test_swap_without_timm_says_what_is_missing():
    code = (
        NO_TIMM.format(blocked=["timm"])
        + """
try:
    vitfast.swap(torch.nn.Linear(2, 2))
except ImportError as error:
    print("ImportError:", error)
"""
    )
    assert "ImportError:" in python(code) and "timm" in python(code).split("ImportError:")[1]


SOCKETS = """
import socket
def refuse(*args, **kwargs):
    raise AssertionError("a socket was opened")
socket.socket.__init__ = refuse
socket.create_connection = refuse
import timm, torch, vitfast
model = timm.create_model("vit_tiny_patch16_224", img_size=32, depth=1).eval()
vitfast.swap(model)
with torch.no_grad():
    model(torch.randn(1, 3, 32, 32))
vitfast.restore(model)
print("quiet")
"""


def test_the_suite_itself_refuses_connections():
    with pytest.raises(AssertionError, match="a connection to"):
        socket.create_connection(("127.0.0.1", 9), timeout=1)


def test_no_socket_is_opened():
    assert python(SOCKETS).strip() == "quiet"


@needs_native
def test_one_thread_and_many_threads_in_one_process():
    """torch.set_num_threads is obeyed at once, in both directions, with the same bits."""
    x = torch.randn(3, 301, 96)
    results = []
    for threads in (1, 4, 2, 1, 3):
        torch.set_num_threads(threads)
        results.append(
            torch.cat([ops.layer_norm(x), ops.attention(x.view(3, 301, 3, 2, 16)).flatten(2)], 2)
        )
    assert all(torch.equal(results[0], r) for r in results)
