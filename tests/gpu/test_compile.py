"""Triton kernels compiled for GPUs that are not here, and held to the committed table.

CI compiles a part; all of it: python -m vitfast.testing.aot --check
"""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest

from vitfast.runtime import launches
from vitfast.runtime.launches import Arch, Launch

triton = pytest.importorskip("triton")

from vitfast.testing import aot  # noqa: E402

KNOWN = json.loads(Path(__file__).with_name("resources.json").read_text())
TARGETS = tuple(KNOWN["kernels"])
SHARE = 20
"""CI compiles every so many-th kernel of each target."""


@pytest.mark.parametrize("target", TARGETS)
def test_a_part_of_the_kernels(target):
    """Compiles, spills nothing, fits shared memory, has its matrix instructions, as the table."""
    table, wrong = aot.run([target], shard=(TARGETS.index(target), SHARE), workers=1)
    assert table[target]
    if KNOWN["triton"] == triton.__version__:
        assert wrong == aot.differences(table, KNOWN) == []
    else:
        # Other compilers allot registers otherwise: the tiles were cut for this one. Triton 3.6
        # does not compile the switch on sm_100.
        known = re.compile(r" spills |^sm_100 .*-lazy: does not compile")
        assert [why for why in wrong if not known.search(why)] == []


def _settled(target):
    """The kernels of a target that the table is to know."""
    pending = KNOWN["pending"].get(target, ())
    return {n: v for n, v in aot.variants(target) if n.split("/")[0] not in pending}


@pytest.mark.parametrize("target", TARGETS)
def test_the_table_has_every_kernel(target):
    assert set(KNOWN["kernels"][target]) == set(_settled(target))


def test_the_table_has_no_fault():
    for target in TARGETS:
        for name, v in _settled(target).items():
            assert aot.faults(v, target, KNOWN["kernels"][target][name]) == [], (target, name)


def test_what_is_pending_is_taken_off_when_all_of_it_is_in():
    """A part leaves it pending; what is pending differs from nothing."""
    names = [name for name, _ in aot.variants("sm_90", {"residual_add"})]
    found = dict.fromkeys(names, {"registers": 1, "spilled": 0, "shared": 0, "matrix": 0})
    known = {"pending": {"sm_90": ["residual_add", "grn"]}, "kernels": {"sm_90": {}}}
    some = aot.merged(known, {"sm_90": dict([*found.items()][:-1])})
    assert some["pending"] == known["pending"] and len(some["kernels"]["sm_90"]) == len(names) - 1
    assert aot.differences({"sm_90": found}, known) == []
    whole = aot.merged(some, {"sm_90": found})
    assert whole["pending"] == {"sm_90": ["grn"]} and set(whole["kernels"]["sm_90"]) == set(names)
    other = {name: {**entry, "registers": 2} for name, entry in found.items()}
    assert len(aot.differences({"sm_90": other}, whole)) == len(names)


def _variant(op, part):
    return next(v for name, v in aot.variants("sm_90", {op}) if part in name)


def test_spills_are_seen():
    v = _variant("attention", "forward-d128-fp32")
    big = {"BLOCK_M": 64, "BLOCK_N": 64}
    v = replace(v, constants={**v.constants, **big}, launch=Launch(big, 4, 1))
    found = aot.resources(aot.compile_variant(v, "sm_90"), "sm_90")
    assert found["spilled"] > 0 and found["spills_in_loops"] > 0
    assert any("spills" in why for why in aot.faults(v, "sm_90", found))


def test_a_few_registers_may_wait_out_a_loop():
    v, found = _variant("layer_norm", "forward-c384-fp16"), {"shared": 0, "matrix": 0}
    for spilled, in_loops, refused in ((0, {}, False), (16, {"spills_in_loops": 0}, False),
                                       (24, {"spills_in_loops": 0}, True), (8, {}, True),
                                       (8, {"spills_in_loops": 1}, True)):  # fmt: skip
        why = aot.faults(v, "sm_90", {**found, "spilled": spilled, **in_loops})
        assert bool(why) == refused
    assert not aot.faults(v, "gfx1100", {**found, "spilled": 900})


def test_missing_matrix_instructions_are_seen():
    v = replace(_variant("layer_norm", "forward-c384-fp16"), dots=True)
    found = aot.resources(aot.compile_variant(v, "sm_90"), "sm_90")
    assert aot.faults(v, "sm_90", found) == ["has no matrix instruction"]


