"""Tests of arithmetic, logic and comparisons of integers. The judge is Python's integers, which have no width."""

from __future__ import annotations

from collections.abc import Callable
from itertools import product
from operator import add, and_, eq, ge, gt, le, lt, mul, ne, or_, sub, xor
from typing import Any

import numpy as np
import pytest

Run = Callable[..., Any]
REGISTER = {1: "%p", 8: "%rs", 16: "%rs", 32: "%r", 64: "%rd"}
SIGNED, UNSIGNED, BITS = ([f"{sign}{bits}" for bits in (16, 32, 64)] for sign in "sub")
INTEGERS = SIGNED + UNSIGNED
NARROW = ["s16", "s32", "u16", "u32"]


def bits_of(kind: str) -> int:
    return 1 if kind == "pred" else int(kind[1:])


def value_of(pattern: int, kind: str) -> int:
    """Return the number that the lowest bits of a pattern represent; the highest bit of a signed type counts
    negative."""
    bits = bits_of(kind)
    pattern %= 1 << bits
    return pattern - (pattern >> bits - 1 << bits) if kind[0] == "s" else pattern


def edges(kind: str) -> list[int]:
    """Return patterns at which arithmetic wraps around, and an irregular one."""
    bits = bits_of(kind)
    if bits == 1:
        return [0, 1]
    half = 1 << bits - 1
    return [0, 1, 2, 5, half - 1, half, half + 1, 2 * half - 2, 2 * half - 1, 0xB7E151628AED2A6B % (2 * half)]


def patterns(values: Any, bits: int) -> list[int]:
    return [int(value) % (1 << bits) for value in values]


def check(
    run: Run, opcode: str, kinds: list[str], to: str, function: Callable[..., int], *, rows: Any = None, tail: str = ""
) -> None:
    """Run an instruction on operands of these types, each row of patterns in a thread of its own, and check the
    results."""
    rows = list(product(*map(edges, kinds))) if rows is None else rows
    names = [f"{REGISTER[bits_of(kind)]}{index}" for index, kind in enumerate(kinds, 1)]
    target = f"{REGISTER[bits_of(to)]}9"
    machine = run(
        f"{opcode} {target}, {', '.join(names)}{tail};",
        {name: [row[index] for row in rows] for index, name in enumerate(names)},
    )
    expected = [function(*(value_of(cell, kind) for cell, kind in zip(row, kinds, strict=True))) for row in rows]
    width = 8 * machine.registers[target].dtype.itemsize if to != "pred" else 1
    assert patterns(machine.registers[target], width) == patterns((value_of(one, to) for one in expected), width)


BINARY: dict[str, Callable[..., int]] = {"add": add, "sub": sub, "mul.lo": mul, "min": min, "max": max}
LOGIC: dict[str, Callable[..., int]] = {"and": and_, "or": or_, "xor": xor}


@pytest.mark.parametrize(
    "opcode",
    [f"{name}.{kind}" for name in BINARY for kind in INTEGERS]
    + [f"{name}.{kind}" for name in LOGIC for kind in [*BITS, "pred"]],
)
def test_two_operands(run: Run, opcode: str) -> None:
    name, kind = opcode.rsplit(".", 1)
    check(run, opcode, [kind, kind], kind, (BINARY | LOGIC)[name])


@pytest.mark.parametrize("opcode", ["add.s16x2", "add.u16x2"])
def test_two_halves(run: Run, opcode: str) -> None:
    """A carry does not reach the other half."""

    def halves(a: int, b: int) -> int:
        return (a + b) % 0x10000 | ((a >> 16) + (b >> 16)) % 0x10000 << 16

    check(run, opcode, ["u32", "u32"], "u32", halves)


@pytest.mark.parametrize("opcode", ["div.s32", "div.u32"])
def test_division_is_towards_zero(run: Run, opcode: str) -> None:
    kind = opcode[-3:]
    rows = [(a, b) for a, b in product(edges(kind), edges(kind)) if b]
    towards_zero = lambda a, b: abs(a) // abs(b) * (-1 if (a < 0) != (b < 0) else 1)  # noqa: E731
    check(run, opcode, [kind, kind], kind, towards_zero, rows=rows)


@pytest.mark.parametrize("opcode", [f"mul.{half}.{kind}" for half in ("hi", "wide") for kind in NARROW])
def test_products_of_twice_the_width(run: Run, opcode: str) -> None:
    kind = opcode[-3:]
    bits = bits_of(kind)
    if ".hi" in opcode:
        check(run, opcode, [kind, kind], kind, lambda a, b: a * b >> bits)
    else:
        check(run, opcode, [kind, kind], f"{kind[0]}{2 * bits}", mul)


