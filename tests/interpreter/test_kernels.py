"""Every Triton kernel, forward and backward, on every sample that the interpreter can afford."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

import vitfast.ops
from vitfast.errors import BackendUnavailableError
from vitfast.ops.spec import OpSpec, Sample
from vitfast.runtime.launches import watching
from vitfast.runtime.triton import interpreting
from vitfast.testing.cases import Case
from vitfast.testing.errors import raise_if_wrong
from vitfast.testing.inputs import materialise, outputs_of
from vitfast.testing.refusals import may_refuse

DTYPES = (torch.float32, torch.float16)
FLOPS = 1e6
"""Work above this takes the interpreter seconds."""


def _affordable(spec: OpSpec, sample: Sample, flops: float = FLOPS) -> bool:
    if sample.tags & {"real", "large"}:
        return False
    if "tiles" in sample.tags:  # of the compiled kernels'; those here are smaller
        flops = min(flops, FLOPS / 20)
    args, kwargs = sample.make(torch.float32, torch.Generator())
    return spec.cost(args, kwargs).flops < flops


SAMPLES = [
    (spec, sample)
    for spec in vitfast.ops.specs()
    if "triton" in spec.dispatcher.backends
    for sample in spec.samples
    if _affordable(spec, sample)
]


_K = torch.randn(16, 1, 3, 3, generator=torch.Generator().manual_seed(2)).half() / 3
_W = torch.randn(8, 16, generator=torch.Generator().manual_seed(1)).half()
WIDE = [
    ("layer_norm", ((1, 3, 16), lambda x, b: vitfast.ops.layer_norm(x, backend=b))),
    ("add_norm", ((1, 3, 16), lambda x, b: vitfast.ops.add_norm(x, x, backend=b)[1])),
    ("norm_add", ((1, 3, 16), lambda x, b: vitfast.ops.norm_add(x, x, backend=b))),
    ("patch_merge", ((1, 3, 2, 4), lambda x, b: vitfast.ops.patch_merge(x, backend=b))),
    ("dwconv_norm", ((1, 3, 2, 16), lambda x, b: vitfast.ops.dwconv_norm(x, _K, backend=b))),
    ("grn", ((1, 3, 16), lambda x, b: vitfast.ops.grn(x, _W[0], _W[1], backend=b))),
    (
        "group_norm_act",
        (
            (1, 3, 16),
            lambda x, b: vitfast.ops.group_norm_act(
                x[:, :, None].permute(0, 3, 1, 2), 4, backend=b
            ),
        ),
    ),
    (
        "group_norm_act",
        ((1, 3, 2, 8), lambda x, b: vitfast.ops.group_norm_act(x, 1, backend=b)),
    ),
    ("attention", ((1, 3, 2, 16), lambda x, b: vitfast.ops.attention(x, x, x, backend=b))),
    (
        "window_attention",
        ((1, 3, 2, 3, 1, 16), lambda x, b: vitfast.ops.window_attention(x, (3, 2), backend=b)),
    ),
    ("linear_act", ((1, 3, 16), lambda x, b: vitfast.ops.linear_act(x, _W, act="gelu", backend=b))),
]


def test_triton_interprets():
    """Or it was loaded before TRITON_INTERPRET was set, and every test here would be skipped."""
    assert interpreting()


def _ids(pairs):
    return [f"{spec.name}-{sample.name}" for spec, sample in pairs]


def _run(case: Case, backward: bool) -> None:
    try:
        if not backward:
            raise_if_wrong(case.judge(case.outputs(backend="triton")))
        else:
            raise_if_wrong(case.judge_gradients(case.gradients(case.trained, backend="triton")))
    except BackendUnavailableError as error:
        assert may_refuse(case, "triton"), f"{case} has to run: {error}"
        pytest.skip(str(error).splitlines()[-1])


@pytest.mark.parametrize("dtype", DTYPES, ids=["float32", "float16"])
@pytest.mark.parametrize(("spec", "sample"), SAMPLES, ids=_ids(SAMPLES))
def test_against_the_reference(spec, sample, dtype):
    """Within the error criterion, between NaN guard zones, in memory that was NaN before."""
    if dtype == torch.float16 and sample.name == "logits_minus_43000":
        pytest.skip("these logits are beyond float16")
    if dtype == torch.float16 and "tiles" in sample.tags:
        pytest.skip("sizes are the same in float32")
    case = Case(spec, sample, dtype)
    _run(case, backward=False)
    _run(case, backward=True)


SMALL = [(spec, s) for spec, s in SAMPLES if "small" in s.tags and "empty" not in s.tags]


@pytest.mark.parametrize(("spec", "sample"), SMALL, ids=_ids(SMALL))
def test_gradients_are_those_of_the_forward(spec, sample):
    """torch.autograd.gradcheck in float64, along random directions: the interpreter is slow."""
    case = Case(spec, sample, torch.float64)
    call = case.call.requiring_grad(case.trained)

    def function(*tensors):
        changed = call.changed(**dict(zip(case.trained, tensors, strict=True)))
        return outputs_of(changed.run(spec.public, backend="triton"))

    inputs = [call.arguments[n] for n in case.trained]
    assert torch.autograd.gradcheck(function, inputs, fast_mode=True)


SWITCHED = (
    "tokens_257", "logits_80", "causal", "mask_keys", "blind_queries_bool", "head_dim_72", "bias",
)  # fmt: skip


@pytest.mark.parametrize("name", SWITCHED)
@pytest.mark.parametrize("switch", ["LAZY", "POLYNOMIAL"])
def test_switches_of_attention(switch, name):
    """Off until a device's table turns them on, so that no other test meets them."""

    def on(kernel, key, launch):
        if kernel != "attention.forward":
            return launch
        return replace(launch, blocks={**launch.blocks, switch: 1})

    spec = vitfast.ops.spec_of("attention")
    case = Case(spec, next(s for s in spec.samples if s.name == name), torch.float16)
    with watching(on):
        _run(case, backward=False)
        _run(case, backward=True)


