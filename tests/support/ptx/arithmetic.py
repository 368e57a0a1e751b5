"""Defines arithmetic, comparisons, conversions and the instructions within a warp, as the PTX ISA specifies them."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, TypeAlias

import numpy as np
from support.ptx.machine import WARP, Machine, Mask, PtxError, need_whole_warps
from support.ptx.text import Instruction

TYPES = {
    **{
        f"{sign}{bits}": np.dtype(f"{'i' if sign == 's' else 'u'}{bits // 8}")
        for sign in "sub"
        for bits in (8, 16, 32, 64)
        if (sign, bits) != ("b", 8)
    },
    "f32": np.dtype(np.float32),
    "pred": np.dtype(np.bool_),
}
Values = Any
Operation: TypeAlias = Callable[[Machine, Instruction, Mask], None]


def kind_of(instruction: Instruction) -> str:
    """Return the type with which an instruction's opcode ends."""
    return instruction.modifiers[-1]


def bfloat16_to_double(x: Values) -> Values:
    return (np.asarray(x).astype(np.uint32) << 16).view(np.float32).astype(np.float64)


def to_bfloat16(x: Values) -> Values:
    """Return the bits of the nearest bfloat16, with ties to even, rounded once from float64."""
    wide = np.asarray(x, np.float64)
    # The unit is the value of the last of a bfloat16's eight significant bits; all subnormal numbers share one unit.
    unit = np.ldexp(1.0, np.maximum(np.frexp(wide)[1] - 8, -133))
    with np.errstate(over="ignore"):
        return ((np.rint(wide / unit) * unit).astype(np.float32).view(np.uint32) >> np.uint32(16)).astype(np.uint16)


def added_to_odd(a: Values, b: Values) -> Values:
    """Return the float64 sum, rounded to odd: if the sum is not exact, its last bit is one.

    Rounding the result to a narrower type is then the same as rounding the exact sum.
    """
    total = np.asarray(a + b)
    with np.errstate(invalid="ignore"):
        back = total - a
        lost = (a - (total - back)) + (b - back)
        even = total.view(np.uint64) & np.uint64(1) == 0
        return np.where((np.abs(lost) > 0) & even, np.nextafter(total, np.copysign(np.inf, lost)), total)


SIZES = {"bf16": np.dtype(np.uint16), "f16": np.dtype(np.uint16)}
"""The types that registers hold as bits: numpy has no bfloat16, and float16 is treated in the same way."""


def from_type(value: Values, kind: str) -> Values:
    """Return a register's value of type `kind` as numpy can compute with it: 16-bit floats as float32."""
    if kind == "bf16":
        return bfloat16_to_double(value).astype(np.float32)
    return np.asarray(value).view(np.float16).astype(np.float32) if kind == "f16" else np.asarray(value)


def to_type(value: Values, kind: str) -> Values:
    """Return a value converted to type `kind` as a register holds it: 16-bit floats as their bits."""
    if kind == "bf16":
        return to_bfloat16(value.astype(np.float64))
    return value.astype(np.float16).view(np.uint16) if kind == "f16" else value.astype(TYPES[kind])


def joined(low: Values, high: Values) -> Values:
    return low.astype(np.uint32) | (high.astype(np.uint32) << np.uint32(16))