@pytest.mark.parametrize("opcode", [f"mad.lo.{kind}" for kind in INTEGERS] + [f"mad.wide.{kind}" for kind in NARROW])
def test_products_and_sums(run: Run, opcode: str) -> None:
    kind = opcode[-3:]
    to = f"{kind[0]}{2 * bits_of(kind)}" if ".wide" in opcode else kind
    check(run, opcode, [kind, kind, to], to, lambda a, b, c: a * b + c)


@pytest.mark.parametrize("opcode", [f"shl.{kind}" for kind in BITS] + [f"shr.{kind}" for kind in BITS + INTEGERS])
def test_shifts(run: Run, opcode: str) -> None:
    """An amount beyond the width leaves zeros, or the sign where there is one."""
    kind = opcode[4:]
    bits = bits_of(kind)
    rows = list(product(edges(kind), [0, 1, 7, bits - 1, bits, bits + 1, 2 * bits, 255, 256, (1 << 32) - 1]))
    shift = (lambda a, n: a << min(n, bits)) if opcode[2] == "l" else (lambda a, n: a >> min(n, bits))
    check(run, opcode, [kind, "u32"], kind, shift, rows=rows)


@pytest.mark.parametrize("opcode", [f"neg.{kind}" for kind in SIGNED])
def test_neg(run: Run, opcode: str) -> None:
    check(run, opcode, [opcode[4:]], opcode[4:], lambda a: -a)


@pytest.mark.parametrize("opcode", [f"not.{kind}" for kind in [*BITS, "pred"]])
def test_not(run: Run, opcode: str) -> None:
    check(run, opcode, [opcode[4:]], opcode[4:], lambda a: -1 - a)


COMPARE = {"eq": eq, "ne": ne, "lt": lt, "le": le, "gt": gt, "ge": ge}


@pytest.mark.parametrize(
    "opcode",
    [f"setp.{order}.{kind}" for order in COMPARE for kind in INTEGERS]
    + [f"setp.{order}.{kind}" for order in ("eq", "ne") for kind in BITS],
)
def test_setp(run: Run, opcode: str) -> None:
    _, order, kind = opcode.split(".")
    check(run, opcode, [kind, kind], "pred", COMPARE[order])


@pytest.mark.parametrize("opcode", [f"selp.{kind}" for kind in BITS + INTEGERS])
def test_selp(run: Run, opcode: str) -> None:
    kind = opcode[5:]
    check(run, opcode, [kind, kind, "pred"], kind, lambda yes, no, condition: yes if condition else no)


@pytest.mark.parametrize("opcode", [f"mov.{kind}" for kind in [*BITS, *INTEGERS, "pred"]])
def test_mov(run: Run, opcode: str) -> None:
    check(run, opcode, [opcode[4:]], opcode[4:], lambda a: a)


ANY = ["s8", "u8", *INTEGERS]


@pytest.mark.parametrize("opcode", [f"cvt.{to}.{source}" for to in ANY for source in ANY if to != source])
def test_cvt(run: Run, opcode: str) -> None:
    """A number that does not fit loses its highest bits; a number narrower than its register is extended by its sign or
    by zeros."""
    _, to, source = opcode.split(".")
    check(run, opcode, [source], to, lambda a: a)


@pytest.mark.parametrize("opcode", ["popc.b32"])
def test_popc(run: Run, opcode: str) -> None:
    check(run, opcode, ["u32"], "u32", lambda a: bin(a).count("1"))


@pytest.mark.parametrize("opcode", ["bfe.u32", "bfe.s32"])
def test_bfe(run: Run, opcode: str) -> None:
    """A field that goes beyond the highest bit is filled with zeros, or with the highest bit as its sign."""
    kind = opcode[4:]

    def field(value: int, first: int, length: int) -> int:
        first, length = first & 0xFF, length & 0xFF
        bit = lambda place: value >> place & 1  # noqa: E731
        sign = bit(min(first + length - 1, 31)) if kind == "s32" and length else 0
        return sum((bit(first + i) if i < length and first + i <= 31 else sign) << i for i in range(32))

    places = [0, 1, 4, 15, 31, 32, 33, 64, 200, 256 + 3]
    rows = list(product(edges(kind), places, [0, 1, 4, 8, 31, 32, 33, 63, 64, 255, 256 + 5]))
    check(run, opcode, ["u32", "u32", "u32"], "u32", field, rows=rows)


def test_the_tables_of_lop3(run: Run) -> None:
    """By the ISA's own rule, a table is what its function makes of 0xF0, 0xCC and 0xAA."""
    text = "\n".join(f"lop3.b32 %r{9 + table}, %r1, %r2, %r3, {table};" for table in range(256))
    machine = run(text, {"%r1": [0xF0], "%r2": [0xCC], "%r3": [0xAA]})
    assert [machine.registers[f"%r{9 + table}"][0] & 0xFF for table in range(256)] == list(range(256))


