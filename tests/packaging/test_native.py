"""The compiled extension: its instruction sets, its OpenMP, and what it must not carry."""

from __future__ import annotations

import platform
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from vitfast.runtime import native
from vitfast.settings import ISA_LEVELS

ROOT = Path(__file__).resolve().parents[2]
needs_native = pytest.mark.skipif(native.reasons() != [], reason="; ".join(native.reasons()))


def tool(*command: str) -> str:
    if shutil.which(command[0]) is None:
        pytest.skip(f"{command[0]} is not installed")
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def objects(target: str) -> list[Path]:
    """Object files of one CMake target, from whichever build folders this checkout has."""
    found = sorted(ROOT.glob(f"build/**/CMakeFiles/{target}.dir/**/*.o"))
    if not found:
        pytest.skip("this checkout has no build folder")
    return found


# ---- instruction sets ---------------------------------------------------------------------------

ISA = """
from vitfast.errors import VitfastError
from vitfast.runtime import native
try:
    print(native.isa())
except VitfastError as error:
    print(type(error).__name__)
"""


@needs_native
@pytest.mark.parametrize("level", range(len(ISA_LEVELS)))
def test_the_variable_only_lowers_the_instruction_set(python, level):
    best = native.native().best_isa()
    expected = ISA_LEVELS[level] if level <= best else "BackendUnavailableError"
    assert python("-c", ISA, VITFAST_CPU_ISA=ISA_LEVELS[level]).stdout == f"{expected}\n"


def test_an_unknown_instruction_set_is_refused(python):
    result = python("-c", "import vitfast.settings", VITFAST_CPU_ISA="avx9000", check=False)
    assert result.returncode == 1
    assert "VITFAST_CPU_ISA='avx9000': expected one of baseline" in result.stderr


@needs_native
@pytest.mark.parametrize("offset", [1, 100])
def test_the_extension_itself_refuses_to_raise_the_level(offset):
    module = native.native()
    with pytest.raises(ValueError, match="does not support"):
        module.select_isa(module.best_isa() + offset)
    with pytest.raises(ValueError, match="start at 0"):
        module.select_isa(-1)


FEATURES = {
    "vex": r"\tv[a-z0-9]+ ",
    "ymm": r"%ymm\d",
    "evex": r"%[xy]mm(?:1[6-9]|2\d|3[01])|%k[0-7]",
    "zmm": r"%zmm\d",
    "bf16": r"\t(?:vdpbf16ps|vcvtne2?ps2bf16)",
}


def features(files: list[Path]) -> set[str]:
    """Which parts of the instruction set, beyond what every x86-64 CPU has, these files use."""
    found = set()
    for file in files:
        assembly = tool("objdump", "-d", "--no-show-raw-insn", str(file))
        found |= {name for name, pattern in FEATURES.items() if re.search(pattern, assembly)}
    return found


@needs_native
@pytest.mark.skipif(platform.machine() != "x86_64", reason="the levels are those of x86-64")
@pytest.mark.parametrize(
    "level, expected",
    [
        ("baseline", set()),
        ("avx2", {"vex", "ymm"}),
        ("avx512", {"vex", "ymm", "evex", "zmm"}),
        ("avx512_bf16", {"vex", "ymm", "evex", "zmm", "bf16"}),
    ],
)
def test_objects_use_the_instructions_of_their_level(level, expected):
    assert features(objects(f"vitfast_{level}")) == expected


@needs_native
def test_common_objects_run_on_every_cpu():
    assert features(objects("_native")) == set()


@pytest.mark.parametrize("level", ISA_LEVELS)
def test_no_function_is_shared_between_levels(level):
    # A weak function with the same name in two levels: the linker keeps one copy, perhaps the
    # AVX-512 one, and a CPU without it dies.
    for file in objects(f"vitfast_{level}"):
        symbols = re.findall(r"^\S* +[WV] (\S+)$", tool("nm", "--defined-only", str(file)), re.M)
        shared = [s for s in symbols if f"{len(level)}{level}" not in s and not s.startswith("DW.")]
        assert shared == [], file.name


# ---- OpenMP -------------------------------------------------------------------------------------

OPENMP = """
import re, torch, vitfast
torch.set_num_threads(2)
vitfast.ops.layer_norm(torch.randn(4096, 64), backend="cpu")
maps = open("/proc/self/maps").read()
print(len(set(re.findall(r"\\S*/(?:libgomp|libomp|libiomp5)[-.\\w]*", maps))))
"""


@needs_native
def test_one_openmp_library_after_a_native_call(python):
    assert python("-c", OPENMP).stdout == "1\n"


# ---- the file -----------------------------------------------------------------------------------


@needs_native
def test_the_extension_is_hardened_and_relocatable():
    file = native.native().__file__
    dynamic = tool("readelf", "-dW", file)
    assert not re.search(r"RPATH|RUNPATH", dynamic)
    assert re.search(r"BIND_NOW|FLAGS.*NOW", dynamic)
    needed = set(re.findall(r"NEEDED.*\[(.*?)\]", dynamic))
    assert not {n for n in needed if n.startswith(("libtorch", "libc10", "libpython", "libcuda"))}
    headers = tool("readelf", "-lW", file)
    assert "GNU_RELRO" in headers
    assert re.search(r"GNU_STACK.* RW +0x", headers), "the stack must not be executable"


@needs_native
def test_the_extension_exports_its_entry_point_only():
    symbols = tool("nm", "-D", "--defined-only", native.native().__file__).split()[2::3]
    assert {s.split("_")[0] for s in symbols} <= {"PyInit", "PyModExport"}, symbols
    assert symbols


@needs_native
def test_the_extension_names_no_build_folder():
    content = Path(native.native().__file__).read_bytes()
    assert str(ROOT).encode() not in content


@needs_native
def test_build_info():
    info = native.native().build_info()
    assert info["compiler"]
    assert info["isas"][0] == "baseline" and set(info["isas"]) <= set(ISA_LEVELS)
