"""The error criterion: the one function that decides whether a result is right.

A result is compared with two runs of the op's reference on the same rounded inputs: `reference`,
in float64, and `base`, in the working dtype. The base says how much error plain PyTorch makes on
these very numbers, so no tolerance is typed in by hand. With e = actual - reference,
b = base - reference, n elements and ulp the spacing of the working dtype at rms(reference):

(a) NaN, +inf and -inf stand where the reference (rounded to the working dtype) has them
(b) max|e| <= factor * max|b| + a0, where a0 = 2 max|(r + c - c) - r| for the rounded reference r
    and c = 0.3 min(1, max|r|): two more roundings, never below one ulp of the largest element; the
    largest of few errors is a matter of luck, so 4 rms(b), as of many, if max|b| is less
(c) rms(e) <= rms_factor * rms(b) + 0.1 ulp; for few elements rms(b) is itself a matter of luck, so
    the factor is (1 + 2 / sqrt(m)) times larger (at most `factor`), and one ulp of the largest
    element / sqrt(n) comes on top: one element may round the other way
(d) |mean(e)| <= 4 s + |mean(b)| + 0.05 ulp + one ulp of the largest element / n: a constant bias.
    The same for mean(e * sign(reference)), the shrinking of truncation, but with one ulp in
    float32, where a constant that is rounded once (scale * log2 e) shrinks all alike
    Here s is the standard error of mean(b): rms(b) / sqrt(n), or more where errors come in clusters
    (a row shares its statistics), judged by the means of b along each dimension; and m is
    (rms(b) / s)^2, the number of independent errors
(e) 1 - cosine(actual, reference) <= 1e-4 (float32: 1e-7), or that of the base times 2 or
    rms_factor^2 (it grows with the square of the error)
(f) max|reference| >= 20 * the error that (b) allows by max|b|; otherwise even zeros might pass, and
    the case is rejected as toothless
(g) where the working dtype is float32: |e| <= 4 * (1e-5 + 1.3e-6 |reference|) for every element
    (four times the default tolerance of torch.testing.assert_close), or 2 max|b| where that is more
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch

POWER = 20.0
COSINE_GAP = {torch.float32: 1e-7, torch.bfloat16: 1e-4, torch.float16: 1e-4}
_FLOAT32_ATOL, _FLOAT32_RTOL = 4e-5, 5.2e-6


@dataclass(frozen=True)
class ErrorReport:
    """How one tensor compares with its reference; `problems` is empty when it is right.

    Args:
        max_error, max_allowed: criterion (b).
        base_error: max|base - reference|, plain PyTorch's own error.
        rms_error, rms_allowed: criterion (c).
        bias, bias_allowed: criterion (d), the worse of the two means.
        cosine_gap, cosine_gap_allowed: 1 - cosine, criterion (e).
        power: max|reference| over the error that max|b| allows, criterion (f).
        mask_mismatches: elements that differ in being NaN or infinite, criterion (a).
        worst_index: where the error is largest (or the first mask mismatch); empty for a scalar.
    """

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    max_error: float
    max_allowed: float
    base_error: float
    rms_error: float
    rms_allowed: float
    bias: float
    bias_allowed: float
    cosine_gap: float
    cosine_gap_allowed: float
    power: float
    mask_mismatches: int
    worst_index: tuple[int, ...]
    worst_actual: float
    worst_expected: float
    problems: tuple[str, ...]

    @property
    def error_over_budget(self) -> float:
        """max_error / max_allowed: 1 is the limit."""
        return _ratio(self.max_error, self.max_allowed)

    @property
    def rms_over_budget(self) -> float:
        return _ratio(self.rms_error, self.rms_allowed)

    @property
    def ok(self) -> bool:
        return not self.problems

    def __str__(self) -> str:
        dtype = str(self.dtype).removeprefix("torch.")
        head = f"{self.name} {list(self.shape)} {dtype}"
        if self.ok:
            return f"{head}: {self.error_over_budget:.2f} of the error budget"
        at = list(self.worst_index)
        lines = [f"{head}: wrong; worst element {at}: got {self.worst_actual:.9g}, "
                 f"expected {self.worst_expected:.9g}"]  # fmt: skip
        return "\n".join(lines + [f"  - {p}" for p in self.problems])


def same_bits(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Whether two tensors have the same shape, dtype and bits, so that NaN equals itself."""
    if one.shape != other.shape or one.dtype != other.dtype:
        return False
    return torch.equal(*(t.detach().contiguous().flatten().view(torch.uint8) for t in (one, other)))


