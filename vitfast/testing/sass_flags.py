"""Predicates that a compiler keeps as bits of a register, some of them known and some not.

There are seven predicates. When they do not suffice, ptxas clears a bit (`LOP3 R, R, ~bit`), sets
it where a predicate holds (`@P LOP3 R, R, bit`), and tests it later (`LOP3 P, R, bit`). A bit that
came from data must not make those unknown that end a loop.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field

import numpy as np

from vitfast.testing.sass import Instruction
from vitfast.testing.sass_operands import MASK, Value


@dataclass(frozen=True)
class FlagUse:
    """What an instruction does to bits of a register: "keep" (all others are cleared), "set" or
    "test"."""

    kind: str
    register: str
    bits: int


def flag_use(i: Instruction) -> FlagUse | None:
    """How an instruction uses a register of flags; None if it does not."""
    if i.name != "LOP3":
        return None
    register, bits, third, table = (*i.sources, "", "", "", "")[:4]
    if not re.fullmatch(r"R\d+", register) or not bits.startswith("0x") or third != "RZ":
        return None
    if i.results == 2 and i.operands[1] == "RZ" and table == "0xc0":
        return FlagUse("test", register, int(bits, 16))
    if i.operands[0] == register and table in ("0xc0", "0xfc"):
        return FlagUse("keep" if table == "0xc0" else "set", register, int(bits, 16))
    return None


@dataclass
class Flags:
    """Registers that are known in part: (value, which bits are known); unknown bits are 0."""

    known: dict[str, tuple[Value, int]] = field(default_factory=dict)

    def forget(self, register: str) -> None:
        """The register was written by something else."""
        self.known.pop(register, None)

    def test(self, use: FlagUse) -> Value:
        """1 where one of the bits is set; None where one of them is not known."""
        value, known = self.known.get(use.register, (0, 0))
        return None if use.bits & ~known else (value & use.bits != 0) * 1

    def change(self, use: FlagUse, guard: bool | np.ndarray | None) -> None:
        """Keeps or sets bits for the threads that `guard` lets pass; None: not known which."""
        value, known = self.known.get(use.register, (0, 0))
        if guard is False:
            return
        if use.kind == "keep" and guard is True:
            self.known[use.register] = value & use.bits, (known | ~use.bits) & MASK
        elif use.kind == "keep" or guard is None:
            changed = ~use.bits & MASK if use.kind == "keep" else use.bits
            self.known[use.register] = value & ~changed, known & ~changed
        elif guard is True:
            self.known[use.register] = value | use.bits, known | use.bits
        else:
            self.known[use.register] = np.where(guard, value | use.bits, value), known
