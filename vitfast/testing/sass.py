"""Reading SASS, NVIDIA's machine code, as nvdisasm prints it: instructions, loops and pipes.

    instructions = parse(disassembly(cubin))
    for loop in loops(instructions): ...

What an instruction is called and does follows NVIDIA's "CUDA Binary Utilities" and what its
disassembler prints for sm_80, sm_89 and sm_90; opcodes of other targets may be missing.
"""

from __future__ import annotations

import functools
import re
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path


class MalformedSassError(ValueError):
    """The text is no listing of one kernel, or a branch in it leads nowhere."""


@dataclass(frozen=True)
class Instruction:
    """One instruction.

    Args:
        address: in bytes from the kernel's first.
        guard: its predicate, such as "P0", "!P3" or "UP1"; "" where it always runs.
        opcode: with all its modifiers, such as "IMAD.WIDE.U32".
        operands: as printed, without ".reuse".
        target: the address that a branch leads to.
    """

    address: int
    guard: str
    opcode: str
    operands: tuple[str, ...]
    target: int | None = None

    @functools.cached_property
    def name(self) -> str:
        """The opcode without modifiers."""
        return self.opcode.partition(".")[0]

    @functools.cached_property
    def modifiers(self) -> tuple[str, ...]:
        return tuple(self.opcode.split(".")[1:])

    @functools.cached_property
    def width(self) -> int:
        """Bytes that a load or store moves for each thread."""
        named = {"U8": 1, "S8": 1, "U16": 2, "S16": 2, "64": 8, "128": 16}
        return next((named[m] for m in self.modifiers if m in named), 4)

    @functools.cached_property
    def results(self) -> int:
        """How many of its first operands are what it writes: a register, carries, predicates."""
        if self.name in _NO_RESULT:
            return 0
        if self.name in _TWO_PREDICATES:
            return 2
        kinds = "".join(_kind(o) for o in self.operands[:3])
        if kinds == "RPP" and self.name in ("IADD3", "UIADD3"):
            return 3
        return 2 if kinds.startswith(("PR", "RP")) else 1

    @property
    def sources(self) -> tuple[str, ...]:
        """The operands that it reads."""
        return self.operands[self.results :]


@dataclass(frozen=True)
class Loop:
    """A backward branch and all between its target and it, both by index into the listing."""

    first: int
    last: int

    def __contains__(self, other: object) -> bool:
        return isinstance(other, Loop) and self.first <= other.first and other.last <= self.last


_LINE = re.compile(
    r"/\*(?P<address>[0-9a-f]{4,})\*/\s+"
    r"(?:@(?P<guard>!?U?PT?\d*)\s+)?(?P<opcode>[A-Z][\w.]*)\s*(?P<operands>[^;]*);"
)
_LABEL = re.compile(r"^\s*([.$\w]+):\s*$")
_TARGET = re.compile(r"`\(([.$\w]+)\)")
_JUMPS = ("BRA", "CALL", "BSSY", "BRX", "JMP", "SSY")


def disassembly(cubin: bytes) -> str:
    """What nvdisasm prints of a cubin. Raises MalformedSassError where it is none."""
    return _ask("nvdisasm", "-c", cubin)


def _ask(name: str, option: str, cubin: bytes) -> str:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        done = subprocess.run(
            [str(tool(name)), option, file.name], capture_output=True, text=True, check=False
        )
    if done.returncode:
        raise MalformedSassError(f"{name}: {(done.stderr or done.stdout).strip()}")
    return done.stdout


def usage(cubin: bytes) -> tuple[int, int]:
    """Registers a thread, and bytes of stack: what spills takes room there."""
    text = _ask("cuobjdump", "--dump-resource-usage", cubin)
    return _largest(text, r"REG:(\d+)"), _largest(text, r"STACK:(\d+)")


def _largest(text: str, pattern: str) -> int:
    return max(int(n) for n in re.findall(pattern, text))


@functools.cache
def tool(name: str) -> Path:
    """One of NVIDIA's binary tools, which come with Triton."""
    import triton

    return Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name