def divided(a: Values, b: Values) -> Values:
    """Divide, integers towards zero. An integer divided by zero gives any value, since the PTX ISA specifies none."""
    if np.asarray(a).dtype.kind == "f":
        with np.errstate(divide="ignore", invalid="ignore"):
            return a / b
    b = np.where(b == 0, 1, b)
    return (np.abs(a.astype(np.int64)) // np.abs(b.astype(np.int64)) * np.sign(a) * np.sign(b)).astype(a.dtype)


def shifted(left: bool) -> Callable[[Values, Values], Values]:
    """Return the shift to the left or to the right; shifting by the width or more leaves zeros or the sign."""

    def shift(a: Values, amount: Values) -> Values:
        width = a.dtype.itemsize * 8
        n = np.minimum(amount, width - 1).astype(a.dtype)
        inside = a << n if left else a >> n
        beyond = 0 if left or a.dtype.kind == "u" else a >> a.dtype.type(width - 1)
        return np.where(amount < width, inside, beyond).astype(a.dtype)

    return shift


BINARY: dict[str, Callable[[Values, Values], Values]] = {
    "add": lambda a, b: a + b,
    "sub": lambda a, b: a - b,
    "mul": lambda a, b: a * b,
    "div": divided,
    "and": lambda a, b: a & b,
    "or": lambda a, b: a | b,
    "xor": lambda a, b: a ^ b,
    # A number wins over NaN, and -0 is below +0.
    "min": lambda a, b: np.where((a < b) | ((a == b) & np.signbit(a)) | (b != b), a, b),
    "max": lambda a, b: np.where((a > b) | ((a == b) & np.signbit(b)) | (b != b), a, b),
    "shl": shifted(left=True),
    "shr": shifted(left=False),
}
COMPARE: dict[str, Callable[[Values, Values], Values]] = {
    "eq": lambda a, b: a == b,
    "ne": lambda a, b: (a != b) & (a == a) & (b == b),
    "num": lambda a, b: (a == a) & (b == b),
    "nan": lambda a, b: (a != a) | (b != b),
    "lt": lambda a, b: a < b,
    "le": lambda a, b: a <= b,
    "gt": lambda a, b: a > b,
    "ge": lambda a, b: a >= b,
}
ORDERS = ("eq", "ne", "lt", "le", "gt", "ge")
"""The comparisons that integers have as well as floats."""


def rounded_once(kind: str, function: Callable[..., Values]) -> Callable[..., Values]:
    """Return the function on the bits of 16-bit floats of type `kind`, computed in float64 and rounded once.

    float64 holds every product and every sum of two such floats.
    """
    return lambda *values: to_type(function(*(from_type(value, kind).astype(np.float64) for value in values)), kind)


def in_pairs(function: Callable[..., Values]) -> Callable[..., Values]:
    """Return a function of 16-bit values as a function of 32-bit values that each hold two of them."""

    def both(*values: Values) -> Values:
        parts = [np.atleast_1d(value).view(np.uint16) for value in values]
        size = max(map(len, parts))
        return function(*(part if len(part) == size else np.resize(part, size) for part in parts)).view(np.uint32)

    return both


def in_float_pairs(function: Callable[..., Values]) -> Callable[..., Values]:
    """Return a function of float32 values as a function of 64-bit values that each hold two of them."""

    def both(*values: Values) -> Values:
        parts = [np.broadcast_to(value, np.broadcast(*values).shape).copy().view(np.float32) for value in values]
        return function(*parts).astype(np.float32).view(np.uint64)

    return both


def apply(machine: Machine, instruction: Instruction, mask: Mask, function: Callable[..., Values]) -> None:
    """Write the value of `function` for all source operands, computed in the type that the instruction names."""
    kind = kind_of(instruction)
    target, *sources = instruction.operands
    part = kind.removesuffix("x2")
    if part in SIZES:
        function = rounded_once(part, function)
    wide: np.dtype[Any]
    if kind == "f32x2":
        wide, function = np.dtype(np.uint64), in_float_pairs(function)
    elif kind.endswith("x2"):
        wide, function = np.dtype(np.uint32), in_pairs(function)
    else:
        wide = SIZES.get(kind) or TYPES[kind]
    values = [machine.read(source, wide) for source in sources]
    machine.write(target, function(*values), mask)


def binary(machine: Machine, instruction: Instruction, mask: Mask) -> None:
    function, kind = BINARY[instruction.name], kind_of(instruction)
    if instruction.name in ("shl", "shr"):
        target, value, amount = instruction.operands
        shift = function(machine.read(value, TYPES[kind]), machine.read(amount, np.uint32))
        machine.write(target, shift, mask)
    elif instruction.modifiers[0] in ("wide", "hi"):
        machine.write(instruction.operands[0], wide_product(machine, instruction), mask)
    else:
        apply(machine, instruction, mask, function)


def wide_product(machine: Machine, instruction: Instruction) -> Values:
    """Return the whole product of two integers for `wide`, or its upper half for `hi`."""
    kind = TYPES[kind_of(instruction)]
    double = f"{kind.kind}{2 * kind.itemsize}"
    a, b = (np.asarray(machine.read(source, kind)).astype(double) for source in instruction.operands[1:3])
    product = a * b
    return product if instruction.modifiers[0] == "wide" else (product >> (8 * kind.itemsize)).astype(kind)


def multiply_add(machine: Machine, instruction: Instruction, mask: Mask) -> None:
    if instruction.modifiers[0] == "wide":
        product = wide_product(machine, instruction)
        machine.write(instruction.operands[0], product + machine.read(instruction.operands[3], product.dtype), mask)
    else:
        apply(machine, instruction, mask, lambda a, b, c: a * b + c)


def fused(machine: Machine, instruction: Instruction, mask: Mask) -> None:
    """Multiply and add with one rounding, by way of float64, which holds every product exactly."""

    def function(a: Values, b: Values, c: Values) -> Values:
        total = added_to_odd(np.asarray(a, np.float64) * b, np.asarray(c, np.float64))
        return total.astype(np.asarray(a).dtype)

    apply(machine, instruction, mask, function)


def move(machine: Machine, instruction: Instruction, mask: Mask) -> None:
    """Copy a register, join a vector of registers into one, or split one into a vector, whose lowest part is first."""
    target, source = instruction.operands
    kind = TYPES[kind_of(instruction)]
    if isinstance(target, tuple):
        part = kind.itemsize // len(target)
        whole = np.ascontiguousarray(machine.lanes(source, kind))
        parts = whole.view(f"u{part}").reshape(machine.threads, len(target))
        for index, name in enumerate(target):
            machine.write(name, parts[:, index].copy(), mask)
    elif isinstance(source, tuple):
        part = kind.itemsize // len(source)
        lanes = [machine.lanes(name, f"u{part}") for name in source]
        machine.write(target, np.stack(lanes, axis=1).view(kind).reshape(-1), mask)
    else:
        machine.write(target, machine.read(source, kind), mask)


def set_predicate(machine: Machine, instruction: Instruction, mask: Mask) -> None:
    comparison, kind = instruction.modifiers
    target, a, b = instruction.operands
    machine.write(target, COMPARE[comparison](machine.read(a, TYPES[kind]), machine.read(b, TYPES[kind])), mask)


def select(machine: Machine, instruction: Instruction, mask: Mask) -> None:
    target, yes, no, condition = instruction.operands
    kind = TYPES[kind_of(instruction)]
    chosen = np.where(machine.read(condition, np.bool_), machine.read(yes, kind), machine.read(no, kind))
    machine.write(target, chosen.astype(kind), mask)


def extract_bits(machine: Machine, instruction: Instruction, mask: Mask) -> None:
    """Run `bfe`, which extracts a field of bits.

    The position and the length count modulo 256; above the field, the result is filled with zeros or with the field's
    sign.
    """
    target, source, *places = instruction.operands
    kind = TYPES[kind_of(instruction)]
    wide = np.dtype(f"{kind.kind}8")
    first, length = (machine.read(place, np.uint32) & np.uint32(0xFF) for place in places)
    value = machine.read(source, kind).astype(wide) >> np.minimum(first, 63).astype(wide)
    above = (64 - np.clip(length, 1, 32)).astype(wide)
    machine.write(target, np.where(length > 0, value << above >> above, 0).astype(kind), mask)


def logic_of_three(machine: Machine, instruction: Instruction, mask: Mask) -> None:
    """Run `lop3`, which computes any function of three bits, given by its truth table."""
    target, *sources, table = instruction.operands
    a, b, c = (machine.read(source, np.uint32) for source in sources)
    rows = int(machine.read(table, np.uint32))
    result = np.zeros(machine.threads, np.uint32)
    for row in range(8):
        if rows >> row & 1:
            result |= (a if row & 4 else ~a) & (b if row & 2 else ~b) & (c if row & 1 else ~c)
    machine.write(target, result, mask)


def permute_bytes(machine: Machine, instruction: Instruction, mask: Mask) -> None:
    """Run `prmt`, which selects four of the eight bytes of two registers, or repeats a byte's sign."""
    target, low, high, selector = instruction.operands
    wide = machine.read(low, np.uint32).astype(np.uint64) | (
        machine.read(high, np.uint32).astype(np.uint64) << np.uint64(32)
    )
    chosen = machine.read(selector, np.uint32)
    result = np.zeros(machine.threads, np.uint32)
    for place in range(4):
        pick = (chosen >> np.uint32(4 * place)) & np.uint32(0xF)
        byte = (wide >> ((pick & np.uint32(7)) * np.uint32(8)).astype(np.uint64)).astype(np.uint32) & np.uint32(0xFF)
        sign = np.where(byte & np.uint32(0x80), np.uint32(0xFF), np.uint32(0))
        result |= np.where(pick & np.uint32(8), sign, byte).astype(np.uint32) << np.uint32(8 * place)
    machine.write(target, result, mask)


def convert(machine: Machine, instruction: Instruction, mask: Mask) -> None:
    to, source = instruction.modifiers[-2:]
    target, *operands = instruction.operands
    values = [from_type(machine.read(operand, SIZES.get(source) or TYPES[source]), source) for operand in operands]
    if to.endswith("x2"):
        high, low = (to_type(value, to.removesuffix("x2")) for value in values)
        machine.write(target, joined(low, high), mask)
    else:
        machine.write(target, to_type(values[0], to), mask)


def one_operand(function: Callable[[Values], Values]) -> Operation:
    return lambda machine, instruction, mask: apply(machine, instruction, mask, function)


def shuffle(machine: Machine, instruction: Instruction, mask: Mask) -> None:
    """Move values between the lanes of a warp; a lane whose partner is outside its segment keeps its own value."""
    mode = instruction.modifiers[1]
    target, source, amount, ends, _ = instruction.operands
    value = machine.lanes(source, np.uint32)
    lane = machine.lane % WARP
    step, packed = (machine.read(operand, np.uint32).astype(np.int64) for operand in (amount, ends))
    step = step & 31
    clamp, segment = packed & 31, packed >> 8 & 31
    lowest = lane & segment
    highest = lowest | (clamp & ~segment)
    partner = {
        "bfly": lane ^ step,
        "up": lane.astype(np.int64) - step,
        "down": lane + step,
        "idx": lowest | (step & ~segment),
    }[mode]
    inside = partner >= highest if mode == "up" else partner <= highest
    chosen = (np.where(inside, partner, lane) + machine.lane // WARP * WARP).astype(np.int64)
    if not mask[chosen[mask]].all():
        raise PtxError(f"a lane's value is wanted that is not here: {instruction.text}")
    machine.write(target, value[chosen], mask)


def reduce_warp(machine: Machine, instruction: Instruction, mask: Mask) -> None:
    """Run `redux.sync`, which gives every lane the sum, the smallest or the largest value of its warp."""
    target, source, members = instruction.operands
    need_whole_warps(instruction, mask)
    if not (np.asarray(machine.read(members, np.uint32)) == 0xFFFFFFFF).all():
        raise PtxError(f"the interpreter knows whole warps only: {instruction.text}")
    values = machine.lanes(source, TYPES[kind_of(instruction)]).reshape(-1, WARP)
    reduced = {"add": np.add, "max": np.maximum, "min": np.minimum}[instruction.modifiers[1]].reduce(values, axis=1)
    machine.write(target, np.repeat(reduced.astype(values.dtype), WARP), mask)


def ballot(machine: Machine, instruction: Instruction, mask: Mask) -> None:
    """Collect one bit from each lane; lanes that do not take part give 0."""
    target, source, _ = instruction.operands
    votes = (machine.lanes(source, np.bool_) & mask).reshape(-1, WARP)
    bits = (votes.astype(np.uint64) << np.arange(WARP, dtype=np.uint64)).sum(axis=1).astype(np.uint32)
    machine.write(target, np.repeat(bits, WARP), mask)


def count_bits(machine: Machine, instruction: Instruction, mask: Mask) -> None:
    value = np.ascontiguousarray(machine.lanes(instruction.operands[1], np.uint32))
    counts = np.unpackbits(value.view(np.uint8).reshape(machine.threads, 4), axis=1).sum(axis=1)
    machine.write(instruction.operands[0], counts.astype(np.uint32), mask)


def elect(machine: Machine, instruction: Instruction, mask: Mask) -> None:
    """Choose one lane of each warp: here the lowest, where real hardware may choose any."""
    assert isinstance(instruction.operands[0], str)
    need_whole_warps(instruction, mask)
    lane, predicate = instruction.operands[0].split("|")
    machine.write(lane, np.zeros(machine.threads, np.uint32), mask)
    machine.write(predicate, machine.lane % WARP == 0, mask)


def forms(operation: Operation, name: str, kinds: Iterable[str]) -> dict[str, Operation]:
    """Return the table's entries of an operation for each of the types `kinds`."""
    return {f"{name}.{kind}": operation for kind in kinds}


SIGNED, UNSIGNED, BITS = (tuple(f"{sign}{bits}" for bits in (16, 32, 64)) for sign in "sub")
INTEGERS = (*SIGNED, *UNSIGNED)
NARROW = ("s16", "s32", "u16", "u32")
"""The integers whose whole product fits into a wider type."""
ANY_INTEGER = ("s8", "u8", *INTEGERS)
HALVES = ("f16", "f16x2", "bf16", "bf16x2")

OPERATIONS: dict[str, Operation] = {
    **forms(binary, "add", (*INTEGERS, "s16x2", "u16x2", "f32", "f32x2")),
    **forms(binary, "sub", (*INTEGERS, "f32", "f32x2")),
    **forms(binary, "mul", ("f32", "f32x2", *HALVES)),
    **forms(binary, "mul.lo", INTEGERS),
    **forms(binary, "mul.hi", NARROW),
    **forms(binary, "mul.wide", NARROW),
    **forms(binary, "div", ("s32", "u32", "full.f32")),
    **{key: binary for name in ("and", "or", "xor") for key in forms(binary, name, (*BITS, "pred"))},
    **{key: binary for name in ("min", "max") for key in forms(binary, name, (*INTEGERS, "f32"))},
    **forms(binary, "shl", BITS),
    **forms(binary, "shr", (*BITS, *INTEGERS)),
    **forms(multiply_add, "mad.lo", INTEGERS),
    **forms(multiply_add, "mad.wide", NARROW),
    **forms(fused, "fma.rn", ("f32", "f32x2", *HALVES)),
    **forms(move, "mov", (*BITS, *INTEGERS, "f32", "pred")),
    **{key: set_predicate for name in ORDERS for key in forms(set_predicate, f"setp.{name}", (*INTEGERS, "f32"))},
    **{key: set_predicate for name in ("eq", "ne") for key in forms(set_predicate, f"setp.{name}", BITS)},
    **{key: set_predicate for name in ("num", "nan") for key in forms(set_predicate, f"setp.{name}", ("f32",))},
    **forms(select, "selp", (*BITS, *INTEGERS, "f32")),
    **forms(extract_bits, "bfe", ("s32", "u32")),
    **forms(logic_of_three, "lop3", ("b32",)),
    **forms(permute_bytes, "prmt", ("b32",)),
    **{key: convert for to in ANY_INTEGER for key in forms(convert, f"cvt.{to}", set(ANY_INTEGER) - {to})},
    **{key: convert for to in ("f32", "f16", "bf16") for key in forms(convert, f"cvt.rn.{to}", NARROW)},
    **{key: convert for to in HALVES for key in forms(convert, f"cvt.rn.{to}", ("f32",))},
    **forms(convert, "cvt.f32", ("f16", "bf16")),
    **forms(one_operand(lambda a: -a), "neg", SIGNED),
    **forms(one_operand(lambda a: ~a), "not", (*BITS, "pred")),
    **forms(one_operand(np.exp2), "ex2.approx", ("f32",)),
    **{f"shfl.sync.{mode}.b32": shuffle for mode in ("bfly", "up", "down", "idx")},
    **{f"redux.sync.{name}.{kind}": reduce_warp for name in ("add", "min", "max") for kind in ("s32", "u32")},
    "vote.sync.ballot.b32": ballot,
    "popc.b32": count_bits,
    "elect.sync": elect,
}
