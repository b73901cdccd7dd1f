"""The self-test end to end, with Triton's interpreter for a GPU: right kernels are trusted and run
in a model, wrong ones are not, and the model is right all the same.

Each runs in a process of its own, with a cache of its own, whose workers run its own package.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import vitfast

PACKAGE = Path(vitfast.__file__).parent
NORM = "ops/common/norm_triton_kernels.py"
FAULTS = {
    "layer_norm": ("ops/layer_norm/kernels.py", "eps=call.eps", "eps=call.eps + 0.5"),
    "rms_norm": ("ops/rms_norm/kernels.py", "eps=call.eps", "eps=call.eps + 0.5"),
    "add_norm": ("ops/add_norm/kernels.py", "gamma=call.gamma", "gamma=None"),
    "norm_add": ("ops/norm_add/kernels.py", "eps=call.eps", "eps=call.eps + 0.5"),
    "residual_add": ("ops/residual_add/kernels.py", "gamma=call.gamma", "gamma=None"),
    "attention": ("ops/attention/triton_kernels.py", "tl.where(k < keys, s,",
                  "tl.where(k <= keys, s,"),
    "linear_act": ("ops/linear_act/triton_kernels.py", "_activate(gate, ACT) * total",
                   "_activate(total, ACT) * gate"),
    "patch_embed": ("ops/patch_embed/triton_kernels.py", "((k // Q) % P)", "((k // P) % P)"),
    "patch_merge": (NORM, "down, right = quarter % 2, quarter // 2",
                    "right, down = quarter % 2, quarter // 2"),
    "window_attention": ("ops/window_attention/triton_kernels.py",
                         "at = rows[:, None] - columns[None, :]",
                         "at = columns[None, :] - rows[:, None]"),
    "dwconv_norm": ("ops/dwconv_norm/triton_kernels.py", "tap_ptr += c", "tap_ptr += c - c"),
    "grn": ("ops/grn/triton_kernels.py", "g = tl.sqrt(_total(", "g = (_total("),
    "group_norm_act": (
        "ops/group_norm_act/triton_kernels.py",
        "at = b * x_outer + offsets(row, column, x_inner, x_step)",
        "at = b * x_outer + offsets(row, column, x_step, x_inner)",
    ),
}  # fmt: skip
"""An op -> a change of its sources that its self-test has to notice."""
SETUP = """
import copy, json, sys
import triton.language, torch, timm
sys.path.insert(0, sys.argv[1])
import vitfast
assert vitfast.__file__.startswith(sys.argv[1])
from vitfast.runtime import native
native.reasons = lambda: ["no extension, so that the interpreter is what there is"]
from vitfast.runtime.verdicts import PASSES, Question
from vitfast.selftest import session
torch.manual_seed(0)
model = timm.create_model(
    "vit_tiny_patch16_224", img_size=32, depth=1, embed_dim=48, num_heads=3, num_classes=10
).eval()
theirs, x = copy.deepcopy(model), torch.randn(1, 3, 32, 32)
"""
TRUSTING = (
    SETUP
    + """
vitfast.swap(model)
report = vitfast.prepare(model, x)
again = vitfast.prepare(model, x)
with torch.no_grad():
    error = (model(x) - theirs(x)).abs().max().item()
from vitfast import ops
print(json.dumps({
    "states": sorted({entry.state for entry in report.tested}),
    "ops": sorted({entry.question.op for entry in report.tested}),
    "own": sum(entry.now for entry in report.tested),
    "again": sum(entry.now for entry in again.tested),
    "error": error, "picked": {spec.name: spec.dispatcher.picked for spec in ops.specs()},
}))
"""
)
DISTRUSTING = (
    SETUP
    + """
from vitfast import ops
kernels = [spec.name for spec in ops.specs() if "triton" in spec.dispatcher.backends]
wanted = {Question(name, "float32", "forward"): [] for name in kernels}
report = session.decide(torch.device("cpu"), wanted, None)
swapped = vitfast.swap(model)
with torch.no_grad():
    same = torch.equal(model(x), theirs(x))
print(json.dumps({
    "states": {entry.question.op: entry.state for entry in report.tested},
    "same": same, "nothing": swapped.gains_nothing,
}))
"""
)


def run(code: str, package: Path, cache: Path) -> dict:
    environment = {
        **os.environ, "TRITON_INTERPRET": "1", "XDG_CACHE_HOME": str(cache), "PYTHONPATH": "",
    }  # fmt: skip
    done = subprocess.run(
        [sys.executable, "-c", code, str(package.parent)], cwd=cache, env=environment,
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return json.loads(done.stdout.splitlines()[-1])


def test_right_kernels_are_trusted_and_run(tmp_path):
    found = run(TRUSTING, PACKAGE, tmp_path)
    assert found["states"] == ["right"]
    assert {"attention", "add_norm", "linear_act", "mlp", "layer_norm"} <= set(found["ops"])
    assert found["own"] > 0  # of the model's own problems, beside what the swap tested
    assert found["again"] == 0
    assert found["error"] < 1e-5
    assert found["picked"]["layer_norm"] == found["picked"]["add_norm"] == "triton"


def test_a_fault_in_each_op_is_found(tmp_path):
    """All at once, in a copy of the package."""
    package = Path(shutil.copytree(PACKAGE, tmp_path / "vitfast", symlinks=True))
    for file, old, new in FAULTS.values():
        source = (package / file).read_text()
        assert old in source, f"{file} no longer has {old!r}"
        (package / file).write_text(source.replace(old, new))
    found = run(DISTRUSTING, package, tmp_path)
    assert {op: found["states"][op] for op in FAULTS} == dict.fromkeys(FAULTS, "wrong")
    assert found["states"]["mlp"] == "wrong"  # which is made of linear_act
    assert found["same"] and "wrong in a test" in found["nothing"]


def test_the_table_has_a_fault_of_each_op():
    kernels = {s.name for s in vitfast.ops.specs() if "triton" in s.dispatcher.backends}
    assert set(FAULTS) == kernels - {"mlp"}