@pytest.fixture
def many_tiles(monkeypatch):
    """Small windows on the kernels of large ones, with queries and keys in several tiles."""
    from vitfast.ops.window_attention import triton

    def in_tiles(kernel, key, launch):
        return replace(launch, blocks=dict.fromkeys(launch.blocks, 16))

    monkeypatch.setattr(triton, "in_one_tile", lambda arch, key: False)
    with watching(in_tiles):
        yield


@pytest.mark.usefixtures("many_tiles")
@pytest.mark.parametrize(
    "sample", [s for spec, s in SMALL if spec.name == "window_attention"], ids=lambda s: s.name
)
def test_windows_in_many_tiles(sample):
    case = Case(vitfast.ops.spec_of("window_attention"), sample, torch.float32)
    _run(case, backward=False)
    _run(case, backward=True)


@pytest.fixture
def many_parts(monkeypatch):
    """Groups that a program could hold, on the kernels of larger ones, in small tiles."""
    from vitfast.ops.group_norm_act import triton

    def in_tiles(kernel, key, launch):
        small = {n: size for n, size in (("ROWS", 16), ("PARTS", 2)) if n in launch.blocks}
        return replace(launch, blocks={**launch.blocks, **small})

    monkeypatch.setattr(triton, "in_one_program", lambda which, key: False)
    with watching(in_tiles):
        yield


@pytest.mark.usefixtures("many_parts")
@pytest.mark.parametrize(
    "sample",
    [s for spec, s in SAMPLES if spec.name == "group_norm_act" and _affordable(spec, s, FLOPS / 4)],
    ids=lambda s: s.name,
)
def test_groups_in_many_parts(sample):
    case = Case(vitfast.ops.spec_of("group_norm_act"), sample, torch.float32)
    _run(case, backward=False)
    _run(case, backward=True)


@pytest.mark.parametrize(
    "sample", [s for spec, s in SMALL if spec.name == "dwconv_norm"], ids=lambda s: s.name
)
def test_taps_in_parts_of_unequal_length(sample):
    """Few pixels in a part, of which the last one has fewer."""

    def short(kernel, key, launch):
        small = {"STRETCH": 4} if "STRETCH" in launch.blocks else {}
        return replace(launch, blocks={**launch.blocks, **small})

    with watching(short):
        _run(Case(vitfast.ops.spec_of("dwconv_norm"), sample, torch.float32), backward=True)


