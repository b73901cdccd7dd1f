"""A performance model of the Triton kernels for GPUs that are not here. It is a model: no timing.

For every launch that an op's real samples make (see `recorded`), one block is run as far as its
branches and addresses go (see `sass_run`), and what it issues is set against what a multiprocessor
can do in a cycle. The bound is the time that the busiest of its parts needs, or DRAM for each
tensor once: no kernel with these instructions can be faster, and real ones are slower, since the
model knows no latencies, no dependencies between instructions, no barriers' waiting and no misses.
A high bound over floor names a kernel that wastes instructions; a low one does not prove it fast.

Rates: NVIDIA, "CUDA C++ Programming Guide", throughput of native arithmetic instructions, and the
architectures' white papers; HMMA on Hopper, which has no published figure, at 62 % of HGMMA's peak,
as Luo et al. measured ("Benchmarking and Dissecting the Nvidia Hopper GPU Architecture via
Microbenchmarking", 2024). Clocks are those that the peak figures in data sheets are given at.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from vitfast import ops
from vitfast.ops.spec import Cost, Sample
from vitfast.runtime.launches import Arch
from vitfast.testing import recorded, sass, sass_run
from vitfast.testing.recorded import Array, Recorded

BATCH = 64
"""Images a sample is enlarged to."""
DTYPE = torch.bfloat16
_HIGHER = re.compile(r"_(?:1024|1536|4k)")
"""Samples of resolutions far above a model's own: the same kernels with longer loops."""
_BLOCKS = 3
"""How many of a grid's blocks are run; the others are taken to be as they are on average."""


@dataclass(frozen=True)
class Multiprocessor:
    """What one multiprocessor of an architecture holds, and does in a cycle.

    Args:
        fma, imad, alu, xu, uniform, fp64: instructions of a warp.
        hmma, hgmma: operations (2 a multiply-add) in half precision with sums in float32.
        threads, blocks, registers, shared: that are resident at most; `shared` in bytes.
    """

    fma: float
    fp64: float
    hmma: float
    hgmma: float
    threads: int
    blocks: int
    shared: int
    imad: float = 2
    alu: float = 2
    xu: float = 0.5
    uniform: float = 2
    issue: float = 4
    lsu: float = 1
    registers: int = 65_536
    l2_bytes: float = 64


MULTIPROCESSORS = {
    "sm_80": Multiprocessor(2, 1, 2048, 0, threads=2048, blocks=32, shared=167_936),
    "sm_89": Multiprocessor(4, 1 / 16, 512, 0, threads=1536, blocks=24, shared=102_400),
    "sm_90": Multiprocessor(4, 2, 2540, 4096, threads=2048, blocks=32, shared=233_472),
}


@dataclass(frozen=True)
class Device:
    """A GPU: how many multiprocessors at which clock, and its memory's bytes a second."""

    name: str
    target: str
    count: int
    hertz: float
    bandwidth: float

    @property
    def part(self) -> Multiprocessor:
        return MULTIPROCESSORS[self.target]

    @property
    def tensor_flops(self) -> float:
        """Dense matrix operations a second in half precision, sums in float32."""
        return self.count * self.hertz * max(self.part.hmma, self.part.hgmma)

    @property
    def float_flops(self) -> float:
        """Operations a second of float32 multiply-adds."""
        return self.count * self.hertz * self.part.fma * 32 * 2


DEVICES = (
    Device("A100", "sm_80", 108, 1.41e9, 2.039e12),
    Device("RTX 4090", "sm_89", 128, 2.52e9, 1.008e12),
    Device("H100", "sm_90", 132, 1.83e9, 3.35e12),
    Device("H200", "sm_90", 132, 1.83e9, 4.8e12),
)
"""A100 and H100 with SXM and 80 GB."""
TARGETS = tuple(MULTIPROCESSORS)


