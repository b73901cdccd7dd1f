"""Every kernel of csrc/cuda, forward and backward, on the samples that the CPU can afford."""

import pytest
import torch

import vitfast.ops
from vitfast.errors import BackendUnavailableError
from vitfast.ops.dwconv_norm import cuda as dwconv
from vitfast.testing.cases import Case
from vitfast.testing.errors import raise_if_wrong

FLOPS = 2e6
"""Work above this takes the host seconds."""


def affordable(spec, sample):
    if sample.tags & {"real", "large"}:
        return False
    args, kwargs = sample.make(torch.float32, torch.Generator())
    return spec.cost(args, kwargs).flops < FLOPS


SAMPLES = [
    (spec, sample)
    for spec in vitfast.ops.specs()
    if "cuda" in spec.dispatcher.backends
    for sample in spec.samples
    if affordable(spec, sample)
]
REFUSED = {
    "dwconv_norm": {
        "tall_kernel", "no_affine", "kernel_1", "kernel_11_in_a_line", "kernel_21_in_a_column",
        "kernel_31", "offset",
    },
}  # fmt: skip
"""Samples whose kernels are not square, or of a size that none is compiled for."""


def run(case):
    half = (
        case.dtype == torch.float16
    )  # the CPU's norms, which stand in for a GPU's, do not take it
    if not (half and case.sample.name == "wide_rows"):
        raise_if_wrong(case.judge(case.outputs(backend="cuda")))
    if not half or case.call.arguments.get("norm", "layer") is None:
        raise_if_wrong(case.judge_gradients(case.gradients(case.trained, backend="cuda")))


@pytest.mark.usefixtures("host")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("spec", "sample"), SAMPLES, ids=lambda x: getattr(x, "name", None))
def test_against_the_reference(spec, sample, dtype):
    """Within the error criterion, between NaN guard zones, in memory that was NaN before."""
    case = Case(spec, sample, dtype)
    if sample.name in REFUSED[spec.name]:
        with pytest.raises(BackendUnavailableError, match="are implemented"):
            run(case)
        return
    run(case)


WIDTHS = (1, 31, 32, 33, 64, 96, 255, 256, 257, 383, 384, 385, 640, 641, 1024)


@pytest.mark.usefixtures("host")
@pytest.mark.parametrize("size", [3, 7, 11])
@pytest.mark.parametrize("channels", WIDTHS)
def test_channels_of_one_and_several_warps(channels, size):
    """About the launch bounds of the kernels that norm: 256, 384 and 640 threads."""
    g = torch.Generator().manual_seed(channels)
    x = torch.randn(2, 3, 5, channels, generator=g)
    weight = torch.randn(channels, 1, size, size, generator=g) / size
    bias = torch.randn(channels, generator=g)
    affine = torch.randn(channels, generator=g), torch.randn(channels, generator=g)
    given = (x, weight, bias, *affine)
    for t in given:
        t.requires_grad_()
    found, expected = (
        vitfast.ops.dwconv_norm(*given, eps=0.1, backend=backend)
        for backend in ("cuda", "reference")
    )
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    grad = torch.randn(expected.shape, generator=g)
    for of, to in zip(
        torch.autograd.grad(found, given, grad), torch.autograd.grad(expected, given, grad),
        strict=True,
    ):  # fmt: skip
        torch.testing.assert_close(of, to, rtol=1e-3, atol=1e-4)


@pytest.mark.usefixtures("host")
@pytest.mark.parametrize("parts", [1, 2, 3])
def test_blocks_that_sum_several_strips(parts, monkeypatch):
    monkeypatch.setattr(dwconv, "_PARTS", parts)
    spec = vitfast.ops.spec_of("dwconv_norm")
    for name in ("pixels_257", "kernel_7_over_odd_channels", "lines_of_several_tiles"):
        run(Case(spec, next(s for s in spec.samples if s.name == name), torch.float32))


@pytest.mark.usefixtures("host")
def test_lines_beyond_one_segment():
    """Strips of 14 lines, of which the last is shorter, and of 7 columns."""
    g = torch.Generator().manual_seed(0)
    x, weight = torch.randn(1, 33, 16, 40, generator=g), torch.randn(40, 1, 7, 7, generator=g)
    found, expected = (
        vitfast.ops.dwconv_norm(x, weight, backend=backend) for backend in ("cuda", "reference")
    )
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.usefixtures("host")
def test_the_same_bits_each_time_and_for_every_image():
    g = torch.Generator().manual_seed(0)
    x, weight = torch.randn(1, 9, 8, 24, generator=g), torch.randn(24, 1, 7, 7, generator=g)
    one = vitfast.ops.dwconv_norm(x, weight, backend="cuda")
    several = vitfast.ops.dwconv_norm(x.expand(3, -1, -1, -1), weight, backend="cuda")
    assert torch.equal(several, one.expand(3, -1, -1, -1))


@pytest.mark.usefixtures("host")
def test_automatically_nothing_runs_on_them():
    """No record shows yet that they are right on a GPU."""
    spec = vitfast.ops.spec_of("dwconv_norm")
    x, weight = torch.randn(1, 4, 4, 8), torch.randn(8, 1, 3, 3)
    vitfast.ops.dwconv_norm(x, weight)
    assert spec.dispatcher.picked != "cuda"
    assert "backend='cuda' runs it" in spec.dispatcher.backends["cuda"].unproven(None, train=False)


def test_without_a_gpu_it_says_so():
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    with pytest.raises(BackendUnavailableError, match="not on a GPU"):
        vitfast.ops.dwconv_norm(torch.randn(1, 4, 4, 8), torch.randn(8, 1, 3, 3), backend="cuda")
