"""What integer instructions of SASS compute, on the values of `sass_operands`.

The few floating-point steps in integer division (conversion, reciprocal) are computed too, in
float32 as the hardware does.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Sequence

import numpy as np

from vitfast.testing.sass import PREDICATES, Instruction
from vitfast.testing.sass_operands import MASK, Operands, Value, signed


def _parts(i: Instruction, o: Operands, count: int) -> list[Value] | None:
    """The first so many sources; None if one is not known or there are fewer."""
    sources = i.sources[:count]
    found = [o.word(s) for s in sources]
    return None if len(found) < count or any(f is None for f in found) else found


def _carry(i: Instruction, o: Operands) -> Value:
    """Sum of the carries that an .X instruction takes in; negated ones count one, too."""
    total: Value = 0
    if "X" in i.modifiers:
        for text in i.sources:
            if re.fullmatch(r"!?U?P(\d|T)", text):
                value = o.predicate(text)
                if value is None:
                    return None
                total = total + value
    return total


def _outputs(i: Instruction, total: Value) -> list[Value]:
    """A sum's register and its carries, in the order of the instruction's results."""
    return [total & MASK, *((total >> 32 > k) * 1 for k in range(i.results - 1))]


def _add(i: Instruction, o: Operands) -> list[Value] | None:
    sources = i.sources
    if "64" in i.modifiers:
        values = [o.wide(s) for s in sources]
        if any(v is None for v in values):
            return None
        total = sum(values)
        return [total & MASK, total >> 32 & MASK]
    parts = _parts(i, o, {"IADD3": 3, "UIADD3": 3}.get(i.name, 2))
    carry = _carry(i, o)
    if parts is None or carry is None:
        return None
    total = carry
    for value, text in zip(parts, sources, strict=False):
        # -x is ~x + 1: of x = 0 it carries.
        is_negated = re.fullmatch(r"-U?R.*|-c.*", text) is not None
        total = total + value + ((value == 0) * (MASK + 1) if is_negated else 0)
    return _outputs(i, total)


def _imad(i: Instruction, o: Operands) -> list[Value] | None:
    texts, kind = i.sources, set(i.modifiers)
    carry = _carry(i, o)
    if len(texts) < 3 or carry is None:
        return None
    a, b = (o.word(t) for t in texts[:2])
    c = o.wide(texts[2]) if kind & {"WIDE", "HI"} else o.word(texts[2])
    if a is None or b is None or c is None:
        return None
    if "U32" not in kind:
        a, b = signed(a), signed(b)
    total, over = _sum_64(_unsigned(a) * _unsigned(b), _unsigned(c), _unsigned(carry))
    low, high = _plain(total & _unsigned(MASK)), _plain(total >> _unsigned(32))
    register = [low, high] if "WIDE" in kind else [high] if "HI" in kind else [low]
    return [*register, *([over] * (i.results - 1))]


def _unsigned(value: Value) -> np.ndarray:
    """Modulo 2^64, as arrays of that type wrap; numbers become arrays, since numpy warns of scalars
    that wrap."""
    if isinstance(value, int):
        value = [value & 0xFFFFFFFFFFFFFFFF]
        return np.array(value, np.uint64)
    return np.asarray(value).astype(np.uint64)


def _sum_64(a: np.ndarray, b: np.ndarray, carry: np.ndarray) -> tuple[np.ndarray, Value]:
    """a + b + carry modulo 2^64, and what is carried."""
    once = a + b
    total = once + carry
    return total, _plain(((once < a) | (total < once)) * 1)


def _mov(i: Instruction, o: Operands) -> list[Value] | None:
    text = i.operands[1]
    if "64" in i.modifiers:
        return [o.word(text), o.high(text)]
    return [o.word(text)]


def _ldc(i: Instruction, o: Operands) -> list[Value] | None:
    m = re.fullmatch(r"c\[0x0\]\[0x([0-9a-f]+)\]", i.operands[1])
    if m is None:
        return None
    first = int(m[1], 16)
    return [o.bank.get(first + 4 * k) for k in range(max(1, i.width // 4))]


def _s2r(i: Instruction, o: Operands) -> list[Value]:
    value = o.special(i.operands[1])
    return [value] if i.name != "CS2R" or "32" in i.modifiers else [value, value]


def _r2ur(i: Instruction, o: Operands) -> list[Value] | None:
    value = o.word(i.operands[-1])
    return None if value is None else [_of_first_lane(value)]


def _of_first_lane(value: Value) -> Value:
    if not isinstance(value, np.ndarray):
        return value
    warps = value.reshape(-1, min(32, len(value)))
    return np.repeat(warps[:, 0], warps.shape[1])


def _shfl(i: Instruction, o: Operands) -> list[Value] | None:
    value = o.word(i.operands[2])
    if value is None or "IDX" not in i.modifiers or i.operands[3] not in ("RZ", "0x0"):
        return None
    return [1, _of_first_lane(value)]


def _lop3(i: Instruction, o: Operands) -> list[Value] | None:
    values = _parts(i, o, 3)
    if values is None:
        return None
    table = int(i.operands[i.results + 3], 16)
    found = _look_up(table, values, MASK)
    if i.results == 1:
        return [found]
    return [(found != 0) * 1, found]


def _look_up(table: int, values: Sequence[Value], ones: int) -> Value:
    a, b, c = values
    found: Value = 0
    for bit in range(8):
        if table >> bit & 1:
            found = found | (
                (a if bit & 4 else a ^ ones) & (b if bit & 2 else b ^ ones)
                & (c if bit & 1 else c ^ ones)
            )  # fmt: skip
    return found


def _plop3(i: Instruction, o: Operands) -> list[Value] | None:
    values = [o.predicate(t) for t in i.operands[2:5]]
    if any(v is None for v in values):
        return None
    return [_look_up(int(text, 16), values, 1) for text in i.operands[5:7]]


def _isetp(i: Instruction, o: Operands) -> list[Value] | None:
    a, b = o.word(i.operands[2]), o.word(i.operands[3])
    joined = o.predicate(i.operands[4])
    is_and = "AND" in i.modifiers
    if joined is None:
        return None
    if a is None or b is None:  # what is joined may decide alone
        decided = not np.any(joined) if is_and else bool(np.all(joined))
        return [1 - is_and] * 2 if decided else None
    if "U32" not in i.modifiers:
        a, b = signed(a), signed(b)
    how = next(m for m in i.modifiers if m in _COMPARE)
    found = _COMPARE[how](a, b)
    if "EX" in i.modifiers:  # upper halves; the lower ones' result comes in
        below = o.predicate(i.operands[5])
        if below is None:
            return None
        equal = (a == b) & (below != 0)
        found = (
            equal if how == "EQ" else _COMPARE[how[0] + "T" if how != "NE" else how](a, b) | equal
        )
    found = found * 1
    return (
        [found & joined, (1 - found) & joined] if is_and else [found | joined, (1 - found) | joined]
    )


_COMPARE: dict[str, Callable[[Value, Value], Value]] = {
    "LT": lambda a, b: a < b, "LE": lambda a, b: a <= b, "GT": lambda a, b: a > b,
    "GE": lambda a, b: a >= b, "EQ": lambda a, b: a == b, "NE": lambda a, b: a != b,
}  # fmt: skip


def _sel(i: Instruction, o: Operands) -> list[Value] | None:
    values = _parts(i, o, 2)
    which = o.predicate(i.operands[3])
    if values is None or which is None:
        return None
    return [_where(which, *values)]


def _where(which: Value, a: Value, b: Value) -> Value:
    if isinstance(which, np.ndarray):
        return np.where(which != 0, a, b)
    return a if which else b


def _iabs(i: Instruction, o: Operands) -> list[Value] | None:
    value = o.word(i.operands[1])
    return None if value is None else [abs(signed(value)) & MASK]


def _minmax(i: Instruction, o: Operands) -> list[Value] | None:
    """Of two numbers, of three, or of a sum and a third: the least where the predicate holds, else
    the greatest."""
    count = 3 if i.name in ("VIMNMX3", "VIADDMNMX") else 2
    values, which = _parts(i, o, count), o.predicate(i.operands[-1])
    if values is None or which is None:
        return None
    if i.name == "VIADDMNMX":
        values = [(values[0] + values[1]) & MASK, values[2]]
    if "U32" not in i.modifiers:
        values = [signed(v) for v in values]
    least, greatest = (functools.reduce(f, values) for f in (np.minimum, np.maximum))
    return [_where(which, least, greatest) & MASK]


def _shf(i: Instruction, o: Operands) -> list[Value] | None:
    values = _parts(i, o, 3)
    if values is None:
        return None
    low, amount, high = values
    left = "L" in i.modifiers
    is_64 = {"U64", "S64"} & set(i.modifiers)
    amount = np.minimum(amount, 63 if is_64 else 32) if "W" not in i.modifiers else amount & 31
    if {"S32", "S64"} & set(i.modifiers):
        high = signed(high)
    if left:
        both = (low | high << 32) if not is_64 else low | (high & MASK) << 32
        if "HI" not in i.modifiers:
            return [low << amount & MASK]
        # The upper half: bits of `high`, and of `low` what moves into it.
        return [((high << amount) | _right(low, 32 - amount)) & MASK]
    if "HI" in i.modifiers:
        return [high >> amount & MASK]
    both = (_right(low, amount)) | (high << (32 - np.minimum(amount, 32)))
    return [_where((amount < 32) * 1, both, high >> np.maximum(amount - 32, 0)) & MASK]


def _right(value: Value, amount: Value) -> Value:
    return value >> np.maximum(amount, 0)


def _lea(i: Instruction, o: Operands) -> list[Value] | None:
    texts = i.sources
    kind = set(i.modifiers)
    carry = _carry(i, o)
    if "HI" not in kind:
        a, b = o.word(texts[0]), o.word(texts[1])
        if a is None or b is None or carry is None:
            return None
        return _outputs(i, ((a << _amount(texts[2])) & MASK) + b + carry)
    values = [o.word(t) for t in texts[: 2 if "SX32" in kind else 3]]
    if any(v is None for v in values) or carry is None:
        return None
    a, b = values[:2]
    upper = (signed(a) >> 31) & MASK if "SX32" in kind else values[2]
    amount = _amount(texts[len(values)])
    shifted = (upper << amount) | (a >> (32 - amount))
    return _outputs(i, (shifted & MASK) + b + carry)


def _amount(text: str) -> int:
    return int(text, 16)


def _sgxt(i: Instruction, o: Operands) -> list[Value] | None:
    value = o.word(i.operands[1])
    if value is None:
        return None
    bits = int(i.operands[2], 16)
    value = value & ((1 << bits) - 1)
    sign = 1 << (bits - 1)
    return [value if "U32" in i.modifiers else (value ^ sign) - sign & MASK]


def _p2r(i: Instruction, o: Operands) -> list[Value] | None:
    kept = int(i.operands[3], 16)
    base, total = o.word(i.operands[2]), 0
    if base is None:
        return None
    for n, name in enumerate(PREDICATES):
        if kept >> n & 1:
            value = o.values.get(name, 0)
            if value is None:
                return None
            total = total | value << n
    return [base & ~kept & MASK | total]


def _r2p(i: Instruction, o: Operands) -> list[Value] | None:
    value, kept = o.word(i.operands[1]), int(i.operands[2], 16)
    return [
        (None if value is None else value >> n & 1) if kept >> n & 1 else o.values.get(name)
        for n, name in enumerate(PREDICATES)
    ]


def _prmt(i: Instruction, o: Operands) -> list[Value] | None:
    values = _parts(i, o, 3)
    if values is None or len(i.modifiers) > 0 or isinstance(values[1], np.ndarray):
        return None
    a, selector, b = values
    found: Value = 0
    for n in range(4):
        pick = selector >> 4 * n & 0xF
        byte = (a if pick & 7 < 4 else b) >> 8 * (pick & 3) & 0xFF
        found = found | (byte if pick < 8 else (byte >> 7) * 0xFF) << 8 * n
    return [found]


# ---- floating-point steps of a division ----------------------------------------------------------


def _i2f(i: Instruction, o: Operands) -> list[Value] | None:
    text = i.operands[1]
    value = o.wide(text) if "U64" in i.modifiers else o.word(text)
    if value is None:
        return None
    if not {"U32", "U64"} & set(i.modifiers):
        value = signed(value)
    exact = np.asarray(value, np.float64)
    near = exact.astype(np.float32)
    if "RP" in i.modifiers:
        near = np.where(near < exact, np.nextafter(near, np.float32(np.inf)), near)
    return [_bits(near)]


def _mufu(i: Instruction, o: Operands) -> list[Value] | None:
    value = o.word(i.operands[1])
    if value is None or "RCP" not in i.modifiers:
        return None
    with np.errstate(divide="ignore"):
        return [_bits((np.float32(1) / _float(value)).astype(np.float32))]


def _f2i(i: Instruction, o: Operands) -> list[Value] | None:
    value = o.word(i.operands[1])
    if value is None or "TRUNC" not in i.modifiers:
        return None
    if "U64" in i.modifiers:
        whole = np.trunc(_float(value).astype(np.float64)).astype(np.uint64).astype(np.int64)
        return [_plain(whole & MASK), _plain(whole >> 32 & MASK)]
    top = float(MASK) if "U32" in i.modifiers else 2.0**31 - 1
    with np.errstate(invalid="ignore"):
        whole = np.clip(np.trunc(np.nan_to_num(_float(value).astype(np.float64))), -(2.0**31), top)
    return [_plain(whole.astype(np.int64) & MASK)]


def _float(bits: Value) -> np.ndarray:
    return np.asarray(bits, np.int64).astype(np.uint32).view(np.float32)


def _bits(value: np.ndarray) -> Value:
    return _plain(np.asarray(value, np.float32).view(np.uint32).astype(np.int64))


def _plain(value: np.ndarray) -> Value:
    """As int64, or as Python's int if it holds one number."""
    return int(value.flat[0]) if value.size == 1 else value.astype(np.int64)