def resident(target: str, registers: int, shared: int, warps: int) -> int:
    """Blocks that a multiprocessor holds at a time, by the rules of NVIDIA's occupancy calculator.

    Args:
        registers: of a thread; a warp's are allotted in units of 256.
        shared: bytes of a block, to which the system adds 1 KiB; allotted in units of 128.
        warps: of a block.
    """
    part = MULTIPROCESSORS[target]
    of_warp = -(-max(registers, 1) * 32 // 256) * 256
    # A quarter of the registers belongs to each of the four schedulers, which take whole warps.
    by_registers = part.registers // 4 // of_warp * 4 // warps
    by_shared = part.shared // (-(-(shared + 1024) // 128) * 128)
    return min(part.blocks, part.threads // 32 // warps, by_registers, by_shared)


@dataclass(frozen=True)
class Work:
    """What one block of a compiled kernel does, on average over those that were run.

    Args:
        pipes: instructions of its warps by pipe (see `sass.PIPES`).
        tensor: by "hmma" and "hgmma", operations in half precision; TF32's count twice.
        flops: operations of its matrix instructions.
        wavefronts: cycles of shared memory and the first cache.
        sectors: of 32 bytes, read from or written to global memory.
        barriers: of the whole block.
        loops: (instructions, times a warp runs it) of each loop.
    """

    pipes: dict[str, float]
    tensor: dict[str, float]
    flops: float
    wavefronts: float
    sectors: float
    barriers: float
    loops: tuple[tuple[int, float], ...]
    registers: int
    shared: int
    warps: int

    @property
    def instructions(self) -> float:
        return sum(self.pipes.values())

    def cycles(self, part: Multiprocessor) -> dict[str, float]:
        """Cycles of a multiprocessor that each of its parts needs for one block."""
        p = self.pipes
        tensor = sum(f / getattr(part, kind) for kind, f in self.tensor.items() if f)
        return {
            "issue": self.instructions / part.issue,
            "fma": max((p["fma"] + p["imad"]) / part.fma, p["imad"] / part.imad),
            "alu": p["alu"] / part.alu,
            "xu": p["xu"] / part.xu,
            "lsu": p["lsu"] / part.lsu,
            "uniform": p["uniform"] / part.uniform,
            "fp64": p["fp64"] / part.fp64,
            "shared": self.wavefronts,
            "L2": 32 * self.sectors / part.l2_bytes,
            "tensor": tensor,
        }


def work(launch: Recorded, target: str) -> Work:
    """Compiles a launch for a target and runs some of its blocks; asks no driver.

    Raises:
        sass_run.UnknownTripCountError: a loop depends on data.
    """
    compiled = recorded.as_compiled(launch, Arch(target))
    program, registers = _read(compiled.asm["cubin"])
    code = program.code
    warps = launch.options.get("num_warps", 4)
    bank = constant_bank(launch, compiled.asm["ptx"], target, 32 * warps)
    counts = [
        sass_run.run(program, sass_run.Launch(bank, 32 * warps, block, launch.grid))
        for block in _spread(launch.grid)
    ]
    share = 1 / len(counts)
    issued = [share * sum(c.warps[n] for c in counts) for n in range(len(code))]
    pipes = dict.fromkeys(sass.PIPES, 0.0)
    tensor = {"hmma": 0.0, "hgmma": 0.0}
    flops = barriers = 0.0
    for i, times in zip(code, issued, strict=True):
        pipes[sass.pipe(i)] += times
        if matrix := sass.matrix_flops(i):
            flops += times * matrix
            tensor[i.name.lower()] += times * matrix * (2 if "TF32" in i.opcode else 1)
        if i.name == "BAR":
            barriers += times / warps
    return Work(
        pipes, tensor, flops,
        share * sum(sum(c.wavefronts.values()) for c in counts),
        share * sum(sum(c.sectors.values()) for c in counts),
        barriers,
        tuple((o.last - o.first + 1, issued[o.first] / warps) for o in sass.loops(code)),
        registers, compiled.metadata.shared, warps,
    )  # fmt: skip


@functools.lru_cache(maxsize=256)
def _read(cubin: bytes) -> tuple[sass_run.Program, int]:
    """The program of a cubin, and the registers of a thread."""
    return sass_run.Program(sass.parse(sass.disassembly(cubin))), sass.usage(cubin)[0]


def _spread(grid: tuple[int, int, int]) -> Iterator[tuple[int, int, int]]:
    """Some blocks of a grid, as far from each other as from its ends."""
    programs = grid[0] * grid[1] * grid[2]
    for n in sorted({(2 * k + 1) * programs // (2 * _BLOCKS) for k in range(_BLOCKS)}):
        yield n % grid[0], n // grid[0] % grid[1], n // grid[0] // grid[1]


def constant_bank(launch: Recorded, ptx: str, target: str, threads: int) -> dict[int, int]:
    """Constant bank 0: sizes and arguments, tensors 4 GiB from each other."""
    values = recorded.run_time(launch)
    entries, at = [], 0x210 if Arch(target).capability >= 90 else 0x160
    for n, size in enumerate(_parameter_sizes(ptx)):
        at = -(-at // size) * size
        value = values[n] if n < len(values) else 0  # then the scratch memory that Triton adds
        if isinstance(value, Array):
            entries.append((at, size, (n + 1) << 32))
        elif isinstance(value, int):
            entries.append((at, size, value))
        at += size
    sizes = {0: threads, 4: 1, 8: 1, **{12 + 4 * k: launch.grid[k] for k in range(3)}, 0x28: 0}
    return sass_run.constant_bank(entries, sizes)


def _parameter_sizes(ptx: str) -> list[int]:
    head = ptx[ptx.index(".entry") :]
    return [int(b) // 8 for b in re.findall(r"\.param \.[a-z](\d+)", head[: head.index("{")])]


# ---- bounds --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Bound:
    """One kernel of one call on one device; times in microseconds.

    Args:
        memory: each tensor's bytes once, at DRAM's bandwidth.
        math: the operations at the device's peak.
        bound: the least time these instructions take.
        limit: what gives the bound: a part of the multiprocessor (see `Work.cycles`) or "DRAM".
        occupancy: share of the warps that a multiprocessor may hold.
    """

    memory: float
    math: float
    bound: float
    limit: str
    occupancy: float

    @property
    def floor(self) -> float:
        return max(self.memory, self.math)

    @property
    def over(self) -> float:
        return self.bound / self.floor


def array_bytes(launch: Recorded) -> float:
    """Bytes of a launch's tensors, each once however many arguments name it."""
    arrays = {(a.memory, a.offset): a for a in launch.arguments.values() if isinstance(a, Array)}
    return float(sum(a.nbytes for a in arrays.values()))


def bound(launch: Recorded, done: Work, device: Device, cost: Cost | None = None) -> Bound:
    """The bound of a launch whose blocks do this work.

    Args:
        cost: of the op by its spec, where this kernel is all of the call: its operations then count
            instead of those that matrix instructions do, of which some are on padding.
    """
    peak = device.tensor_flops if done.flops else device.float_flops
    math = (done.flops * launch.programs if cost is None else cost.flops) / peak
    memory = array_bytes(launch) / device.bandwidth
    each = max(1.0, launch.programs / device.count)
    times = {k: c * each / device.hertz for k, c in done.cycles(device.part).items()}
    times["DRAM"] = memory
    limit = max(times, key=lambda k: times[k])
    held = resident(device.target, done.registers, done.shared, done.warps)
    warps = min(held, max(1, launch.programs // device.count)) * done.warps
    return Bound(
        memory * 1e6, math * 1e6, times[limit] * 1e6, limit, warps * 32 / device.part.threads
    )


@dataclass(frozen=True)
class Line:
    """A kernel of an op's real sample: what it does, and its bound on each device of the target."""

    op: str
    sample: str
    which: str
    launch: Recorded
    work: Work
    bounds: dict[str, Bound]


def lines(target: str, names: set[str] | None = None) -> Iterator[Line]:
    """Every compiled kernel of forwards and backwards, once: at the first real sample that has it.

    Functions that no real sample launches follow, at the first other sample that does.
    """
    for op, module in recorded.modules().items():
        if names is not None and op not in names:
            continue
        seen: set[Any] = set()
        for sample, which, launch, cost in _launches(op, target, _real(op)):
            key = _key(which, launch)
            if key not in seen:
                seen.add(key)
                yield line(op, sample, which, launch, target, cost)
        missing = {v.kernel for v in module.variants(Arch(target))} - {key[1] for key in seen}
        for sample, which, launch, cost in _launches(op, target, _others(op)) if missing else ():
            if launch.kernel in missing:
                missing.remove(launch.kernel)
                yield line(op, sample, which, launch, target, cost)
            if not missing:
                break


def _real(op: str) -> list[Sample]:
    return [
        s for s in ops.spec_of(op).samples
        if "real" in s.tags and "large" not in s.tags and not _HIGHER.search(s.name)
    ]  # fmt: skip


def _others(op: str) -> list[Sample]:
    real = _real(op)
    return [
        s for s in ops.spec_of(op).samples
        if s not in real and not {"empty", "large"} & s.tags and not _HIGHER.search(s.name)
    ]  # fmt: skip


def _launches(
    op: str, target: str, samples: Sequence[Sample]
) -> Iterator[tuple[str, str, Recorded, Cost | None]]:
    """(sample, pass, launch, the op's cost if this launch is all of the pass)."""
    spec = ops.spec_of(op)
    for sample in samples:
        call, cost = recorded.real_call(spec, sample, DTYPE, BATCH)
        for which, launches in recorded.passes(call, spec.public, Arch(target)).items():
            alone = cost if which == "forward" and len(launches) == 1 else None
            yield from ((sample.name, which, launch, alone) for launch in launches)


def _key(which: str, launch: Recorded) -> tuple[Any, ...]:
    """Equal for launches of one compiled kernel."""
    constants = {
        name: a.dtype if isinstance(a, Array) else a
        for i, (name, a) in enumerate(launch.arguments.items())
        if isinstance(a, Array) or a is None or launch.kernel.params[i].is_constexpr
    }
    return which, launch.kernel, str(constants), str(launch.options)


def line(
    op: str, sample: str, which: str, launch: Recorded, target: str, cost: Cost | None = None
) -> Line:
    """The line of one launch.

    Raises:
        sass_run.UnknownTripCountError: as `work`; says which launch of which op it is.
    """
    try:
        done = work(launch, target)
    except sass_run.UnknownTripCountError as error:
        where = f"{launch.name} of {op} {sample}, {which}, on {target}"
        raise sass_run.UnknownTripCountError(f"{where}: {error}") from error
    found = {d.name: bound(launch, done, d, cost) for d in DEVICES if d.target == target}
    return Line(op, sample, which, launch, done, found)