@pytest.mark.usefixtures("many_tiles")
@pytest.mark.parametrize("cosine", [False, True], ids=["plain", "cosine"])
def test_a_table_gains_nothing_in_total(cosine):
    """A query's dS sum to zero, and so does the table's gradient: also in half precision.

    The values are far from zero, so that the output's rounding is far above what it would take.
    Each gradient has the same bits whether or not others are wanted beside it.
    """
    g = torch.Generator().manual_seed(0)
    qkv = torch.randn(1, 5, 5, 3, 2, 16, generator=g)
    qkv[:, :, :, 2] += 8
    table = torch.randn(9 * 9, 2, generator=g)
    leaves = [t.requires_grad_() for t in (qkv.half(), table, torch.tensor([1.4, 2.4]))]
    leaves = leaves[: 3 if cosine else 2]
    seed = torch.randn(1, 5, 5, 2, 16, generator=g).half()

    def gradients(*wanted):
        given = [t if i in wanted else t.detach() for i, t in enumerate(leaves)]
        scale = {"logit_scale": given[2]} if cosine else {}
        out = vitfast.ops.window_attention(
            given[0], (5, 5), table=given[1], **scale, backend="triton"
        )
        return torch.autograd.grad(out, [given[i] for i in wanted], seed)

    alone = [gradients(i)[0] for i in range(len(leaves))]
    for one, other in zip(alone, gradients(*range(len(leaves))), strict=True):
        assert torch.equal(one, other)
    dtable = alone[1].double()
    assert (dtable.sum(0).abs() < 1e-5 * dtable.abs().sum(0)).all()


@pytest.mark.parametrize(("op", "view"), WIDE, ids=[op for op, _ in WIDE])
def test_offsets_beyond_int32(op, view):
    """Rows 2^30 elements apart: a 32-bit product of row and stride would wrap, and read elsewhere.

    The memory between the rows is never touched, so that it takes no room.
    """
    if "triton" not in vitfast.ops.spec_of(op).dispatcher.backends:
        pytest.skip(f"{op} has no Triton kernel")
    shape, run = view
    stride = 2**30 + 8
    store = torch.empty(3 * stride, dtype=torch.float16)
    wide = store.as_strided(shape, (0, stride, *torch.empty(shape[2:]).stride()))
    narrow = torch.randn(shape[1:], generator=torch.Generator().manual_seed(0)).half()
    wide[0].copy_(narrow)
    got, want = run(wide, "triton"), run(narrow[None], "reference")
    torch.testing.assert_close(got, want, atol=2e-3, rtol=2e-3)


@pytest.mark.parametrize("which", ["batch", "rows"])
@pytest.mark.parametrize(("op", "view"), WIDE, ids=[op for op, _ in WIDE])
def test_gradients_beyond_int32(op, view, which, monkeypatch):
    """As above, with images or rows 2^30 elements apart, forward and backward."""
    shape, run = view
    stride = 2**30 + 8
    store = torch.empty(3 * stride, dtype=torch.float16)
    inner = torch.empty(shape[2:]).stride()
    # As the only row of each image: what lies beyond is then found by the image alone.
    shape = (3, 1, *shape[2:]) if which == "batch" else shape
    steps = (stride, inner[0] * shape[2]) if which == "batch" else (0, stride)
    wide = store.as_strided(shape, (*steps, *inner))
    narrow = torch.randn(shape, generator=torch.Generator().manual_seed(0)).half()
    wide.copy_(narrow)
    found = []
    for x, backend in ((wide, "triton"), (narrow, "reference")):
        leaves = [t.detach().requires_grad_() for t in (x, _K, _W)]
        for name, leaf in zip(("_K", "_W"), leaves[1:], strict=True):
            monkeypatch.setitem(globals(), name, leaf)
        out = run(leaves[0], backend)
        seed = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).half()
        found.append((out.detach(), *torch.autograd.grad(out, leaves, seed, allow_unused=True)))
    for got, want in zip(*found, strict=True):
        if want is None:
            assert got is None
            continue
        torch.testing.assert_close(got, want, atol=4e-3, rtol=4e-3)


@pytest.mark.parametrize(
    "spec",
    [s for s in vitfast.ops.specs() if "triton" in s.dispatcher.backends],
    ids=lambda s: s.name,
)
def test_bfloat16_is_refused(spec):
    """The interpreter computes it wrongly and says nothing."""
    call = materialise(spec, spec.samples[0], torch.bfloat16)
    with pytest.raises(BackendUnavailableError, match="bfloat16"):
        call.run(spec.public, backend="triton")


@pytest.mark.parametrize("spec", [s for s in vitfast.ops.specs()], ids=lambda s: s.name)
def test_never_picked_unasked(spec):
    call = materialise(spec, spec.samples[0], torch.float16)
    call.run(spec.public)
    assert spec.dispatcher.picked != "triton"
