"""SASS read and followed: instructions, loops, trip counts and accesses that are known by hand."""

from __future__ import annotations

import random

import pytest
import torch

from vitfast.runtime.launches import Arch
from vitfast.testing import sass, sass_run

triton = pytest.importorskip("triton")

import triton.language as tl  # noqa: E402

from vitfast.testing import model, recorded  # noqa: E402


@triton.jit
def summed(x_ptr, y_ptr, n, BLOCK: tl.constexpr):
    """n rows of BLOCK added up."""
    at = tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK], tl.float32)
    for i in range(n):
        total += tl.load(x_ptr + i * BLOCK + at)
    tl.store(y_ptr + at, total)


@triton.jit
def nested(x_ptr, y_ptr, n, BLOCK: tl.constexpr):
    """A triangle: 1 + 2 + ... + n rows."""
    at = tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK], tl.float32)
    for i in range(n):
        for k in range(i + 1):
            total = total * 2 + tl.load(x_ptr + (i + k) * BLOCK + at)
    tl.store(y_ptr + at, total)


@triton.jit
def branching(x_ptr, y_ptr, n, BLOCK: tl.constexpr):
    """Programs from n on read nothing."""
    at = tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK], tl.float32)
    if tl.program_id(0) < n:
        total += tl.load(x_ptr + at)
    tl.store(y_ptr + at, total)


@triton.jit
def masked(x_ptr, y_ptr, n, BLOCK: tl.constexpr):
    """n of BLOCK elements, every eighth of an array."""
    at = tl.arange(0, BLOCK)
    tl.store(y_ptr + at, tl.load(x_ptr + 8 * at, mask=at < n, other=0.0), mask=at < n)