def parse(listing: str) -> list[Instruction]:
    """The instructions of a listing of one kernel, in order.

    Raises:
        MalformedSassError: it has none, addresses do not rise, or a branch's label is missing.
    """
    found: list[re.Match[str]] = []
    labels: dict[str, int] = {}
    waiting: list[str] = []
    for line in listing.splitlines():
        if m := _LABEL.match(line):
            waiting.append(m[1])
        elif m := _LINE.search(line):
            address = int(m["address"], 16)
            if found and address <= int(found[-1]["address"], 16):
                raise MalformedSassError(f"address {address:#x} comes twice: several kernels?")
            labels |= dict.fromkeys(waiting, address)
            waiting = []
            found.append(m)
    if not found:
        raise MalformedSassError("there is no instruction")
    return [_instruction(m, labels) for m in found]


def _instruction(m: re.Match[str], labels: dict[str, int]) -> Instruction:
    target = None
    opcode, text = m["opcode"], m["operands"].strip()
    if opcode.split(".")[0] in _JUMPS and (to := _TARGET.search(text)):
        if to[1] not in labels:
            raise MalformedSassError(
                f"{opcode} at {m['address']} leads to {to[1]}, which is not there"
            )
        target = labels[to[1]]
    operands = tuple(
        o.strip().replace(".reuse", "") for o in re.split(r",(?![^\[]*\])", text) if o.strip()
    )
    return Instruction(int(m["address"], 16), m["guard"] or "", opcode, operands, target)


def loops(instructions: Sequence[Instruction]) -> list[Loop]:
    """Every loop, outer ones before those in them. Branches to itself, as at a listing's end, are
    none; several backward branches to one target are one loop."""
    index = {i.address: n for n, i in enumerate(instructions)}
    last: dict[int, int] = {}
    for n, i in enumerate(instructions):
        if i.name == "BRA" and i.target is not None and i.target < i.address:
            first = index[i.target]
            last[first] = max(n, last.get(first, 0))
    return sorted((Loop(a, b) for a, b in last.items()), key=lambda o: (o.first, -o.last))


def spills_in_loops(cubin: bytes) -> int:
    """Loads and stores of registers that did not fit, within loops: once an iteration each."""
    instructions = parse(disassembly(cubin))
    within = {n for loop in loops(instructions) for n in range(loop.first, loop.last + 1)}
    return sum(instructions[n].name in ("LDL", "STL") for n in within)


# ---- pipes ---------------------------------------------------------------------------------------

PIPES = ("tensor", "fma", "imad", "alu", "xu", "lsu", "uniform", "fp64", "control")
_BY_NAME = {
    "tensor": "HMMA HGMMA IMMA IGMMA QGMMA BMMA",
    "fma": "FFMA FADD FMUL FFMA32I FADD32I FMUL32I FSWZADD HFMA2 HADD2 HMUL2 FFMA2",
    "imad": "IMAD IMUL IDP",
    "xu": "MUFU I2F F2I F2F FRND POPC FLO BREV",
    "lsu": "LDG STG LDS STS LDSM STSM LDGSTS LDL STL LD ST ATOM ATOMS ATOMG RED SHFL MATCH REDUX "
           "UTMALDG UTMASTG UBLKCP",
    "fp64": "DADD DMUL DFMA DSETP DMMA DMNMX",
    "control": "BRA EXIT BAR NOP BSSY BSYNC BREAK WARPSYNC DEPBAR LDGDEPBAR WARPGROUP MEMBAR FENCE "
               "CALL RET ERRBAR CCTL SYNCS BRX JMP YIELD NANOSLEEP ACQBULK ARRIVES UTMACMDFLUSH "
               "WARPGROUPSET BPT PREEXIT ELECT KILL LEPC RPCMOV UCGABAR_ARV UCGABAR_WAIT",
}  # fmt: skip
_PIPE = {name: pipe for pipe, names in _BY_NAME.items() for name in names.split()}


