"""The performance model: occupancy, floors and bounds against what can be computed by hand."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from vitfast import ops
from vitfast.runtime.launches import Arch

triton = pytest.importorskip("triton")

from vitfast.testing import aot, model, model_page, recorded  # noqa: E402

PAGE = Path(__file__).parents[2] / "benchmarks" / "results" / "model" / "KERNELS.md"


@pytest.mark.parametrize(
    ("target", "registers", "shared", "warps", "blocks"),
    [
        ("sm_80", 32, 0, 8, 8),  # by threads: 8 x 256 = 2048
        ("sm_80", 64, 0, 8, 4),  # by registers: 65536 / (64 x 256)
        ("sm_80", 33, 0, 8, 6),  # allotted as 40: 12 warps a scheduler
        ("sm_80", 255, 0, 4, 2),  # as 256: 2 warps a scheduler
        ("sm_80", 255, 0, 16, 0),  # does not fit: 8 warps there are
        ("sm_80", 16, 48 * 1024, 4, 3),  # 164 KiB / 49
        ("sm_80", 16, 0, 1, 32),  # by blocks
        ("sm_89", 32, 0, 8, 6),  # by threads: 6 x 256 = 1536
        ("sm_89", 16, 0, 1, 24),
        ("sm_89", 32, 99 * 1024, 4, 1),
        ("sm_90", 32, 113 * 1024, 4, 2),  # 228 KiB / 114
        ("sm_90", 32, 227 * 1024, 4, 1),
        ("sm_90", 168, 0, 12, 1),
    ],
)
def test_occupancy(target, registers, shared, warps, blocks):
    """Cases of NVIDIA's occupancy calculator."""
    assert model.resident(target, registers, shared, warps) == blocks


def _only(op, sample, target, which="forward", batch=4):
    """(launch, work, cost) of an op's one kernel."""
    spec = ops.spec_of(op)
    found = next(s for s in spec.samples if s.name == sample)
    call, cost = recorded.real_call(spec, found, torch.bfloat16, batch)
    (launch,) = recorded.passes(call, spec.public, Arch(target))[which]
    return launch, model.work(launch, target), cost


@pytest.mark.parametrize(
    ("op", "sample"),
    [("layer_norm", "vit_base_224"), ("attention", "vit_base_224"),
     ("linear_act", "vit_base_224_fc1"), ("residual_add", "vit_base_224")],
)  # fmt: skip
def test_memory_floor_is_the_specs(op, sample):
    spec = ops.spec_of(op)
    found = next(s for s in spec.samples if s.name == sample)
    call, cost = recorded.real_call(spec, found, torch.bfloat16, 4)
    (launch,) = recorded.passes(call, spec.public, Arch("sm_80"))["forward"]
    assert model.array_bytes(launch) == cost.bytes