def compare(
    actual: torch.Tensor,
    reference: torch.Tensor,
    base: torch.Tensor,
    *,
    name: str = "output",
    factor: float = 2.0,
    rms_factor: float = 1.25,
    zero: bool = False,
    working: torch.dtype | None = None,
) -> ErrorReport:
    """Judge one tensor by the criterion of this module.

    Args:
        actual: the result; float32, bfloat16 or float16.
        reference: the reference's result in float64 on the same rounded inputs; same shape.
        base: the reference's result in the working dtype; same shape and dtype as actual.
        factor, rms_factor: OpSpec's forward_factor or backward_factor, and rms_factor.
        zero: the true result is zero but for rounding (say, the gradient of a bias that softmax
            cancels), so that only (a), (b) and (g) can be asked for, and (b), noise against noise,
            with twice the factor. Without it, such a case is rejected by (f); with it, a reference
            that is not zero is rejected.
        working: the working dtype, where actual has a wider one; actual's by default.

    Raises:
        ValueError: shapes or dtypes make the comparison meaningless.
    """
    if actual.dtype not in COSINE_GAP:
        raise ValueError(
            f"{name}: the criterion judges float32, bfloat16, float16, not {actual.dtype}"
        )
    if reference.dtype != torch.float64:
        raise ValueError(f"{name}: the reference must be float64, got {reference.dtype}")
    if reference.shape != base.shape:
        raise ValueError(f"{name}: reference {list(reference.shape)}, base {list(base.shape)}")
    mismatch = [
        f"{what}: got {got}, expected {want}"
        for what, got, want in (
            ("shape", list(actual.shape), list(base.shape)),
            ("dtype", actual.dtype, base.dtype),
        )
        if got != want
    ]
    if mismatch:
        return _unlike(name, actual, mismatch)
    with torch.no_grad():
        factor = 2 * factor if zero else factor
        working = working or actual.dtype
        return _judge(name, actual, reference, base, factor, rms_factor, zero, working)


def assert_close(
    actual: torch.Tensor | Sequence[torch.Tensor],
    reference: torch.Tensor | Sequence[torch.Tensor],
    base: torch.Tensor | Sequence[torch.Tensor],
    *,
    name: str = "output",
    factor: float = 2.0,
    rms_factor: float = 1.25,
    zero: bool = False,
    working: torch.dtype | None = None,
) -> list[ErrorReport]:
    """`compare` for a tensor or a sequence of them; returns the reports.

    Raises:
        AssertionError: some tensor breaks the criterion; names it, the worst element and why.
        ValueError: as `compare`.
    """
    tensors = [[t] if isinstance(t, torch.Tensor) else t for t in (actual, reference, base)]
    count = len(tensors[0])
    names = [name] if count == 1 else [f"{name}[{i}]" for i in range(count)]
    reports = [
        compare(
            *three, name=label, factor=factor, rms_factor=rms_factor, zero=zero, working=working
        )
        for label, *three in zip(names, *tensors, strict=True)
    ]
    raise_if_wrong(reports)
    return reports


def raise_if_wrong(reports: Iterable[ErrorReport]) -> None:
    """Raises AssertionError with every report that is not ok."""
    wrong = [str(report) for report in reports if not report.ok]
    if wrong:
        raise AssertionError("\n".join(wrong))