def pipe(i: Instruction) -> str:
    """Which part of a multiprocessor runs it: one of `PIPES`. Integers, logic, comparisons and
    conversions between floats run in "alu", where what is not known is counted, too."""
    if i.opcode.startswith("HFMA2.MMA"):  # the FP16 unit, here used to make constants
        return "fma"
    known = _PIPE.get(i.name)
    if known is None:
        return "uniform" if i.name.startswith("U") else "alu"
    return known


def matrix_flops(i: Instruction) -> int:
    """Operations (two for a multiply-add) of one matrix instruction, for the warp or, for HGMMA,
    for its share of the four warps; 0 of others."""
    if i.name == "HMMA":
        m = re.search(r"\.(16)(8)(8|16|4)\b", i.opcode)
    elif i.name == "HGMMA":
        m = re.search(r"\.(64)x(\d+)x(\d+)", i.opcode)
    else:
        return 0
    if m is None:
        raise MalformedSassError(f"the shape of {i.opcode} is not known")
    flops = 2 * int(m[1]) * int(m[2]) * int(m[3])
    return flops // 4 if i.name == "HGMMA" else flops


# ---- registers -----------------------------------------------------------------------------------

_NO_RESULT = {
    "STG", "STS", "STSM", "STL", "ST", "RED", "LDGSTS", "UTMALDG", "UTMASTG", "R2P",
    *_BY_NAME["control"].split(),
}  # fmt: skip
_TWO_PREDICATES = {
    "ISETP",
    "UISETP",
    "FSETP",
    "DSETP",
    "HSETP2",
    "PLOP3",
    "UPLOP3",
    "VOTE",
    "VOTEU",
}
_REGISTER = re.compile(r"(?<![\w.])(UR|R|UP|P)(\d+)(\.64)?(?!\w)")
PREDICATES = tuple(f"P{n}" for n in range(7))


def _kind(operand: str) -> str:
    m = re.fullmatch(r"U?(R|P)(?:\d+|Z|T)(?:\.64)?", operand)
    return m[1] if m else "-"


def destinations(i: Instruction) -> Iterator[str | None]:
    """What it writes, a name for each register and predicate; None for RZ and PT."""
    if i.name == "R2P":
        yield from PREDICATES
    for operand in i.operands[: i.results]:
        m = _REGISTER.fullmatch(operand)
        count = 1 if operand.lstrip("U").startswith("P") else _registers(i)
        for k in range(count):
            yield f"{m[1]}{int(m[2]) + k}" if m else None


def written(i: Instruction) -> Iterator[str]:
    """Registers and predicates that it writes, without those that are constants."""
    return (name for name in destinations(i) if name is not None)


def _registers(i: Instruction) -> int:
    """Registers of its result."""
    if i.name in ("LDG", "LDS", "LDC", "ULDC", "LDL", "LD"):
        return max(1, i.width // 4)
    if i.name == "LDSM":
        return int(i.modifiers[-1]) if i.modifiers[-1].isdigit() else 1
    if i.name == "HGMMA":
        return int(i.opcode.split("x")[1]) // 2
    if i.name == "HMMA":
        return 4 if "F32" in i.modifiers else 2
    if i.name == "I2F":
        return 2 if "F64" in i.modifiers else 1
    if i.name == "CS2R":
        return 1 if "32" in i.modifiers else 2
    wide = {"WIDE", "64", "U64", "S64", "F64"} & set(i.modifiers)
    return 2 if (wide and i.name not in ("SHF", "USHF", "SHFL")) or i.name[0] == "D" else 1


def read(i: Instruction) -> Iterator[str]:
    """Registers and predicates that it may read; of an operand of 64 bits both registers."""
    wide = {"64", "U64", "WIDE"} & set(i.modifiers)
    if i.name == "P2R":
        yield from PREDICATES
    for text in (i.guard, *i.sources):
        for m in _REGISTER.finditer(text):
            yield f"{m[1]}{m[2]}"
            if m[1] in ("R", "UR") and (m[3] or wide):
                yield f"{m[1]}{int(m[2]) + 1}"