@pytest.mark.parametrize(
    ("op", "name"),
    [
        ("linear_act", "forward-none-fp32"),
        ("patch_embed", "forward-p16-fp32"),
        ("attention", "forward-d16-fp32"),
    ],
)
def test_float32_blocks_are_summed_apart(op, name):
    """Triton merges an addition into a product's accumulator, which makes one chain of all."""
    ttgir = aot.compile_variant(_variant(op, name), "sm_90").asm["ttgir"]
    zeros = set(re.findall(r"(%\w+) = arith\.constant dense<0\.0+e\+00>", ttgir))
    begun_from = re.findall(r"tt\.dot %\w+, %\w+, (%\w+)", ttgir)
    assert begun_from and zeros.issuperset(begun_from)


def test_targets_without_matrix_instructions_have_no_kernels_that_refuse_them():
    """Norms have, and what multiplies matrices has none."""
    found = {name.split("/")[0] for name, _ in aot.variants("sm_75")}
    everything = {name.split("/")[0] for name, _ in aot.variants("sm_80")}
    assert everything - found == {"attention", "linear_act", "patch_embed", "window_attention"}


@pytest.mark.parametrize("target", TARGETS)
def test_launch_tables_of_the_package(target):
    """Every entry that can be reached compiles and fits."""
    assert aot.faults_of_tables(target) == []


def test_an_entry_that_cannot_hurt_and_one_that_does(tmp_path, monkeypatch):
    """Each is compiled for all that it serves, and for nothing beyond a factor of two."""
    monkeypatch.setattr(launches, "LAUNCHES", tmp_path)
    asked = []

    def note(kernel, key, launch):
        asked.append((kernel, dict(key), launch))
        return launch

    with launches.watching(note):
        list(aot.variants("sm_90", {"add_norm"}))
    kernel, key, launch = asked[0]

    def entry(**changes):
        return {"key": key, "blocks": dict(launch.blocks), "num_warps": launch.num_warps,
                "num_stages": launch.num_stages, **changes}  # fmt: skip

    def write(*entries):
        (tmp_path / "sm_90.json").write_text(json.dumps({"kernels": {kernel: entries}}))

    far = {n: v * 8 if isinstance(v, int) else v for n, v in key.items()}
    write(entry(), {"key": {}, "choice": "flash"}, entry(key={**key, "unheard of": 1}))
    served = [name for name, _ in aot.tabled("sm_90")]
    assert served and all(name.endswith(f"by {kernel}[0]") for name in served)
    write(entry(num_warps=64), entry(key=far))
    found = aot.faults_of_tables("sm_90")
    assert found and all(f"{kernel}[0]: does not compile" in why for why in found if "[0]" in why)


def test_too_much_shared_memory_is_seen():
    v = _variant("layer_norm", "forward-c384-fp16")
    found = {"registers": 1, "spilled": 0, "shared": 300_000, "matrix": 0}
    assert len(aot.faults(v, "sm_90", found)) == 1
    assert Arch("gfx950").shared_bytes > Arch("gfx942").shared_bytes


def test_a_dropped_int64_is_seen(tmp_path):
    """The lint on pointer arithmetic: rows times a stride in 32 bits."""
    import importlib.util

    source = (
        "import triton\nimport triton.language as tl\n\n\n@triton.jit\n"
        "def kernel(x_ptr, y_ptr, stride, N: tl.constexpr):\n"
        "    row = tl.program_id(0)WIDE\n"
        "    at = row * stride + tl.arange(0, N)\n"
        "    tl.store(y_ptr + at, tl.load(x_ptr + at))\n"
    )
    found = {}
    for name, cast in (("wide", ".to(tl.int64)"), ("narrow", "")):
        path = tmp_path / f"{name}.py"
        path.write_text(source.replace("WIDE", cast))
        spec = importlib.util.spec_from_file_location(name, path)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        v = aot.Variant(
            name, module.kernel, {"x_ptr": "*fp16", "y_ptr": "*fp16", "stride": "i32"}, {"N": 64},
            Launch({}, 4, 1),
        )  # fmt: skip
        found[name] = aot.narrow_products(aot.compile_variant(v, "sm_90").asm["ttir"])
    assert found["wide"] == [] and found["narrow"]
