"""Faults planted in the kernels' source: each must be caught by the error criterion.

A copy of the package gets one textual change and judges one sample in a process of its own.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest

import vitfast

PACKAGE = Path(vitfast.__file__).parent
ATTENTION, NORM = "ops/attention/triton_kernels.py", "ops/common/norm_triton_kernels.py"
ATTENTION_BACKWARD = "ops/attention/triton_kernels_backward.py"
WINDOW = "ops/window_attention/triton_kernels.py"
LARGE = "ops/window_attention/triton_kernels_large.py"
GRN, DWCONV = "ops/grn/triton_kernels.py", "ops/dwconv_norm/triton_kernels.py"
DWCONV_LAUNCH = "ops/dwconv_norm/triton.py"
GROUPS, GROUPS_LAUNCH = (f"ops/group_norm_act/{f}.py" for f in ("triton_kernels", "triton"))
TILES = "ops/common/triton_tiles.py"
LINEAR, PATCH = "ops/linear_act/triton_kernels.py", "ops/patch_embed/triton_kernels.py"
JUDGE = """
import json, os, sys, traceback
import torch, triton.language

def judge(package, op, sample):
    sys.path.insert(0, package)
    from vitfast import ops
    from vitfast.testing.cases import Case
    from vitfast.testing.errors import raise_if_wrong
    assert ops.__file__.startswith(package)
    spec = ops.spec_of(op)
    case = Case(spec, next(s for s in spec.samples if s.name == sample), torch.float32)
    raise_if_wrong(case.judge(case.outputs(backend="triton")))
    raise_if_wrong(case.judge_gradients(case.gradients(case.trained, backend="triton")))
    print("right")

