"""Operands of SASS instructions as numbers of all threads of a block at once.

Values are Python's ints where all threads hold the same, else int64 arrays [threads], of unsigned
32-bit numbers; predicates hold 0 and 1; None is what is not known.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Mapping
from typing import Any

Value = Any
"""int, np.ndarray or None."""
MASK = 0xFFFFFFFF
_PLAIN = re.compile(r"(-|~|!)?(\|)?(U?(?:R|P)(?:\d+|Z|T))(\.64|\.U32)?(?:\.X(\d+))?(\|)?")


@functools.lru_cache(maxsize=1 << 16)
def _parsed(text: str) -> tuple[str, Any, str | None, str | None, int]:
    """An operand's kind, "number", "bank" or "register", which of them, and what is done to it."""
    if m := re.fullmatch(r"(-)?0x([0-9a-f]+)", text):
        value = int(m[2], 16)
        return "number", (-value if m[1] else value) & MASK, None, None, 1
    if re.fullmatch(r"-?\d+", text):
        return "number", int(text) & MASK, None, None, 1
    if m := re.fullmatch(r"(-|~)?(\|)?c\[0x0\]\[0x([0-9a-f]+)\]\|?", text):
        return "bank", int(m[3], 16), m[1], m[2], 1
    if m := _PLAIN.fullmatch(text):
        return "register", m[3], m[1], m[2], int(m[5] or 1)
    return "number", None, None, None, 1


class Operands:
    """Reads operands: of registers, constants and the constant bank."""

    def __init__(
        self, values: dict[str, Value], bank: Mapping[int, int], special: Callable[[str], Value]
    ) -> None:
        self.values, self.bank, self.special = values, bank, special

    def word(self, text: str) -> Value:
        """32 bits; None for what is not known."""
        kind, what, sign, absolute, times = _parsed(text)
        if kind == "number":
            return what
        value = self.bank.get(what) if kind == "bank" else self.values.get(what)
        if value is None or not (sign or absolute or times != 1):
            return value
        return _signed_as(sign, absolute, value) * times & MASK

    def high(self, text: str) -> Value:
        """The upper half of an operand of 64 bits, whose lower half is `word`."""
        if text.endswith("Z"):
            return 0
        if m := re.fullmatch(r"(U?R)(\d+)(?:\.64)?", text):
            return self.values.get(f"{m[1]}{int(m[2]) + 1}")
        if m := re.fullmatch(r"c\[0x0\]\[0x([0-9a-f]+)\]", text):
            return self.bank.get(int(m[1], 16) + 4)
        if re.fullmatch(r"-?0x[0-9a-f]+", text):
            return MASK if text.startswith("-") else 0
        return None

    def wide(self, text: str) -> Value:
        """64 bits as a signed number."""
        plain = text.lstrip("-")
        low, high = self.word(plain), self.high(plain)
        if low is None or high is None:
            return None
        total = (signed(high) << 32) + low
        return -total if text.startswith("-") else total

    def predicate(self, text: str) -> Value:
        value = self.values.get(text.lstrip("!"))
        return 1 - value if text.startswith("!") and value is not None else value

    def address(self, text: str) -> Value:
        """The sum between an access's brackets, modulo 2^32: enough for sectors and banks."""
        total: Value = 0
        for part in text.split("+"):
            piece = self.word(part.strip())
            if piece is None:
                return None
            total = total + piece
        return total & MASK


def signed(value: Value) -> Value:
    """The same 32 bits as a signed number."""
    return (value ^ 0x80000000) - 0x80000000


def _signed_as(sign: str | None, absolute: str | None, value: Value) -> Value:
    if absolute:
        value = abs(signed(value)) & MASK
    if sign == "-":
        return -value & MASK
    return value ^ MASK if sign == "~" else value
