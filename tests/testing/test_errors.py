"""The error criterion accepts what is right and rejects every kind of wrong it is there for."""

from __future__ import annotations

import math

import pytest
import torch

from vitfast.testing.errors import assert_close, compare, ulp

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def attention(q, k, v):
    return (q @ k.mT * q.shape[-1] ** -0.5).softmax(-1) @ v


@pytest.fixture(scope="module", params=DTYPES, ids=lambda d: str(d).removeprefix("torch."))
def run(request):
    """Attention over [2, 4, 33, 16]: reference in float64, base in the dtype."""
    g = torch.Generator().manual_seed(7)
    qkv = [torch.randn(2, 4, 33, 16, generator=g).to(request.param) for _ in range(3)]
    return attention(*[t.double() for t in qkv]), attention(*qkv)


def _truncated(base, reference):
    bits, drop = (torch.int64, 29) if base.dtype == torch.float32 else (torch.int32, None)
    if base.dtype == torch.float32:
        return (reference.view(bits) >> drop << drop).view(torch.float64).float()
    drop = 16 if base.dtype == torch.bfloat16 else 13
    return (reference.float().view(bits) >> drop << drop).view(torch.float32).to(base.dtype)


def _at(t, index, value):
    t = t.clone()
    t[index] = value
    return t


WRONG = {
    "zeros": lambda t: torch.zeros_like(t),
    "all_nan": lambda t: torch.full_like(t, math.nan),
    "stale_copy": lambda t: t.roll(1, 0),
    "swapped_heads": lambda t: t[:, [1, 0, 2, 3]],
    "swapped_tokens": lambda t: _at(_at(t, (0, 0, 3), t[0, 0, 4]), (0, 0, 4), t[0, 0, 3]),
    "scaled_1.01": lambda t: (t.double() * 1.01).to(t.dtype),
    "scaled_0.99": lambda t: (t.double() * 0.99).to(t.dtype),
    "negated": lambda t: -t,
    "one_element_zero": lambda t: _at(t, (1, 2, 30, 5), t[1, 2, 30, 5] + 0.3),
    "one_element_nan": lambda t: _at(t, (1, 2, 30, 5), math.nan),
    "one_element_inf": lambda t: _at(t, (1, 2, 30, 5), math.inf),
    "constant_bias": lambda t: (t.double() + 3 * ulp(0.25, t.dtype)).to(t.dtype),
    "tail_unwritten_nan": lambda t: _at(t, (..., slice(15, None)), math.nan),
    "tail_unwritten_zero": lambda t: _at(t, (1, 3, 32), 0.0),
    "tail_unwritten_garbage": lambda t: _at(
        t, (1, 3, 32), 1e30 if t.dtype != torch.float16 else 6e4
    ),
    "one_dtype_down": lambda t: t.to(
        torch.bfloat16 if t.dtype != torch.bfloat16 else torch.float8_e4m3fn
    ).to(t.dtype),
}


@pytest.mark.parametrize("fault", WRONG)
def test_wrong_results_are_rejected(run, fault):
    reference, base = run
    with pytest.raises(AssertionError, match="output"):
        assert_close(WRONG[fault](base), reference, base)


@pytest.mark.parametrize("dtype", DTYPES)
def test_truncation_instead_of_rounding_is_rejected(dtype):
    reference = torch.randn(
        300, 64, dtype=torch.float64, generator=torch.Generator().manual_seed(0)
    )
    base = reference.to(dtype)
    assert not compare(_truncated(base, reference), reference, base).ok


@pytest.mark.parametrize("run", DTYPES[1:], indirect=True)
def test_truncation_is_noticed_as_shrinking_beside_a_noisy_base(run):
    reference, base = run
    report = compare(_truncated(base, reference), reference, base)
    assert any(p.startswith("(d)") for p in report.problems)


def test_errors_shared_by_clusters_are_no_bias():
    """Rows that share an error make a larger mean than independent elements would."""
    g = torch.Generator().manual_seed(4)
    reference = torch.randn(40, 500, generator=g, dtype=torch.float64)
    common = torch.randn(2, 40, 1, generator=g, dtype=torch.float64) * 3e-7
    one, other = ((reference + c).float() for c in common)
    assert compare(one, reference, other).ok
    assert not compare((one.double() + 6e-7).float(), reference, other).ok


def test_right_results_are_accepted(run):
    reference, base = run
    for right in (base, reference.to(base.dtype)):
        (report,) = assert_close(right, reference, base)
        assert report.ok and report.error_over_budget <= 1 and report.rms_over_budget <= 1


def test_another_order_of_summation_is_accepted(run):
    _, base = run
    g = torch.Generator().manual_seed(1)
    x = torch.randn(64, 300, generator=g).to(base.dtype)
    w = torch.randn(300, 40, generator=g).to(base.dtype)
    order = torch.randperm(300, generator=g)
    assert_close(x[:, order] @ w[order], x.double() @ w.double(), x @ w)


@pytest.mark.parametrize("scale", [1e-6, 1e-3, 1.0, 100.0])
@pytest.mark.parametrize("dtype", DTYPES[:2])
def test_the_verdict_does_not_depend_on_scale(dtype, scale):
    g = torch.Generator().manual_seed(3)
    reference = torch.randn(64, 64, generator=g, dtype=torch.float64) * scale
    base = reference.to(dtype)
    assert compare(base, reference, base).ok
    for fault in ("zeros", "scaled_1.01", "negated", "one_dtype_down"):
        assert not compare(WRONG[fault](base), reference, base).ok, fault


