"""The host that stands in for a GPU: what it refuses, and its arithmetic."""

import ctypes
import struct

import pytest
import torch

from tests.cuda.running import ROOT, HostError, compile_host, in_process
from vitfast.runtime.cuda import Launch

KERNELS = """
#include "intrinsics.h"
namespace vitfast {
struct Arguments { const float* x; float* out; int n; };
VITFAST_KERNEL(reversed, 64, Arguments) {
  float* rows = static_cast<float*>(shared());
  rows[thread_index()] = a.x[thread_index()];
  barrier();
  a.out[thread_index()] = rows[threads_of_block() - 1 - thread_index()];
}
VITFAST_KERNEL(unwritten, 64, Arguments) {
  a.out[thread_index()] = static_cast<float*>(shared())[0];
}
VITFAST_KERNEL(half_of_them, 64, Arguments) { if (thread_index() < a.n) barrier(); }
VITFAST_KERNEL(a_warp_apart, 64, Arguments) {
  if (thread_index() < 32) shuffle_xor(0.f, 1);
  barrier();
  if (thread_index() == a.n) return;
  shuffle_xor(0.f, 1);
}
VITFAST_KERNEL(halves, 32, Arguments) {
  for (int i = thread_index(); i < a.n; i += 32) {
    u16* out = reinterpret_cast<u16*>(a.out);
    out[2 * i] = float_to_half(a.x[i]);
    out[2 * i + 1] = float_to_bfloat16(a.x[i]);
  }
}
VITFAST_KERNEL(floats, 32, Arguments) {
  const u16* x = reinterpret_cast<const u16*>(a.x);
  for (int i = thread_index(); i < a.n; i += 32) a.out[i] = half_to_float(x[i]);
}
}
"""


@pytest.fixture(scope="module")
def run(compiler, tmp_path_factory):
    sources = tmp_path_factory.mktemp("sources")
    (sources / "kernels.cu").write_text(KERNELS)
    text = (ROOT / "csrc" / "cuda" / "intrinsics.h").read_text()
    (sources / "intrinsics.h").write_text(text)
    call = in_process(compile_host(tmp_path_factory.mktemp("built"), None, sources))

    def launch(kernel, x, out, n=0, threads=64, layout="2Pi", more=()):
        values = (x, out, n, *more)
        call(Launch("kernels", kernel, (), 1, threads, 256, layout, values))
        return out

    return launch


def test_threads_see_what_others_wrote_before_a_barrier(run):
    x = torch.arange(64.0)
    assert torch.equal(run("reversed", x, torch.zeros(64)), x.flip(0))


def test_shared_memory_begins_as_nan(run):
    assert run("unwritten", torch.zeros(64), torch.zeros(64)).isnan().all()


def test_threads_that_never_come(run):
    with pytest.raises(HostError, match="32 of 64 threads wait for ever at a barrier"):
        run("half_of_them", torch.zeros(64), torch.zeros(64), n=32)
    with pytest.raises(HostError, match="31 of 64 threads wait for ever for the lanes of a warp"):
        run("a_warp_apart", torch.zeros(64), torch.zeros(64), n=40)


def test_launches_that_a_gpu_would_refuse(run):
    x = torch.zeros(96)
    with pytest.raises(HostError, match="96 threads"):
        run("reversed", x, x, threads=96)
    with pytest.raises(HostError, match="there is no kernel"):
        run("missing", x, x)
    with pytest.raises(HostError, match="takes 24 bytes of arguments, not 40"):
        run("reversed", x, x, layout="2Piqi", more=(0, 0))


def test_conversions_have_the_bits_of_torch(run):
    """Each binary16, every 7th float32 of each exponent, and what lies about its ends."""
    bits = torch.arange(0, 2**16, dtype=torch.int32).to(torch.int16)
    given = bits.view(torch.float16)
    found = run("floats", given, torch.zeros(2**16), n=2**16, threads=32)
    expected = given.float()
    assert torch.equal(found.isnan(), expected.isnan())
    assert torch.equal(
        found.nan_to_num(7.0).view(torch.int32), expected.nan_to_num(7.0).view(torch.int32)
    )
    edges = torch.cat([expected.nan_to_num(1.0) * f for f in (1.0, 1.0001, 0.9999, 1.00048828125)])
    out = torch.zeros(len(edges))
    run("halves", edges, out, n=len(edges), threads=32)
    pairs = out.view(torch.int16).view(-1, 2)
    assert torch.equal(pairs[:, 0], edges.half().view(torch.int16))
    assert torch.equal(pairs[:, 1], edges.bfloat16().view(torch.int16))


def test_a_structure_is_as_long_as_in_c():
    launch = Launch("", "", (), 1, 32, 0, "Pi", (None, 3))
    assert launch.arguments() == struct.pack("@Pi4x", 0, 3)
    assert len(launch.arguments()) == ctypes.sizeof(
        type("S", (ctypes.Structure,), {"_fields_": [("p", ctypes.c_void_p), ("i", ctypes.c_int)]})
    )
