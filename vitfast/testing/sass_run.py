"""Which instructions of a kernel run how often: its integers and branches executed for one block.

A compiled kernel's trip counts follow from its arguments, in ways that compilers disguise by
pipelining, unrolling and turning loops over. So instead of guessing them, one block is run, thread
by thread, as far as branches and addresses depend on it: all that is computed from arguments,
thread and block numbers. What was loaded from memory or is a floating-point number is unknown.
Addresses give what a warp's access costs: sectors of global memory, conflicts of shared memory.

A branch on something unknown falls through if it leads forward (its body counts as run), and is an
error if it closes a loop.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from vitfast.testing.sass import Instruction, MalformedSassError, destinations, read, written
from vitfast.testing.sass_flags import Flags, flag_use
from vitfast.testing.sass_integers import FUNCTIONS
from vitfast.testing.sass_operands import Operands, Value

_SEEN = 4
"""Of how many visits of a basic block the accesses are looked at: later ones are taken to cost as
much, and only what branches depend on is then computed."""
_MOST_STEPS = 2_000_000
_LEAVING = ("BRA", "EXIT", "CALL", "RET", "BRX")


_Steps = list[tuple[int, bool]]


class UnknownTripCountError(ValueError):
    """A loop's end depends on what the kernel loads, so that no trip count can be given."""