def ulp(value: float, dtype: torch.dtype) -> float:
    """Distance between neighbouring numbers of `dtype` at `value`."""
    info = torch.finfo(dtype)
    magnitude = max(abs(value), info.smallest_normal)
    return info.eps * 2.0 ** math.floor(math.log2(magnitude))


def _judge(
    name: str,
    actual: torch.Tensor,
    reference: torch.Tensor,
    base: torch.Tensor,
    factor: float,
    rms_factor: float,
    zero: bool,
    working: torch.dtype,
) -> ErrorReport:
    dtype = actual.dtype
    rounded = reference.to(dtype)
    mask_wrong = (
        (actual.isnan() != rounded.isnan())
        | (actual.isposinf() != rounded.isposinf())
        | (actual.isneginf() != rounded.isneginf())
    )
    judged = actual.isfinite() & rounded.isfinite()
    r = reference[judged]
    e = actual[judged].double() - r
    usable = judged & base.isfinite()
    b = base[usable].double() - reference[usable]
    n = r.numel()

    max_r, max_e, max_b = _max(r), _max(e), _max(b)
    rms_r, rms_e, rms_b = _rms(r), _rms(e), _rms(b)
    step = ulp(rms_r, dtype)
    one = ulp(max_r, dtype)
    whole = torch.where(usable, base.double() - reference, 0.0)

    rounding = _rounding(rounded[judged], max_r)
    max_allowed = factor * max(max_b, 4 * rms_b) + rounding
    few = _ratio(_standard_error(whole), rms_b)
    wide = min(rms_factor * (1 + 2 * few), max(factor, rms_factor))
    rms_allowed = wide * rms_b + 0.1 * step + one / math.sqrt(max(n, 1))
    bias, bias_allowed = _bias(e, r, whole, reference, one / max(n, 1), step, dtype)
    gap = _cosine_gap(actual[judged].double(), r)
    base_gap = _cosine_gap(base[usable].double(), reference[usable])
    gap_allowed = max(COSINE_GAP[working], max(2, rms_factor**2) * base_gap)
    power = _ratio(max_r, factor * max_b + rounding)

    problems = []
    mismatches = int(mask_wrong.sum())
    if mismatches:
        problems.append(f"(a) {mismatches} elements differ in being NaN or infinite")
    if max_e > max_allowed:
        problems.append(
            f"(b) max error {max_e:.3g}, allowed {max_allowed:.3g} (PyTorch's own is {max_b:.3g})"
        )
    if working == torch.float32:
        limit = (_FLOAT32_ATOL + _FLOAT32_RTOL * r.abs()).clamp_min(2 * max_b)
        over = int((e.abs() > limit).sum())
        if over:
            problems.append(f"(g) {over} elements off by more than 4e-5 + 5.2e-6 |expected|")
    if zero:
        if max_r > max_allowed:
            problems.append(f"(f) declared zero, but the reference reaches {max_r:.3g}")
    elif n:
        if rms_e > rms_allowed:
            problems.append(
                f"(c) rms error {rms_e:.3g}, allowed {rms_allowed:.3g} (PyTorch's own {rms_b:.3g})"
            )
        if bias > bias_allowed:
            problems.append(f"(d) biased: mean error {bias:.3g}, allowed {bias_allowed:.3g}")
        if gap > gap_allowed:
            problems.append(f"(e) 1 - cosine is {gap:.3g}, allowed {gap_allowed:.3g}")
        if power < POWER:
            problems.append(
                f"(f) toothless case: the largest value {max_r:.3g} is only {power:.3g} times the "
                f"allowed error (wanted {POWER:g}); change the inputs"
            )
    index = _worst(actual, reference, mask_wrong, judged)
    return ErrorReport(
        name=name,
        shape=tuple(actual.shape),
        dtype=dtype,
        max_error=max_e,
        max_allowed=max_allowed,
        base_error=max_b,
        rms_error=rms_e,
        rms_allowed=rms_allowed,
        bias=bias,
        bias_allowed=bias_allowed,
        cosine_gap=gap,
        cosine_gap_allowed=gap_allowed,
        power=power,
        mask_mismatches=mismatches,
        worst_index=index,
        worst_actual=float(actual[index]) if actual.numel() else 0.0,
        worst_expected=float(reference[index]) if actual.numel() else 0.0,
        problems=tuple(problems),
    )