@pytest.mark.parametrize("opcode", ["lop3.b32"])
@pytest.mark.parametrize(
    ("table", "function"),
    [
        ("0x80", lambda a, b, c: a & b & c),
        ("0xFE", lambda a, b, c: a | b | c),
        ("0x96", lambda a, b, c: a ^ b ^ c),
        ("0xEA", lambda a, b, c: a & b | c),
        ("0x40", lambda a, b, c: a & b & ~c),
        ("0xCA", lambda a, b, c: a & b | ~a & c),
    ],
    ids=["and", "or", "xor", "and then or", "and but not", "choose"],
)
def test_lop3(run: Run, opcode: str, table: str, function: Callable[..., int]) -> None:
    check(run, opcode, ["u32"] * 3, "u32", function, tail=f", {table}")


@pytest.mark.parametrize("opcode", ["prmt.b32"])
def test_prmt(run: Run, opcode: str) -> None:
    """Each of the selector's four digits names one of eight bytes. If the digit's highest bit is set, it stands for
    that byte's sign, repeated eight times."""

    def permuted(low: int, high: int, selector: int) -> int:
        source = low.to_bytes(4, "little") + high.to_bytes(4, "little")
        digits = [selector >> 4 * place & 15 for place in range(4)]
        chosen = [source[digit & 7] if digit < 8 else 255 * (source[digit & 7] >> 7) for digit in digits]
        return int.from_bytes(bytes(chosen), "little")

    selectors = [0x3210, 0x7654, 0x0123, 0x5410, 0x7632, 0xBA98, 0xFEDC, 0x4F0A, 0xFFFF7531]
    rows = [(a, b, s) for a in (0x80FF017F, 0x12345678) for b in (0xFEDC0A98, 0x7F8001FF) for s in selectors]
    check(run, opcode, ["u32"] * 3, "u32", permuted, rows=rows)


WHOLE = 0x8123_4567_89AB_CDEF


@pytest.mark.parametrize(
    ("opcode", "whole", "part", "count"),
    [("mov.b64", "%rd", "%r", 2), ("mov.b64", "%rd", "%rs", 4), ("mov.b32", "%r", "%rs", 2)],
)
def test_the_parts_of_a_register(run: Run, opcode: str, whole: str, part: str, count: int) -> None:
    """The first part is the lowest, whether a register is taken apart or put together. A part that is not wanted is
    named `_`."""
    bits = {"%rd": 64, "%r": 32}[whole]
    names = [f"{part}{index}" for index in range(1, count + 1)]
    apart = run(f"{opcode} {{{', '.join(names)}}}, {whole}1;", {f"{whole}1": [WHOLE]})
    expected = [WHOLE % (1 << bits) >> index * bits // count & (1 << bits // count) - 1 for index in range(count)]
    assert [int(apart.registers[name][0]) for name in names] == expected
    again = run(f"{opcode} {whole}9, {{{', '.join(names)}}};", {n: [v] for n, v in zip(names, expected, strict=True)})
    assert again.registers[f"{whole}9"][0] == np.uint64(WHOLE % (1 << bits))
    last = run(f"{opcode} {{{', '.join(['_'] * (count - 1))}, {part}9}}, {whole}1;", {f"{whole}1": [WHOLE]})
    assert last.registers[f"{part}9"][0] == expected[-1]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("mov.b32 %r9, -2;", 0xFFFFFFFE),
        ("mov.b32 %r9, 0x1F;", 31),
        ("mov.u32 %r9, 7U;", 7),
        ("mov.b32 %r9, 0f3FC00000;", 0x3FC00000),
        ("mov.b64 %rd9, -1;", (1 << 64) - 1),
        ("mov.b16 %rs9, -3;", 0xFFFD),
        ("mov.pred %p9, -1;", 1),
        ("mov.pred %p9, 0;", 0),
        ("mov.u32 %r9, global_smem;", 0),
        ("mov.u32 %r9, %ctaid.y;", 4),
        ("mov.u32 %r9, %nctaid.z;", 8),
    ],
)
def test_immediates_and_special_registers(run: Run, text: str, expected: int) -> None:
    machine = run(text, place=(3, 4, 5), programs=(6, 7, 8))
    (values,) = machine.registers.values()
    assert values.shape == (32,)
    assert {int(value) for value in values} == {expected}


def test_the_thread_and_its_lane(run: Run) -> None:
    machine = run("mov.u32 %r1, %tid.x;\nmov.u32 %r2, %laneid;", threads=96)
    assert machine.registers["%r1"].tolist() == list(range(96))
    assert machine.registers["%r2"].tolist() == list(range(32)) * 3