@dataclass
class Counts:
    """What one block executes, by index into the listing.

    Args:
        warps: times a warp issues it.
        bytes: by threads whose predicate holds, of loads and stores.
        sectors: of 32 bytes of global memory, that its accesses touch.
        wavefronts: cycles of the shared memory's or first cache's 128 bytes.
    """

    warps: list[int]
    bytes: dict[int, float] = field(default_factory=dict)
    sectors: dict[int, float] = field(default_factory=dict)
    wavefronts: dict[int, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Launch:
    """What a block knows of itself.

    Args:
        bank: words of constant bank 0 by offset in bytes: sizes, then the arguments.
        threads: of a block, along x alone.
        block: its number along x, y and z.
        grid: blocks along x, y and z.
    """

    bank: Mapping[int, int]
    threads: int
    block: tuple[int, int, int]
    grid: tuple[int, int, int]

    def special(self, name: str) -> Value:
        """A special register such as SR_TID.X; None where it is not known."""
        axes = {"X": 0, "Y": 1, "Z": 2}
        base, _, axis = name.partition(".")
        tid = np.arange(self.threads)
        if base == "SR_CTAID":
            return self.block[axes[axis]]
        if base == "SR_NCTAID":
            return self.grid[axes[axis]]
        if base == "SR_TID":
            return tid if axis == "X" else 0
        return {"SR_LANEID": tid % 32, "SRZ": 0, "SR_CgaCtaId": 0}.get(name)


class Program:
    """A listing made ready to run: its basic blocks, and what of them has to be computed."""

    def __init__(self, code: Sequence[Instruction]) -> None:
        self.code = code
        self.index = {i.address: n for n, i in enumerate(code)}
        self.destinations = [list(destinations(i)) for i in code]
        self.addresses = [_addresses(i) for i in code]
        self.flags = [flag_use(i) for i in code]
        values, branches = needed(code), needed(code, addresses=False)
        ends = {n + 1 for n, i in enumerate(code) if i.name in _LEAVING}
        starts = {self.index[i.target] for i in code if i.target is not None} | ends | {0}
        order = sorted(starts - {len(code)})
        self.blocks: dict[int, tuple[int, _Steps, _Steps]] = {}
        """By first instruction: the one after it, steps, and those of later visits, when all
        accesses have been looked at and only where it leads to is of interest. A step is an
        instruction, and whether it is its access or its result."""
        for first, after in zip(order, [*order[1:], len(code)], strict=True):
            steps = []
            for n in range(first, after):
                steps += [(n, True)] if is_memory(code[n]) else []
                steps += [(n, False)] if n in values else []
            later = [(n, False) for n in range(first, after) if n in branches]
            self.blocks[first] = after, steps, later


def run(program: Program, launch: Launch) -> Counts:
    """Executes one block.

    Raises:
        UnknownTripCountError: a loop's end depends on data, or does not come.
    """
    return _Block(program, launch).run()


def needed(code: Sequence[Instruction], addresses: bool = True) -> set[int]:
    """Which instructions branches and, if `addresses`, accesses depend on, by index."""
    wanted: set[str] = set()
    found: set[int] = set()
    for i in code:
        if i.name in _LEAVING:
            wanted |= set(read(i))
        elif addresses and is_memory(i):
            wanted |= {i.guard.lstrip("!")}
            wanted |= {r for _, text in _addresses(i) for r in _registers_of(text)}
            if i.name == "LDGSTS":
                wanted |= {o.lstrip("!") for o in i.operands[2:]}
    writers: dict[str, list[int]] = {}
    for n, i in enumerate(code):
        for register in written(i):
            writers.setdefault(register, []).append(n)
    queue = list(wanted)
    while queue:
        for n in writers.get(queue.pop(), ()):
            if n not in found:
                found.add(n)
                new = set(read(code[n])) | set(written(code[n]))
                queue += new - wanted
                wanted |= new
    return found


def _registers_of(text: str) -> set[str]:
    found = set()
    for kind, number, wide in re.findall(r"(?<![\w.])(UR|R)(\d+)(\.64)?", text):
        found.add(f"{kind}{number}")
        if wide:
            found.add(f"{kind}{int(number) + 1}")
    return found


_GLOBAL = {"LDG", "STG", "RED", "ATOMG", "ATOM", "LD", "ST"}
_SHARED = {"LDS", "STS", "LDSM", "STSM", "ATOMS"}


def is_memory(i: Instruction) -> bool:
    return i.name in _GLOBAL or i.name in _SHARED or i.name == "LDGSTS"


def _addresses(i: Instruction) -> list[tuple[str, str]]:
    """("global" or "shared", what is between the brackets) of each address of an access."""
    if not is_memory(i):
        return []
    brackets = [re.findall(r"\[([^\]]+)\]", o) for o in i.operands if not o.startswith("c[")]
    found = [texts[-1] for texts in brackets if texts]
    if i.name == "LDGSTS":
        return [("shared", found[0]), ("global", found[-1])]
    return [("shared" if i.name in _SHARED else "global", found[0])]


Mask = np.ndarray | None
"""Threads that take part; None: all of them."""


class _Block:
    """The state of one block while it runs."""

    def __init__(self, program: Program, launch: Launch) -> None:
        self.program, self.launch = program, launch
        self.code, self.index = program.code, program.index
        self.values: dict[str, Value] = {"RZ": 0, "URZ": 0, "PT": 1, "UPT": 1}
        self.operands = Operands(self.values, launch.bank, launch.special)
        self.flags = Flags()
        self.entries: dict[tuple[int, int], int] = {}
        self.visits: dict[int, int] = {}
        self.accesses: dict[int, list[tuple[float, float, float]]] = {}

    def run(self) -> Counts:
        warps = -(-self.launch.threads // 32)
        waiting: dict[int, np.ndarray] = {}
        at: int | None = 0
        mask: Mask = None
        steps = 0
        while at is not None:
            if waiting and (first := min(waiting)) <= at:
                here = np.ones(self.launch.threads, bool) if mask is None else mask
                other = waiting.pop(first)
                if first < at:
                    waiting[at] = here
                    mask = other
                else:
                    mask = here | other
                at = first
                mask = None if mask.all() else mask
            after, todo, later = self.program.blocks[at]
            self.visits[at] = self.visits.get(at, 0) + 1
            todo = todo if self.visits[at] <= _SEEN else later
            count = warps if mask is None else int(_by_warp(mask).any(1).sum())
            self.entries[at, after] = self.entries.get((at, after), 0) + count
            for n, is_access in todo:
                if is_access:
                    self._access(n, mask)
                else:
                    self._compute(n, mask)
            steps += after - at
            if steps > _MOST_STEPS:
                raise UnknownTripCountError(f"more than {_MOST_STEPS} instructions without an end")
            at, mask = self._leave(after, mask, waiting)
            if at is None and waiting:
                at = min(waiting)
                mask = waiting.pop(at)
        return self._counts()

    def _leave(
        self, after: int, mask: Mask, waiting: dict[int, np.ndarray]
    ) -> tuple[int | None, Mask]:
        """Where the threads of `mask` go after the instruction before `after`."""
        i = self.code[after - 1]
        if i.name not in _LEAVING:
            return after, mask
        to = None if i.name == "EXIT" else self._target(i)
        taken = self._taken(i)
        if taken is None:
            if to is not None and to < after:
                raise UnknownTripCountError(
                    f"{i.opcode} {', '.join(i.operands)} at {i.address:#x} depends on data"
                )
            return after, mask
        if isinstance(taken, bool):
            return (to if taken else after), mask
        here = np.ones(len(taken), bool) if mask is None else mask
        go, stay = here & taken, here & ~taken
        if not go.any():
            return after, mask
        if not stay.any():
            return to, mask
        if to is None:
            return after, stay
        near, far = (after, to) if after < to else (to, after)
        waiting[far] = waiting.get(far, np.zeros(len(taken), bool)) | (stay if far == after else go)
        return near, stay if near == after else go

    def _target(self, i: Instruction) -> int:
        if i.target is not None:
            return self.index[i.target]
        where = self.values.get(i.operands[0].split()[0]) if i.operands else None
        address = int(where.flat[0]) if isinstance(where, np.ndarray) else where
        if address not in self.index:
            raise UnknownTripCountError(f"{i.opcode} at {i.address:#x} leads nobody knows where")
        return self.index[address]

    def _taken(self, i: Instruction) -> bool | np.ndarray | None:
        """Which threads an instruction's predicates let pass; None where one is unknown."""
        found: bool | np.ndarray = True
        if i.name == "BRA" and {"DIV", "CONV"} & set(i.modifiers):
            return False  # for warps whose threads have parted
        names = [i.guard] if i.guard else []
        if i.name == "BRA":
            names += [o for o in i.operands if re.fullmatch(r"!?U?P(\d|T)", o)]
        for name in names:
            value = self.operands.predicate(name)
            if value is None:
                return None
            found = found & (value != 0)
        return found if isinstance(found, np.ndarray) else bool(found)

    def _compute(self, n: int, mask: Mask) -> None:
        i = self.code[n]
        guard = self._taken(i) if i.guard else True
        names = self.program.destinations[n]
        function = FUNCTIONS.get(i.name)
        made: Sequence[Value] | None = None
        if function is not None and guard is not None:
            made = function(i, self.operands)
        use = self.program.flags[n]
        if use is not None and made is None and self.values.get(use.register) is None:
            if use.kind != "test":
                self.flags.change(use, guard if mask is None or guard is None else guard & mask)
                return
            made = [self.flags.test(use), None] if guard is not None else None
        if made is None or len(made) != len(names):
            made = [None] * len(names)
        if guard is False or (isinstance(guard, np.ndarray) and not guard.any()):
            return
        who = guard if isinstance(guard, np.ndarray) else None
        if mask is not None:
            who = mask if who is None else who & mask
        for name, value in zip(names, made, strict=True):
            if name is None:
                continue
            self.flags.forget(name)
            if isinstance(value, np.generic):
                value = int(value)
            old = self.values.get(name)
            if who is not None and value is not None and old is not None and not who.all():
                value = np.where(who, value, old)
            self.values[name] = value

    def _access(self, n: int, mask: Mask) -> None:
        seen = self.accesses.setdefault(n, [])
        if len(seen) >= _SEEN:
            return
        i, threads = self.code[n], self.launch.threads
        guard = self._taken(i) if i.guard else True
        active = np.ones(threads, bool) if mask is None else mask.copy()
        if guard is False:
            active[:] = False
        elif isinstance(guard, np.ndarray):
            active &= guard
        width = i.width if i.name not in ("LDSM", "STSM") else 4 * _matrices(i)
        moved, sectors, waves = float(active.sum()) * width, 0.0, 0.0
        for where, text in self.program.addresses[n]:
            if where == "global" and i.name == "LDGSTS":
                for name in i.operands[2:]:
                    value = self.operands.predicate(name)
                    active = active if value is None else active & (value != 0)
                moved = float(active.sum()) * width
            address = self.operands.address(text)
            if where == "global":
                touched = _sectors(address, active, width)
                sectors += touched
                waves += touched / 4 if i.name != "LDGSTS" else 0.0
            elif i.name in ("LDSM", "STSM"):
                waves += _matrix_wavefronts(address, active, _matrices(i))
            else:
                waves += _wavefronts(address, active, width)
        seen.append((moved, sectors, waves))

    def _counts(self) -> Counts:
        found = Counts([0] * len(self.code))
        for (first, after), count in self.entries.items():
            for n in range(first, after):
                found.warps[n] += count
        executed: dict[int, int] = {}
        warps = -(-self.launch.threads // 32)
        for n, seen in self.accesses.items():
            executed[n] = max(1, round(found.warps[n] / warps))
            if seen:
                times = executed[n] / len(seen)
                found.bytes[n] = times * sum(s[0] for s in seen)
                found.sectors[n] = times * sum(s[1] for s in seen)
                found.wavefronts[n] = times * sum(s[2] for s in seen)
        return found


def _matrices(i: Instruction) -> int:
    """8x8 matrices of an LDSM or STSM."""
    return int(i.modifiers[-1]) if i.modifiers[-1].isdigit() else 1


def _by_warp(values: np.ndarray) -> np.ndarray:
    return values.reshape(-1, min(32, len(values)))


def _sectors(address: Value, active: np.ndarray, width: int) -> float:
    """Sectors of 32 bytes that the warps touch; the fewest where addresses are not known."""
    if address is None:
        return float(active.sum()) * width / 32
    total = 0
    lanes = _by_warp(np.broadcast_to(np.asarray(address), active.shape))
    for warp, on in zip(lanes, _by_warp(active), strict=True):
        first, last = warp[on] // 32, (warp[on] + width - 1) // 32
        total += len(np.union1d(first, last))
    return float(total)


def _wavefronts(address: Value, active: np.ndarray, width: int) -> float:
    """Cycles of shared memory: 32 banks of 4 bytes, 8-byte accesses by half warps, 16 by quarters;
    as many as the most words that one bank must give."""
    words = max(1, width // 4)
    if address is None:
        return float(np.ceil(active.sum() / 32 * words))
    spread = np.broadcast_to(np.asarray(address), active.shape)
    group = min(32 // words, len(active))
    total = 0
    for lanes, on in zip(spread.reshape(-1, group), active.reshape(-1, group), strict=True):
        if on.any():
            total += _degree((lanes[on][:, None] // 4 + np.arange(words)).ravel())
    return float(total)


def _matrix_wavefronts(address: Value, active: np.ndarray, matrices: int) -> float:
    """Of LDSM and STSM: eight threads give the rows, of 16 bytes, of each matrix."""
    warps = _by_warp(active)
    if address is None:
        return float(warps.any(1).sum() * matrices)
    total = 0
    for lanes, on in zip(
        _by_warp(np.broadcast_to(np.asarray(address), active.shape)), warps, strict=True
    ):
        for m in range(matrices if on.any() else 0):
            total += _degree((lanes[8 * m : 8 * m + 8][:, None] // 4 + np.arange(4)).ravel())
    return float(total)


def _degree(words: np.ndarray) -> int:
    return int(np.bincount(np.unique(words) % 32).max())


def constant_bank(
    entries: Sequence[tuple[int, int, int]], sizes: Mapping[int, int]
) -> dict[int, int]:
    """Words of constant bank 0.

    Args:
        entries: (offset, bytes, value) of each argument.
        sizes: words that every kernel has, such as the block's threads.

    Raises:
        MalformedSassError: an argument's size is no 1, 2, 4 or 8 bytes.
    """
    bank = dict(sizes)
    for offset, size, value in entries:
        if size not in (1, 2, 4, 8):
            raise MalformedSassError(f"an argument of {size} bytes")
        bank[offset & ~3] = value & 0xFFFFFFFF
        if size == 8:
            bank[offset + 4] = value >> 32 & 0xFFFFFFFF
    return bank