def _halves(i: Instruction, o: Operands) -> list[Value] | None:
    """HFMA2 of zeros and two constants: how compilers write a number on another pipe."""
    if i.operands[1].lstrip("-") != "RZ" or i.operands[2].lstrip("-") != "RZ":
        return None
    try:
        high, low = (int(np.float16(float(t)).view(np.uint16)) for t in i.operands[3:5])
    except ValueError:
        return None
    return [high << 16 | low]


FUNCTIONS: dict[str, Callable[[Instruction, Operands], Sequence[Value] | None]] = {
    "IADD3": _add, "UIADD3": _add, "VIADD": _add, "IADD": _add, "IMAD": _imad, "UIMAD": _imad,
    "MOV": _mov, "UMOV": _mov, "LDC": _ldc, "ULDC": _ldc, "S2R": _s2r, "S2UR": _s2r, "CS2R": _s2r,
    "R2UR": _r2ur, "SHFL": _shfl, "LOP3": _lop3, "ULOP3": _lop3, "PLOP3": _plop3,
    "UPLOP3": _plop3, "ISETP": _isetp, "UISETP": _isetp, "SEL": _sel, "USEL": _sel,
    "IABS": _iabs, "IMNMX": _minmax, "VIMNMX": _minmax, "VIMNMX3": _minmax, "VIADDMNMX": _minmax,
    "UIMNMX": _minmax, "SHF": _shf,
    "USHF": _shf, "LEA": _lea, "ULEA": _lea, "SGXT": _sgxt, "USGXT": _sgxt, "P2R": _p2r,
    "R2P": _r2p, "PRMT": _prmt, "UPRMT": _prmt, "I2F": _i2f, "MUFU": _mufu, "F2I": _f2i,
    "HFMA2": _halves,
}  # fmt: skip
"""By opcode: gives a value for each of the instruction's `destinations`, or None."""