@triton.jit
def computed(x_ptr, y_ptr, a, b, c, d, BLOCK: tl.constexpr):
    """As many rows as integer arithmetic says."""
    at = tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK], tl.float32)
    n = (a // d) * 3 + (b % d) - (c >> 2) + ((a ^ b) & 7) + tl.program_id(0) % d
    n += (a.to(tl.int64) * b * 65537 // (d + 70000)).to(tl.int32) & 15
    n = tl.maximum(tl.minimum(n, 300), 0)
    for i in range(n):
        total += tl.load(x_ptr + i * BLOCK + at)
    tl.store(y_ptr + at, total)


@triton.jit
def by_data(x_ptr, y_ptr, n, BLOCK: tl.constexpr):
    """How long it runs depends on what it reads."""
    at = tl.arange(0, BLOCK)
    left = tl.load(x_ptr)
    while left > 0:
        left -= 1
        tl.store(y_ptr + at, at * left)


BLOCK = 256
"""By two warps: four elements a thread, so that each access is of 16 bytes."""


def _launch(kernel, *numbers, programs=1):
    x, y = torch.empty(1, dtype=torch.float32), torch.empty(1, dtype=torch.float32)
    found = recorded.record(
        lambda: kernel[(programs,)](x, y, *numbers, BLOCK=BLOCK, num_warps=2), Arch("sm_80")
    )
    assert len(found) == 1
    return found[0]


def _run(kernel, target, *numbers, program=0, programs=1):
    """(code, counts) of one block."""
    launch = _launch(kernel, *numbers, programs=programs)
    compiled = recorded.as_compiled(launch, Arch(target))
    code = sass.parse(sass.disassembly(compiled.asm["cubin"]))
    bank = model.constant_bank(launch, compiled.asm["ptx"], target, 64)
    return code, sass_run.run(
        sass_run.Program(code), sass_run.Launch(bank, 64, (program, 0, 0), launch.grid)
    )


def _issued(code, counts, name):
    """Times a warp issues instructions of this name that no predicate may switch off."""
    found = zip(code, counts.warps, strict=True)
    return sum(n for i, n in found if i.name == name and not i.guard) / 2


def _moved(code, counts, name, what="bytes"):
    table = getattr(counts, what)
    return sum(table[n] for n, i in enumerate(code) if i.name == name and n in table)


@pytest.mark.parametrize("target", model.TARGETS)
@pytest.mark.parametrize("n", [2, 7, 64])
def test_a_loop_counts_once_an_iteration(target, n):
    """However the compiler has unrolled or turned the loop over."""
    code, counts = _run(summed, target, n)
    assert len(sass.loops(code)) >= 1
    assert _issued(code, counts, "FADD") == 4 * n
    assert _issued(code, counts, "STG") == 1
    assert _moved(code, counts, "LDG") == n * BLOCK * 4
    assert _moved(code, counts, "LDG", "sectors") == n * BLOCK * 4 / 32


@pytest.mark.parametrize("target", model.TARGETS)
@pytest.mark.parametrize("n", [2, 9])
def test_nested_loops(target, n):
    code, counts = _run(nested, target, n)
    found = sass.loops(code)
    assert any(a in b for a in found for b in found if a != b)
    assert _moved(code, counts, "LDG") == n * (n + 1) / 2 * BLOCK * 4
    assert _issued(code, counts, "FFMA") == n * (n + 1) / 2 * 4


@pytest.mark.parametrize("target", model.TARGETS)
def test_branches_on_the_program(target):
    for program, loads in ((2, 1), (3, 0)):
        code, counts = _run(branching, target, 3, program=program, programs=9)
        moved = _moved(code, counts, "LDG")  # by a branch over it or by its own predicate
        assert moved == loads * BLOCK * 4


@pytest.mark.parametrize("target", model.TARGETS)
def test_masks_and_sectors(target):
    """100 of 256 elements, read 32 bytes apart: as many sectors as elements. A thread has four
    beside each other and stores them one by one, each store across all 13 sectors of 400 bytes."""
    code, counts = _run(masked, target, 100)
    assert _moved(code, counts, "LDG") == _moved(code, counts, "STG") == 100 * 4
    assert _moved(code, counts, "LDG", "sectors") == 100
    assert _moved(code, counts, "STG", "sectors") == 4 * 13


@pytest.mark.parametrize("target", model.TARGETS)
def test_integer_arithmetic(target):
    """Divisions, 64-bit products and bits, as Python computes them."""
    draw = random.Random(7)
    numbers = [
        tuple(2 * draw.randrange(low, high) + 1 for low, high in _RANGES) for _ in range(6)
    ]  # odd, so that none divides by 16: one compiled kernel
    launch = _launch(computed, *numbers[0], programs=1000)
    compiled = recorded.as_compiled(launch, Arch(target))
    code = sass.parse(sass.disassembly(compiled.asm["cubin"]))
    program, counted = sass_run.Program(code), set()
    for a, b, c, d in numbers:
        launch = _launch(computed, a, b, c, d, programs=1000)
        bank = model.constant_bank(launch, compiled.asm["ptx"], target, 64)
        for number in (0, draw.randrange(1, 1000)):
            n = (a // d) * 3 + b % d - (c >> 2) + ((a ^ b) & 7) + number % d
            n = max(min(n + (a * b * 65537 // (d + 70000) & 15), 300), 0)
            block = sass_run.Launch(bank, 64, (number, 0, 0), launch.grid)
            counts = sass_run.run(program, block)
            assert _moved(code, counts, "LDG") == n * BLOCK * 4
            counted.add(n)
    assert len(counted) > 4


_RANGES = ((3, 2000), (3, 40_000), (-60, 60), (1, 12))


def test_a_trip_count_that_depends_on_data_is_an_error():
    with pytest.raises(sass_run.UnknownTripCountError, match="depends on data"):
        _run(by_data, "sm_90", 3)


# ---- listings written by hand --------------------------------------------------------------------


def _listing(*lines):
    found, at = [], 0
    for line in lines:
        if line.endswith(":"):
            found.append(line)
        else:
            found.append(f"        /*{at:04x}*/    {line} ;")
            at += 16
    return "\n".join(found)


def _counts(*lines, threads=64, bank=None):
    code = sass.parse(_listing(*lines))
    launch = sass_run.Launch(bank or {}, threads, (0, 0, 0), (1, 1, 1))
    return code, sass_run.run(sass_run.Program(code), launch)


def test_operands_guards_and_targets():
    code = sass.parse(
        _listing(
            ".L_x_0:", "@!P0 LDG.E.128 R16, desc[UR12][R4.64+0x10]",
            "LEA.HI.X R7, R4, R9.reuse, R11, 0x1, P1", "@P1 BRA `(.L_x_0)",
        )
    )  # fmt: skip
    load, lea, branch = code
    assert (load.guard, load.name, load.width) == ("!P0", "LDG", 16)
    assert list(sass.written(load)) == ["R16", "R17", "R18", "R19"]
    assert {"P0", "R4", "R5", "UR12"} <= set(sass.read(load))
    assert lea.operands == ("R7", "R4", "R9", "R11", "0x1", "P1")
    assert list(sass.written(lea)) == ["R7"]
    assert (branch.guard, branch.target) == ("P1", 0)
    assert sass.loops(code) == [sass.Loop(0, 2)]
    to_float, to_integer = sass.parse(_listing("I2F.U64.RP R8, UR6", "F2I.U64.TRUNC R6, R8"))
    assert list(sass.written(to_float)) == ["R8"]
    assert list(sass.written(to_integer)) == ["R6", "R7"]


def test_threads_that_part_meet_again():
    """One of two warps runs the body; of the other branch, half a warp does: that is a warp."""
    code, counts = _counts(
        "S2R R0, SR_TID.X", "ISETP.GE.AND P0, PT, R0, 0x20, PT", "@P0 BRA `(.L_x_0)",
        "FADD R2, R2, R2", ".L_x_0:", "ISETP.GE.AND P1, PT, R0, 0x30, PT", "@P1 BRA `(.L_x_1)",
        "FMUL R2, R2, R2", ".L_x_1:", "EXIT",
    )  # fmt: skip
    assert {i.name: n for i, n in zip(code, counts.warps, strict=True)} == {
        "S2R": 2, "ISETP": 2, "BRA": 2, "FADD": 1, "FMUL": 2, "EXIT": 2
    }  # fmt: skip


def test_threads_that_leave_a_loop_early_wait():
    """Thread t runs t // 32 + 1 times: warps 1 and 2 times."""
    code, counts = _counts(
        "S2R R0, SR_TID.X", "SHF.R.U32.HI R0, RZ, 0x5, R0", "MOV R1, RZ", ".L_x_0:",
        "FADD R2, R2, R2", "ISETP.GE.AND P0, PT, R1, R0, PT", "IADD3 R1, R1, 0x1, RZ",
        "@!P0 BRA `(.L_x_0)", "FMUL R2, R2, R2", "EXIT",
    )  # fmt: skip
    times = {i.name: n for i, n in zip(code, counts.warps, strict=True)}
    assert times["FADD"] == 1 + 2 and times["FMUL"] == 2


def _loop_by_flag(bit):
    """Three iterations by bit 2 of a register of flags, whose bit 1 comes from data."""
    return _counts(
        "LDG.E R4, [R2.64]", "FSETP.GT.AND P0, PT, R4, RZ, PT", "MOV R1, RZ", ".L_x_0:",
        "LOP3.LUT R9, R9, 0xfffffffe, RZ, 0xc0, !PT", "@P0 LOP3.LUT R9, R9, 0x1, RZ, 0xfc, !PT",
        "IADD3 R1, R1, 0x1, RZ", "ISETP.LT.AND P1, PT, R1, 0x3, PT", "FADD R2, R2, R2",
        "LOP3.LUT R9, R9, 0xfffffffd, RZ, 0xc0, !PT", "@P1 LOP3.LUT R9, R9, 0x2, RZ, 0xfc, !PT",
        f"LOP3.LUT P2, RZ, R9, {bit}, RZ, 0xc0, !PT", "@P2 BRA `(.L_x_0)", "EXIT",
    )  # fmt: skip


def test_predicates_kept_as_bits():
    code, counts = _loop_by_flag("0x2")
    assert _issued(code, counts, "FADD") == 3
    with pytest.raises(sass_run.UnknownTripCountError, match="depends on data"):
        _loop_by_flag("0x1")


def test_a_function_is_called_and_returns():
    """A division of 64 bits is such a call; its return address is a number in a register."""
    code, counts = _counts(
        "MOV R6, 0x20", "CALL.REL.NOINC `($divide)", "MOV R6, 0x40", "CALL.REL.NOINC `($divide)",
        "EXIT", "$divide:", "FADD R2, R2, R2", "RET.REL.NODEC R6 `(kernel)",
    )  # fmt: skip
    assert [(i.name, n) for i, n in zip(code, counts.warps, strict=True)] == [
        ("MOV", 2), ("CALL", 2), ("MOV", 2), ("CALL", 2), ("EXIT", 2), ("FADD", 4), ("RET", 4)
    ]  # fmt: skip
    with pytest.raises(sass_run.UnknownTripCountError, match="nobody knows where"):
        _counts("CALL.REL.NOINC `($divide)", "EXIT", "$divide:", "RET.REL.NODEC R6 `(kernel)")


@pytest.mark.parametrize(
    ("shift", "load", "wavefronts"),
    [
        ("0x2", "LDS R3, [R1]", 2),  # 4 bytes apart: 32 banks
        ("0x3", "LDS R3, [R1]", 4),  # 8 apart: 2 words a bank
        ("0x7", "LDS R3, [R1]", 64),  # 128 apart: all in one bank
        ("0x3", "LDS.64 R4, [R1+0x10]", 4),
        ("0x4", "LDS.128 R4, [R1]", 8),
        ("0x5", "LDS.128 R4, [R1]", 16),
        ("0x4", "LDSM.16.M88.4 R4, [R1]", 8),
        ("0x7", "LDSM.16.M88.4 R4, [R1]", 64),  # rows 128 apart: eight conflicts a matrix
    ],
)
def test_bank_conflicts(shift, load, wavefronts):
    _, counts = _counts("S2R R0, SR_TID.X", f"SHF.L.U32 R1, R0, {shift}, RZ", load, "EXIT")
    assert sum(counts.wavefronts.values()) == wavefronts


def test_an_address_that_is_not_known_costs_the_least():
    _, counts = _counts("LDS R1, [R9]", "LDG.E R2, [R4.64]", "EXIT")
    assert counts.wavefronts == {0: 2.0, 1: 2.0}
    assert counts.sectors[1] == 64 * 4 / 32


def test_pipes_and_matrix_operations():
    def one(text):
        return sass.parse(_listing(text))[0]

    for text, pipe in (
        ("FFMA R1, R2, R3, R4", "fma"), ("IMAD.WIDE R2, R4, R5, R6", "imad"),
        ("FMNMX R1, R2, R3, !PT", "alu"), ("MUFU.EX2 R1, R2", "xu"), ("UIADD3 UR4, UR5, UR6, URZ",
        "uniform"), ("LDGSTS.E.BYPASS.128 [R1], [R2.64]", "lsu"), ("BAR.SYNC 0x0", "control"),
        ("DFMA R2, R4, R6, R8", "fp64"), ("HFMA2.MMA R1, -RZ, RZ, 0, 0", "fma"),
    ):  # fmt: skip
        assert sass.pipe(one(text)) == pipe, text
    assert sass.matrix_flops(one("HMMA.16816.F32.BF16 R4, R8, R12, R4")) == 2 * 16 * 8 * 16
    assert sass.matrix_flops(one("HMMA.1684.F32.TF32 R4, R8, R12, R4")) == 2 * 16 * 8 * 4
    hgmma = one("HGMMA.64x128x16.F32.BF16 R24, gdesc[UR8], R24, gsb0")
    assert sass.pipe(hgmma) == "tensor"
    assert sass.matrix_flops(hgmma) == 2 * 64 * 128 * 16 // 4
    assert len(list(sass.written(hgmma))) == 64
    assert sass.matrix_flops(one("FFMA R1, R2, R3, R4")) == 0


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("", "no instruction"),
        ("Fatbin elf code:\n================", "no instruction"),
        (_listing("BRA `(.L_x_7)", "EXIT"), "is not there"),
        (_listing("EXIT") + "\n" + _listing("EXIT"), "comes twice"),
    ],
)
def test_malformed_listings(text, why):
    with pytest.raises(sass.MalformedSassError, match=why):
        sass.parse(text)


def test_malformed_input(monkeypatch):
    with pytest.raises(sass.MalformedSassError, match="nvdisasm"):
        sass.disassembly(b"no cubin")
    with pytest.raises(sass.MalformedSassError, match="shape"):
        sass.matrix_flops(sass.parse(_listing("HMMA.F32 R4, R8, R12, R4"))[0])
    with pytest.raises(sass.MalformedSassError, match="3 bytes"):
        sass_run.constant_bank([(0x160, 3, 1)], {})
    monkeypatch.setattr(sass_run, "_MOST_STEPS", 1000)
    with pytest.raises(sass_run.UnknownTripCountError, match="without an end"):
        _counts(".L_x_0:", "FADD R2, R2, R2", "BRA `(.L_x_0)")