def _unlike(name: str, actual: torch.Tensor, problems: list[str]) -> ErrorReport:
    nan, inf = math.nan, math.inf
    return ErrorReport(
        name, tuple(actual.shape), actual.dtype, inf, 0.0, nan, inf, 0.0, inf, 0.0, inf, 0.0, nan,
        0, (), nan, nan, tuple(problems),
    )  # fmt: skip


def _max(t: torch.Tensor) -> float:
    return float(t.abs().max()) if t.numel() else 0.0


def _rms(t: torch.Tensor) -> float:
    return float(t.square().mean().sqrt()) if t.numel() else 0.0


def _ratio(value: float, limit: float) -> float:
    if limit > 0:
        return value / limit
    return math.inf if value > 0 else 0.0


def _rounding(rounded: torch.Tensor, largest: float) -> float:
    """a0 of criterion (b)."""
    shift = 0.3 * min(1.0, largest)
    return max(2 * _max(((rounded + shift) - shift) - rounded), ulp(largest, rounded.dtype))


def _bias(
    e: torch.Tensor,
    r: torch.Tensor,
    base_error: torch.Tensor,
    reference: torch.Tensor,
    one: float,
    step: float,
    dtype: torch.dtype,
) -> tuple[float, float]:
    """The mean error, plain or towards zero, that is larger for what it may be; and its limit.

    Args:
        e, r: errors and reference of the judged elements.
        base_error, reference: in their full shape.
        one: what one element that rounds the other way adds to the mean.
    """
    if not e.numel():
        return 0.0, 0.0
    shrink = step if dtype == torch.float32 else 0.05 * step
    found = []
    for error, own, slack in (
        (e, base_error, 0.05 * step),
        (e * r.sign(), base_error * reference.sign(), shrink),
    ):
        noise = max(_standard_error(own), 0.3 * step / math.sqrt(e.numel()))
        limit = 4 * noise + abs(float(own.mean())) + one + slack
        found.append((abs(float(error.mean())), limit))
    return max(found, key=lambda pair: _ratio(*pair))


def _standard_error(t: torch.Tensor) -> float:
    """Of the mean of t: of independent elements, or of slices along a dimension if that is more.

    An estimate from few slices is itself uncertain and taken larger.
    """
    if not t.numel():
        return 0.0
    errors = [_rms(t) / math.sqrt(t.numel())]
    for dim, size in enumerate(t.shape):
        if 1 < size < t.numel():
            means = t.movedim(dim, 0).flatten(1).mean(1)
            errors.append(_rms(means) / math.sqrt(size) * (1 + 2 / math.sqrt(size - 1)))
    return max(errors)


def _cosine_gap(t: torch.Tensor, r: torch.Tensor) -> float:
    """1 - cosine, exact also where it is far below float64's epsilon of 1."""
    norms = float(t.norm()), float(r.norm())
    if min(norms) == 0:
        return 0.0 if max(norms) == 0 else 1.0
    return float((t / norms[0] - r / norms[1]).square().sum() / 2)


def _worst(
    actual: torch.Tensor, reference: torch.Tensor, mask_wrong: torch.Tensor, judged: torch.Tensor
) -> tuple[int, ...]:
    if not actual.numel():
        return ()
    error = torch.where(judged, (actual.double() - reference).abs(), 0.0)
    error = torch.where(mask_wrong, math.inf, error)
    return tuple(int(i) for i in torch.unravel_index(error.argmax(), error.shape))
