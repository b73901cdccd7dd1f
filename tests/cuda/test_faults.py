"""Faults planted in the sources of csrc/cuda: each must be caught, by numbers or by a sanitizer."""

import pytest
import torch

import vitfast.ops
from tests.cuda.running import (
    ROOT,
    HostError,
    as_program,
    compile_host,
    in_process,
    standing_in,
)
from vitfast.ops.dwconv_norm import cuda as dwconv
from vitfast.testing.cases import Case
from vitfast.testing.errors import raise_if_wrong

SPEC = vitfast.ops.spec_of("dwconv_norm")
SAMPLES = ("kernel_7_over_odd_channels", "pixels_256", "odd_sizes", "rms_of_7", "convolved_7")
FAULTS = {
    "tap of the next column": (
        "tap[ky * K + kx], to[i]", "tap[ky * K + (kx + 1) % K], to[i]",
    ),
    "tap of the next line": ("tap[ky * K + kx], to[i]", "tap[(ky + 1) % K * K + kx], to[i]"),
    "taps never turned round": ("a.flipped ? K * K - 1 - i : i", "i"),
    "column beside the map": ("column >= 0 && column < width", "column >= 0 && column <= width"),
    "last column left out": ("column >= 0 && column < width", "column >= 0 && column < width - 1"),
    "first line left out": ("if (mine && y >= 0 &&", "if (mine && y >= 1 &&"),
    "line of the ring": ("sum[(j - ky + K) % K];", "sum[(j - ky + K + 1) % K];"),
    "bias left out": ("sum[j][i] = bias;", "sum[j][i] = bias * 0.5f;"),
    "result before its last line": ("sum[(j + 1) % K];", "sum[j];"),
    "mean of half of the lanes": (
        "mask < a.lanes; mask *= 2) mean", "mask < a.lanes / 2; mask *= 2) mean",
    ),
    "squares about zero": (
        "fma(row[c] - mean, row[c] - mean, squares)", "fma(row[c], row[c], squares)",
    ),
    "eps outside the root": (
        "inverse_root(squares / static_cast<float>(C) + a.eps)",
        "inverse_root(squares / static_cast<float>(C)) + a.eps",
    ),
    "norm's bias left out": ("return a.shift ? weighted", "return !a.shift ? weighted"),
    "mean and scale exchanged": ("a.stats[2 * token] = mean", "a.stats[2 * token] = scale"),
    "gradient of another line": (
        "grads[(j - ky + K) % K];", "grads[(j - ky + K + 1) % K];",
    ),
    "bias of the last strip alone": (
        "totals[K * K * threads] += bias", "totals[K * K * threads] = bias",
    ),
    "first strip of a block alone": ("s < a.slots; ++s) sum +=", "s < 1; ++s) sum +="),
    "channels of the next warp": ("s * a.chunks * 32]", "s * (a.chunks + 1) * 32]"),
    "strips of another block": ("* a.slots + my.slot; unit < units", "* a.slots + 1; unit < units"),
}  # fmt: skip
RACES = {
    "no barrier before the norm": ("      barrier();\n      normalise", "      normalise"),
    "no barrier before the strips' sum": ("  barrier();\n  if (my.slot", "  if (my.slot"),
    "one buffer for two lines": ("line % 2 * (a.slots", "0 * (a.slots"),
}
OUTSIDE = {
    "a column too many": ("column >= 0 && column < width", "column >= 0 && column <= width"),
    "a channel too many": ("c < C && at.image", "c <= C && at.image"),
    "a line too many": ("y < a.height && y < at.end", "y <= a.height && y < at.end"),
    "buffers of twice the strips": (
        "(my.slot * kAcross + i)",
        "((my.slot + a.slots) * kAcross + i)",
    ),
}


def planted(folder, old, new):
    """A copy of csrc/cuda with one change."""
    for source in (ROOT / "csrc" / "cuda").iterdir():
        text = source.read_text()
        if source.name == "dwconv.cu":
            assert text.count(old) == 1, f"{old!r} is there {text.count(old)} times"
            text = text.replace(old, new)
        (folder / source.name).write_text(text)
    return folder


def judge(name):
    case = Case(SPEC, next(s for s in SPEC.samples if s.name == name), torch.float32)
    raise_if_wrong(case.judge(case.outputs(backend="cuda")))
    raise_if_wrong(case.judge_gradients(case.gradients(case.trained, backend="cuda")))


@pytest.fixture(autouse=True)
def several_strips(monkeypatch):
    """A block sums the gradients of the taps of more than one strip, as of large maps."""
    monkeypatch.setattr(dwconv, "_PARTS", 1)


@pytest.mark.usefixtures("compiler")
@pytest.mark.parametrize("fault", FAULTS.values(), ids=FAULTS)
def test_wrong_numbers_are_noticed(tmp_path, fault):
    library = compile_host(tmp_path, None, planted(tmp_path, *fault), ["VITFAST_FLOAT_ALONE"])
    with standing_in(in_process(library)), pytest.raises((AssertionError, HostError)):
        for name in SAMPLES:
            judge(name)


def under(kind, tmp_path, fault):
    sources = planted(tmp_path, *fault)
    program = compile_host(tmp_path, kind, sources, ["VITFAST_FLOAT_ALONE"])
    with standing_in(as_program(program, tmp_path)):
        x = torch.randn(2, 3, 9, 40, requires_grad=True)
        weight = torch.randn(40, 1, 3, 3, requires_grad=True)
        vitfast.ops.dwconv_norm(x, weight, backend="cuda").sum().backward()


@pytest.mark.usefixtures("compiler")
@pytest.mark.parametrize("fault", RACES.values(), ids=RACES)
def test_races_are_named(tmp_path, fault):
    """With both lines, though the turns of the fibers gave right numbers."""
    with pytest.raises(HostError, match=r"data race[\s\S]*dwconv\.cu[\s\S]*dwconv\.cu"):
        under("thread", tmp_path, fault)


@pytest.mark.usefixtures("compiler")
@pytest.mark.parametrize("fault", OUTSIDE.values(), ids=OUTSIDE)
def test_accesses_outside_are_named(tmp_path, fault):
    with pytest.raises(HostError, match=r"AddressSanitizer[\s\S]*intrinsics\.h|dwconv\.cu"):
        under("address", tmp_path, fault)