@pytest.mark.parametrize("target", ["sm_80", "sm_90"])
def test_attention_by_hand(target):
    """197 queries and keys are padded to whole tiles; all products are made, none twice.

    Tiles whose keys are all there have a loop of their own.
    """
    launch, work, cost = _only("attention", "vit_base_224", target)
    m, n = launch.arguments["BLOCK_M"], launch.arguments["BLOCK_N"]
    queries, keys = -(-197 // m) * m, -(-197 // n) * n
    assert work.flops * launch.programs == 4 * 4 * 12 * queries * keys * 64
    assert cost.flops == 4 * 4 * 12 * 197 * 197 * 64
    assert launch.programs == 4 * 12 * queries // m
    assert any(times == 197 // n for _, times in work.loops)
    for device in (d for d in model.DEVICES if d.target == target):
        b = model.bound(launch, work, device, cost)
        assert b.math == pytest.approx(1e6 * cost.flops / device.tensor_flops)
        assert b.memory == pytest.approx(1e6 * cost.bytes / device.bandwidth)
        assert b.bound >= b.memory and 0 < b.occupancy <= 1
        assert b.bound >= 1e6 * work.flops * launch.programs / device.tensor_flops


def test_peaks_are_those_of_data_sheets():
    """In TFLOP/s: tensor in half precision with float32 sums; float32."""
    known = {"A100": (312, 19.5), "RTX 4090": (165.2, 82.6), "H100": (989, 61.8)}
    for device in model.DEVICES[:3]:
        found = device.tensor_flops / 1e12, device.float_flops / 1e12
        assert found == pytest.approx(known[device.name], rel=0.02)


def test_the_busiest_part_bounds():
    """1000 exponentials and 3000 additions a warp: 16 and, on sm_90, 128 lanes a cycle."""
    pipes = dict.fromkeys(model.sass.PIPES, 0.0) | {"xu": 1000.0, "fma": 3000.0}
    work = model.Work(pipes, {}, 0.0, 0.0, 0.0, 0.0, (), 32, 0, 1)
    cycles = work.cycles(model.MULTIPROCESSORS["sm_90"])
    assert (cycles["xu"], cycles["fma"], cycles["issue"]) == (2000, 750, 1000)
    launch = recorded.Recorded(
        None, (1320, 1, 1), {"x": recorded.Array(torch.float32, 1, 0, 4)}, {"num_warps": 1}
    )
    device = next(d for d in model.DEVICES if d.name == "H100")
    found = model.bound(launch, work, device)
    assert found.limit == "xu"
    assert found.bound == pytest.approx(1e6 * 10 * 2000 / device.hertz)


def test_batches_grow_what_images_do_not_share():
    spec = ops.spec_of("attention")
    sample = next(s for s in spec.samples if s.name == "beit_base_224")
    call, cost = recorded.real_call(spec, sample, torch.bfloat16, 8)
    shapes = {name: tuple(t.shape) for name, t in call.tensors()}
    assert shapes.pop("bias") == (1, 12, 197, 197)
    assert list(shapes.values()) == [(8, 197, 3, 12, 64)]
    assert cost.flops == 4 * 8 * 12 * 197 * 197 * 64


def test_recording_runs_nothing_and_gives_everything_back():
    x = torch.ones(2, 768)
    before = triton.runtime.jit.JITFunction.run
    launches = recorded.record(
        lambda: ops.layer_norm(x, torch.ones(768), torch.zeros(768), 1e-6), Arch("sm_90")
    )
    assert [launch.name for launch in launches] == ["forward_kernel"]
    assert triton.runtime.jit.JITFunction.run is before
    y = ops.layer_norm(x, torch.ones(768), torch.zeros(768), 1e-6)
    assert torch.equal(y, torch.zeros(2, 768))


@pytest.mark.parametrize(("target", "op"), [("sm_80", "rms_norm"), ("sm_89", "patch_merge")])
def test_no_kernel_without_a_bound(target, op):
    found = list(model.lines(target, {op}))
    assert {v.kernel for _, v in aot.variants(target, {op})} <= {f.launch.kernel for f in found}
    for f in found:
        assert {d.name for d in model.DEVICES if d.target == target} == set(f.bounds)
        assert all(b.bound >= b.memory > 0 and b.over > 0.99 for b in f.bounds.values())
    text = model_page._table(found, list(found[0].bounds))
    assert text.count("\n") == len(found) + 2


def test_the_committed_page_has_every_kernel():
    sections = re.split(r"^## ", PAGE.read_text(), flags=re.MULTILINE)[1:]
    assert [s.split(":")[0] for s in sections] == list(model.TARGETS)
    for target, section in zip(model.TARGETS, sections, strict=True):
        rows = [[c.strip() for c in line.split("|")[1:-1]] for line in section.splitlines()]
        known = {(row[0], row[3]) for row in rows if len(row) > 4}
        wanted = {(name.split("/")[0], v.kernel.__name__) for name, v in aot.variants(target)}
        assert wanted <= known