for line in sys.stdin:
    package, op, sample, said = json.loads(line)
    child = os.fork()
    if child == 0:
        to = os.open(said, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(to, 1)
        os.dup2(to, 2)
        try:
            judge(package, op, sample)
        except BaseException:
            traceback.print_exc()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(0)
    os.waitpid(child, 0)
    print("done", flush=True)
"""
"""Judges one copy of vitfast after another, each in a process forked once torch is loaded, which
takes ten times as long as the rest; no thread is started before."""
FAULTS = {
    "dropped rescale": (ATTENTION, "o1 *= rescale[:, None]", "o1 *= 1.0", "attention", "tokens_65"),
    "rescale of the sum": (
        ATTENTION, "total *= rescale", "total *= 1.0", "attention", "tokens_65",
    ),
    "off-by-one mask": (ATTENTION, "tl.where(k < keys, s,", "tl.where(k <= keys, s,", "attention",
                        "tokens_17"),
    "causal one too far": (ATTENTION, "tl.where(k <= q, s,", "tl.where(k <= q + 1, s,", "attention",
                           "causal"),
    "swapped dk and dv": (ATTENTION_BACKWARD, "_put(dk_ptr, dk1 * scale,", "_put(dk_ptr, dv1,",
                          "attention", "tokens_17"),
    "delta left out": (ATTENTION_BACKWARD, "p * (dp - delta[:, None])", "p * dp", "attention",
                       "tokens_17"),
    "half of the head dim": (ATTENTION, "_tile(q_ptr, m, queries, q_n, q_d, D1, D, D2, False)",
                             "_tile(q_ptr, m, queries, q_n, q_d, 0, D, D2, False)", "attention",
                             "head_dim_72"),
    "the last keys seen by all": (ATTENTION, "whole = seen // BLOCK_N * BLOCK_N",
                                  "whole = (seen + BLOCK_N - 1) // BLOCK_N * BLOCK_N", "attention",
                                  "tokens_65"),
    "the last queries for whole": (ATTENTION_BACKWARD, "whole = queries // BLOCK_M * BLOCK_M",
                                   "whole = (queries + BLOCK_M - 1) // BLOCK_M * BLOCK_M",
                                   "attention", "tokens_65"),
    "a whole tile left out": (ATTENTION_BACKWARD, "whole if PART == 0 else queries,",
                              "whole - BLOCK_M if PART == 0 else queries,", "attention",
                              "tokens_65"),
    "missing other": (NORM, "tl.load(x_ptr + at, mask=mask, other=0.0)",
                      "tl.load(x_ptr + at, mask=mask, other=1.0)", "rms_norm", "prime_width"),
    "eps in the wrong place": (NORM, "tl.sqrt(tl.sum(d * d, axis=1) / c + eps)",
                               "(tl.sqrt(tl.sum(d * d, axis=1) / c) + eps)", "layer_norm",
                               "constant_rows"),
    "mean of the gradient left out": (NORM, "d -= (tl.sum(g, axis=1) / c)[:, None]", "d -= 0.0",
                                      "layer_norm", "prime_width"),
    "drop scale of another sample": (NORM, "drop_ptr + row // n", "drop_ptr + row % n", "add_norm",
                                     "prime_width"),
    "norm's scale of another sample": (NORM, "scale_ptr + row // n", "scale_ptr + row % n",
                                       "norm_add", "prime_width"),
    "gradient's scale left out": (
        NORM, "            if scale_ptr is not None:\n                g *=",
        "            if scale_ptr is None:\n                g *=", "norm_add", "prime_width",
    ),
    "stream of another row": (NORM, "(row, n, base_outer", "(row + 1, n, base_outer", "norm_add",
                              "rms_small"),
    "stream scaled too": (
        NORM, "y += tl.load(base_ptr + at, mask=mask, other=0.0).to(ACC)",
        "y += tl.load(base_ptr + at, mask=mask, other=0.0).to(ACC) * 0.75", "norm_add", "rms_small",
    ),
    "pixels right before down": (NORM, "down, right = quarter % 2, quarter // 2",
                                 "right, down = quarter % 2, quarter // 2", "patch_merge",
                                 "gathered"),
    "line past the edge": (NORM, "down[None, :] < height", "down[None, :] <= height",
                           "patch_merge", "odd_sizes"),
    "column past the edge": (NORM, "right[None, :] < width", "right[None, :] <= width",
                             "patch_merge", "odd_sizes"),
    "channels of the tile for the row's": (
        NORM, "(column // (BLOCK // 4)).to(tl.int64) * (c // 4) + channel", "column",
        "patch_merge", "odd_sizes",
    ),
    "padding of ones in the backward": (
        NORM, "tl.load(residual_ptr + at, mask=mask & exists, other=0.0)",
        "tl.load(residual_ptr + at, mask=mask & exists, other=1.0)", "patch_merge", "odd_sizes",
    ),
    "last row block": (LINEAR, "range(block, tl.cdiv(rows, BLOCK_M), blocks)",
                       "range(block, rows // BLOCK_M, blocks)", "linear_act", "wide_rows"),
    "tanh for erf": (LINEAR, "if ACT == 1:\n        x = tl", "if ACT == 2:\n        x = tl",
                     "linear_act", "prime_sizes"),
    "gate and value exchanged": (LINEAR, "_activate(gate, ACT) * total",
                                 "_activate(total, ACT) * gate", "linear_act", "gate_first"),
    "window rolled the other way": (WINDOW, "at = i + shift\n", "at = i + (ring - shift) % ring\n",
                                    "window_attention", "rectangular"),
    "grid turned": (WINDOW, "n // WW * down + w // across", "n // WW * down + w % down",
                    "window_attention", "grid"),
    "windows for a grid": (WINDOW, "    if GRID:", "    if not GRID:", "window_attention", "grid"),
    "padded before it is rolled": (WINDOW, "ring = size\n", "ring = padded\n", "window_attention",
                                   "padded_and_shifted"),
    "border one too far": (WINDOW, "n // WW >= WH - shift_y", "n // WW > WH - shift_y",
                           "window_attention", "shifted"),
    "mask in all windows": (WINDOW, "w // across == down - 1", "w // across < down",
                            "window_attention", "shifted"),
    "table upside down": (WINDOW, "at = rows[:, None] - columns[None, :]",
                          "at = columns[None, :] - rows[:, None]", "window_attention",
                          "one_window"),
    "padding of zeros": (WINDOW, "x = tl.where(padding[:, None], row", "x = tl.where(False, row",
                         "window_attention", "padded"),
    "padding of keys for values": (WINDOW, "pad_ptr + PART * width", "pad_ptr + 1 * width",
                                   "window_attention", "padded"),
    "scale beyond the largest": (WINDOW, "* LOG2E, LARGEST)", "* LOG2E, 2 * LARGEST)",
                                 "window_attention", "cosine_beyond_the_largest_scale"),
    "not through the length": (WINDOW, "d = (d - u * along[:, None])", "d = d", "window_attention",
                               "cosine"),
    "key past the window": (WINDOW, "tl.where((n < N)[None, :], s,",
                            "tl.where((n <= N)[None, :], s,", "window_attention", "head_dim_13"),
    "gradient of the padding's values for keys": (WINDOW, "at_pad + width, summed(dv",
                                                  "at_pad + width, summed(dk", "window_attention",
                                                  "padded"),
    "a window left out of the sums": (WINDOW, "dbias += p", "dbias = p", "window_attention",
                                      "padded_and_shifted"),
    "fold of the wrong way": (LARGE, "t // ACROSS - (WH - 1)", "(WH - 1) - t // ACROSS",
                              "window_attention", "one_window"),
    "rescale of a window": (WINDOW, "acc=o * rescale[:, None]", "acc=o", "window_attention",
                            "window_9"),
    "sides of keys for queries": (LARGE, "side_q = sides(m,", "side_q = sides(n,",
                                  "window_attention", "window_9"),
    "delta of no window": (LARGE, "return tl.load(delta_ptr + at, mask=m < N, other=0.0)",
                           "return tl.load(delta_ptr + at, mask=m < N, other=0.0) * 0.5",
                           "window_attention", "window_9"),
    "delta of one tile of keys": (LARGE, "delta += tl.sum(p * dp, 1)", "delta = tl.sum(p * dp, 1)",
                                  "window_attention", "window_9"),
    "padding left out of large windows": (LARGE, "sum_v += summed(dv, padding)", "sum_v += 0.0",
                                          "window_attention", "window_9_cosine"),
    "scores for cosines": (LARGE, "return k, raw, p, dp", "return k, s, p, dp", "window_attention",
                           "window_9_cosine"),
    "biases of one window only": (LARGE, "total += p * (dp - delta[:, None])",
                                  "total = p * (dp - delta[:, None])", "window_attention",
                                  "window_9"),
    "part of another image": (GRN, "to = (b * parts + part) * c", "to = (part + b) * c", "grn",
                              "many_positions_planar"),
    "positions of the next part": (GRN, "end = tl.minimum((part + 1) * per, n)",
                                   "end = tl.minimum((part + 2) * per, n)", "grn",
                                   "many_positions"),
    "a block of positions forgotten": (GRN, "products += x * x", "products = x * x", "grn",
                                       "many_positions"),
    "root left out": (GRN, "g = tl.sqrt(_total(", "g = (_total(", "grn", "tokens"),
    "mean over the tile": (GRN, "tl.sum(norms) / c + eps", "tl.sum(norms) / BLOCK + eps", "grn",
                           "tokens"),
    "eps left out of the mean": (GRN, "tl.sum(norms) / c + eps", "tl.sum(norms) / c + 0.0",
                                 "grn", "faint"),
    "norms of another image": (GRN, "scale_ptr + b * c + column, mask=inside, other=0.0)\n    bias",
                               "scale_ptr + column, mask=inside, other=0.0)\n    bias", "grn",
                               "map"),
    "x itself left out": (GRN, "y = x + (x *", "y = (x *", "grn", "map"),
    "planar read as rows": ("ops/grn/layout.py", "return n * c, 1, n", "return n * c, c, 1", "grn",
                            "planar"),
    "mean of the norms held constant": (GRN, "(weight * products - shared) / m",
                                        "weight * products / m", "grn", "map"),
    "dead channels divided by zero": (GRN, "tl.where(g == 0.0, 1.0, g)", "g", "grn",
                                      "dead_channels"),
    "gradient left out of dx": (GRN, "dx = g + (g *", "dx = (g *", "grn", "map"),
    "line past the map": (DWCONV, "(y >= 0) & (y < map_height)",
                          "(y >= 0) & (y <= map_height)", "dwconv_norm", "odd_sizes"),
    "pixel before the line": (DWCONV, "(x >= 0) & (x < map_width)", "(x >= -1) & (x < map_width)",
                              "dwconv_norm", "odd_sizes"),
    "a tap twice": (DWCONV, "tap_ptr += c", "tap_ptr += c - c", "dwconv_norm", "odd_sizes"),
    "taps of dx not flipped": (DWCONV_LAUNCH, '"FLIPPED": flipped', '"FLIPPED": False',
                               "dwconv_norm", "odd_sizes"),
    "bias of the convolution after its norm": (
        DWCONV, "    if bias_ptr is not None:\n        total +=",
        "    if KIND == 2:\n        total +=", "dwconv_norm", "odd_sizes",
    ),
    "padding of channels in the variance": (
        DWCONV, "total = tl.where(mask, total - mean[:, None], 0.0)",
        "total = total - mean[:, None]", "dwconv_norm", "odd_sizes",
    ),
    "layer norm for rms": (DWCONV, "if KIND == 0:", "if KIND != 2:", "dwconv_norm", "tall_kernel"),
    "rows of a tile transposed": (DWCONV, "h = tile // across % down * DOWN + pixel // ACROSS",
                                  "h = tile // across % down * DOWN + pixel % DOWN", "dwconv_norm",
                                  "kernel_7_over_odd_channels"),
    "mean of the next row": (DWCONV, "stats_ptr + row * 2, mean", "stats_ptr + row * 2, mean * 2",
                             "dwconv_norm", "odd_sizes"),
    "bias of wide rows": (DWCONV_LAUNCH, "x, taps, kernel, rows, bias=bias",
                          "x, taps, kernel, rows, bias=None", "dwconv_norm", "wide_rows"),
    "a stretch forgotten": (DWCONV, "dweight += weights", "dweight = weights", "dwconv_norm",
                            "kernel_7_over_odd_channels"),
    "taps' padding wraps": (DWCONV, "(w + j >= 0) & (w + j < map_width)", "(w + j < map_width)",
                            "dwconv_norm", "odd_sizes"),
    "second group of taps": (DWCONV, "tap = group * TAPS + tl", "tap = (group // 2) * TAPS + tl",
                             "dwconv_norm", "kernel_9"),
    "gradient of the bias from every part": (DWCONV, "biases += g", "biases = g", "dwconv_norm",
                                             "odd_sizes"),
    "padding of pixels in the variance": (
        GROUPS, "d = tl.where(mask, x - _spread(mean, SPAN, GROUPS)[None, :], 0.0)\n    var",
        "d = x - _spread(mean, SPAN, GROUPS)[None, :]\n    var", "group_norm_act", "odd_sizes",
    ),
    "pixels before groups": (GROUPS, "at = b * x_outer + offsets(row, column, x_inner, x_step)",
                             "at = b * x_outer + offsets(row, column, x_step, x_inner)",
                             "group_norm_act", "odd_sizes"),
    "channels of padded groups": (GROUPS, "group * WIDTH + within", "group * SPAN + within",
                                  "group_norm_act", "padded_groups"),
    "statistics of one image saved": (
        GROUPS, "(b * groups + group) * 2\n        tl.store(", "group * 2\n        tl.store(",
        "group_norm_act", "odd_sizes",
    ),
    "residual of another image": (GROUPS, "residual_at = b * residual_outer +", "residual_at =",
                                  "group_norm_act", "odd_sizes"),
    "residual behind ReLU": (
        GROUPS, "y += tl.load(residual_ptr", "y = tl.maximum(y, 0.0) + tl.load(residual_ptr",
        "group_norm_act", "odd_sizes",
    ),
    "gradient past ReLU": (GROUPS, "g = tl.where(y <= 0.0, 0.0, g)", "g = g", "group_norm_act",
                           "odd_sizes"),
    "mean of the groups' gradient left out": (
        GROUPS, "_spread(_over_groups(plain, SPAN, GROUPS) / count,",
        "_spread(_over_groups(plain, SPAN, GROUPS) * 0.0,", "group_norm_act", "no_act",
    ),
    "weight left out of the groups' means": (
        GROUPS, "plain * weight, product * weight\n    count", "plain, product\n    count",
        "group_norm_act", "odd_sizes",
    ),
    "gradients by group for those by image": (
        GROUPS, "at = b * groups * WIDTH + column", "at = b * groups + column", "group_norm_act",
        "odd_sizes",
    ),
    "variance in one pass": (GROUPS, "x - shift[None, :], 0.0)", "x, 0.0)", "group_norm_act",
                             "many_parts_offset"),
    "moments of the next part": (GROUPS, "tl.minimum((part + 1) * per, tl.cdiv",
                                 "tl.minimum((part + 2) * per, tl.cdiv", "group_norm_act",
                                 "many_parts"),
    "a tile forgotten": (GROUPS, "square += d * d", "square = d * d", "group_norm_act",
                         "many_parts"),
    "moments of another image's part": (
        GROUPS, "to = (b * parts + part) * c + column", "to = (part + b) * c + column",
        "group_norm_act", "many_parts",
    ),
    "short part as long as the others": (GROUPS, "tl.minimum(n - part * per, per).to(ACC) / n",
                                         "(per + 0 * part).to(ACC) / n", "group_norm_act",
                                         "many_parts"),
    "spread of the parts' means left out": (GROUPS, "squares += share[:, None] * (d * d)",
                                            "squares += 0.0 * d", "group_norm_act", "many_parts"),
    "rest of a wide group": (GROUPS, "for start in range(0, WIDTH, SPAN):",
                             "for start in range(0, SPAN, SPAN):", "group_norm_act", "wide_group"),
    "statistics of the next group": (GROUPS, "(b * (c // WIDTH) + column // WIDTH) * 2",
                                     "(b * (c // WIDTH) + (column + 1) // WIDTH) * 2",
                                     "group_norm_act", "many_parts"),
    "sums of a tile for those of a part": (GROUPS, "product += g *", "product = g *",
                                           "group_norm_act", "many_parts_contiguous"),
    "sums of the last part": (GROUPS, "(part < parts)[:, None]", "(part < parts - 1)[:, None]",
                              "group_norm_act", "many_parts_contiguous"),
    "slope of the wrong scale": (GROUPS, "mask=inside, other=0.0) * rstd",
                                 "mask=inside, other=0.0)", "group_norm_act", "many_parts"),
    "parts of another length": (GROUPS_LAUNCH, "pixels = per * config", "pixels = 2 * per * config",
                                "group_norm_act", "many_parts"),
    "columns for rows of a patch": (PATCH, "((k // Q) % P)", "((k // P) % P)", "patch_embed",
                                    "rectangular"),
}  # fmt: skip


@pytest.fixture(scope="module")
def judge(tmp_path_factory) -> Iterator[Callable[[Path, str, str], str]]:
    folder = tmp_path_factory.mktemp("judge")
    server = subprocess.Popen(
        [sys.executable, "-c", JUDGE],
        env={**os.environ, "TRITON_INTERPRET": "1"}, cwd=folder, text=True,
        stdin=subprocess.PIPE, stdout=subprocess.PIPE,
    )  # fmt: skip
    said = folder / "said"

    def ask(package: Path, op: str, sample: str) -> str:
        said.unlink(missing_ok=True)
        print(
            json.dumps([str(package.parent), op, sample, str(said)]), file=server.stdin, flush=True
        )
        assert server.stdout.readline() == "done\n"
        return said.read_text()

    yield ask
    server.stdin.close()
    server.wait()


@pytest.fixture
def package(tmp_path) -> Path:
    return Path(shutil.copytree(PACKAGE, tmp_path / "vitfast", symlinks=True))


def plant(package: Path, file: str, old: str, new: str) -> None:
    path = package / file
    source = path.read_text()
    assert source.count(old) >= 1, f"{file} no longer has {old!r}"
    path.write_text(source.replace(old, new))


def _first_of_each_op(names: Iterable[str]) -> list[Any]:
    """All of them, but those slow of whose op there was one before: the judge takes seconds."""
    seen: set[str] = set()
    marked = []
    for name in names:
        op = FAULTS[name][3]
        marked.append(pytest.param(name, marks=[pytest.mark.slow] if op in seen else []))
        seen.add(op)
    return marked


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_can_be_planted(name):
    """The kernels still have what it changes."""
    file, old, *_ = FAULTS[name]
    assert old in (PACKAGE / file).read_text()


@pytest.mark.parametrize("name", _first_of_each_op(FAULTS))
def test_a_planted_fault_is_caught(package, judge, name):
    file, old, new, op, sample = FAULTS[name]
    plant(package, file, old, new)
    said = judge(package, op, sample)
    assert "right" not in said.splitlines() and "Error" in said, said


def retest(package: Path, which: str) -> subprocess.CompletedProcess:
    """Tests of test_kernels.py, on a copy of the package."""
    test = Path(__file__).with_name("test_kernels.py")
    return subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", f"--rootdir={package}",
         str(test), "-k", which],
        env={**os.environ, "PYTHONPATH": str(package.parent), "TRITON_INTERPRET": "1"},
        cwd=package.parent, capture_output=True, text=True,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("file", "old", "op"),
    [
        (NORM, "row = row.to(tl.int64)", "layer_norm"),
        (NORM, "row = row.to(tl.int64)", "patch_merge"),
        (TILES, "row.to(tl.int64)[:, None] * inner", "grn"),
        (DWCONV, "y.to(tl.int64) * x_line", "dwconv_norm"),
        (TILES, "row.to(tl.int64)[:, None] * inner", "group_norm_act0"),
        (TILES, "column.to(tl.int64)[None, :] * step", "group_norm_act1"),
        (ATTENTION, "row.to(tl.int64)[:, None] * stride_row", "[attention]"),
        (WINDOW, "b.to(tl.int64), y.to(tl.int64), x.to(tl.int64)", "window_attention"),
    ],
)
def test_a_removed_int64_is_caught(package, file, old, op):
    plant(package, file, old, old.replace(".to(tl.int64)", ".to(tl.int32)"))
    done = retest(package, f"beyond_int32 and {op}")
    assert "1 failed" in done.stdout or done.returncode < 0, done.stdout  # or it reads elsewhere


def test_a_rounded_delta_is_caught(package):
    """As it would be of the forward's output in half precision."""
    old = "tl.store(delta_ptr + to, delta, "
    plant(package, LARGE, old, old.replace("delta, ", "delta.to(tl.float16), "))
    done = retest(package, "gains_nothing")
    assert "2 failed" in done.stdout, done.stdout


@pytest.mark.parametrize("name", _first_of_each_op({f[3:]: n for n, f in FAULTS.items()}.values()))
def test_the_judge_accepts_the_kernels_as_they_are(judge, name):
    op, sample = FAULTS[name][3:]
    assert judge(PACKAGE, op, sample).splitlines()[-1] == "right"