@pytest.mark.parametrize(("largest", "right"), [(7e-6, True), (1e-5, False)])
def test_the_largest_of_few_errors_of_the_base_is_luck(largest, right):
    """All of its errors are 1e-6 here; as a rule the largest is four times the rms."""
    reference = torch.randn(64, generator=torch.Generator().manual_seed(0)).double()
    error = torch.tensor([1e-6, -1e-6]).double().repeat(32)
    actual = (reference + _at(error, 9, largest)).float()
    assert compare(actual, reference, (reference + error).float()).ok == right


@pytest.mark.parametrize("n", [1, 2, 5, 17])
@pytest.mark.parametrize("dtype", DTYPES)
def test_few_elements_correctly_rounded_are_accepted(dtype, n):
    """With few elements the base may be exact by luck; a rounding must still pass."""
    for seed in range(200):
        g = torch.Generator().manual_seed(seed)
        reference = torch.randn(n, generator=g, dtype=torch.float64) + 2
        rounded = reference.to(dtype)
        lucky = reference.to(dtype).double()
        assert compare(rounded, reference, rounded).ok
        assert compare(rounded, lucky, rounded).ok
        neighbour = _at(rounded, 0, rounded[0].double() + ulp(float(rounded[0]), dtype))
        assert n > 5 or compare(neighbour, lucky, rounded).ok


def test_a_small_wrong_element_beside_outliers_is_rejected_in_float32():
    reference = torch.randn(64, 64, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    reference[:, :2] *= 5000
    base = reference.float()
    wrong = _at(base, (5, 9), base[5, 9] + 1e-3)
    report = compare(wrong, reference, base)
    assert [p[:3] for p in report.problems] == ["(g)"]
    assert report.max_error <= report.max_allowed


def test_a_toothless_case_is_rejected():
    """PyTorch's own error is as large as the values: even zeros would pass (b)."""
    reference = torch.randn(4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    base = (reference + 0.2 * reference.roll(1)).float()
    report = compare(reference.float(), reference, base)
    assert any("toothless" in p for p in report.problems)


def test_a_zero_reference_needs_the_opt_out():
    reference = torch.zeros(4, 5, dtype=torch.float64)
    base = torch.zeros(4, 5)
    assert not compare(base, reference, base).ok
    assert compare(base, reference, base, zero=True).ok
    assert not compare(base + 1e-6, reference, base, zero=True).ok
    assert not compare(_at(base, (0, 0), math.nan), reference, base, zero=True).ok


def test_the_opt_out_is_refused_where_the_reference_is_not_zero():
    reference = torch.ones(4, 5, dtype=torch.float64)
    assert not compare(torch.ones(4, 5), reference, torch.ones(4, 5), zero=True).ok


def test_masks_of_nan_and_infinities():
    reference = torch.randn(6, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    reference[0, 0], reference[0, 1], reference[0, 2] = math.nan, math.inf, -math.inf
    base = reference.float()
    assert compare(base, reference, base).ok
    for index, value in (
        ((0, 0), 1.0),
        ((0, 1), -math.inf),
        ((0, 2), math.nan),
        ((3, 3), math.nan),
    ):
        report = compare(_at(base, index, value), reference, base)
        assert report.mask_mismatches == 1
        assert report.worst_index == index


def test_overflow_of_the_working_dtype_is_right():
    reference = torch.tensor([1.0, 7e4, -1e5], dtype=torch.float64)
    half = reference.half()
    assert compare(half, reference, half).ok
    clamped = torch.tensor([1.0, 65504.0, -65504.0], dtype=torch.float16)
    assert not compare(clamped, reference, half).ok


def test_empty_and_scalar_tensors():
    assert compare(torch.zeros(0, 3), torch.zeros(0, 3, dtype=torch.float64), torch.zeros(0, 3)).ok
    half = torch.tensor(0.5, dtype=torch.float64)
    assert compare(half.float(), half, half.float()).ok
    assert compare(half.float() + 0.1, half, half.float()).worst_index == ()


def test_denormals_pass_and_their_flushing_is_judged():
    reference = torch.full((8, 8), 2.0**-130, dtype=torch.float64)
    base = reference.float()
    assert compare(base, reference, base).ok
    assert not compare(torch.zeros(8, 8), reference, base).ok


def test_shape_and_dtype_are_compared_before_the_numbers():
    reference = torch.ones(3, 4, dtype=torch.float64)
    base = reference.float()
    assert "shape" in str(compare(torch.ones(4, 3), reference, base))
    assert "dtype" in str(compare(torch.ones(3, 4).bfloat16(), reference, base))
    with pytest.raises(ValueError, match="float64"):
        compare(base, base, base)
    with pytest.raises(ValueError, match="judges"):
        compare(reference, reference, reference)


def test_the_message_names_the_worst_element():
    reference = torch.arange(1.0, 13.0, dtype=torch.float64).view(3, 4)
    base = reference.float()
    with pytest.raises(
        AssertionError, match=r"(?s)y.*\[1, 2\].*got 9.*expected 7.*\(b\) max error 2"
    ):
        assert_close(_at(base, (1, 2), 9.0), reference, base, name="y")


def test_every_output_of_a_sequence_is_judged():
    reference = torch.randn(9, 9, dtype=torch.float64, generator=torch.Generator().manual_seed(5))
    base = reference.float()
    with pytest.raises(AssertionError, match=r"out\[1\]"):
        assert_close((base, base * 1.01), (reference,) * 2, (base,) * 2, name="out")
    with pytest.raises(ValueError):
        assert_close((base,), (reference,) * 2, (base,) * 2)


def test_ulp():
    assert ulp(1.0, torch.float32) == 2.0**-23
    assert ulp(1.99, torch.bfloat16) == 2.0**-7
    assert ulp(-6.0, torch.float16) == 2.0**-8
    assert ulp(0.0, torch.float32) == 2.0**-149
