"""Tests of arithmetic, comparisons and conversions of floats. The judge is exact fractions that are rounded once, to
nearest even."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction
from itertools import product
from typing import Any

import numpy as np
import pytest
import torch

Run = Callable[..., Any]
Number = float | Fraction
NAN, INF = math.nan, math.inf


@dataclass(frozen=True)
class Format:
    """An IEEE floating-point format, given by the numbers of bits of its exponent and of its fraction."""

    exponent: int
    fraction: int

    @property
    def bits(self) -> int:
        return 1 + self.exponent + self.fraction

    @property
    def bias(self) -> int:
        return (1 << self.exponent - 1) - 1

    def decode(self, pattern: int) -> float:
        sign = -1.0 if pattern >> self.bits - 1 else 1.0
        exponent = pattern >> self.fraction & (1 << self.exponent) - 1
        fraction = pattern & (1 << self.fraction) - 1
        if exponent == (1 << self.exponent) - 1:
            return NAN if fraction else sign * INF
        hidden = 1 << self.fraction if exponent else 0
        return sign * math.ldexp(hidden + fraction, max(exponent, 1) - self.bias - self.fraction)

    def round(self, value: Number, sign: float = 1.0) -> float:
        """Return the nearest number of the format, ties to even; `sign` is the sign of an exact zero."""
        if isinstance(value, float) and not math.isfinite(value):
            return value
        exact = abs(Fraction(value))
        if not exact:
            return math.copysign(0.0, sign)
        lowest = 1 - self.bias
        exponent = max(exact.numerator.bit_length() - exact.denominator.bit_length() - 1, lowest)
        while exponent < self.bias and exact >= Fraction(2) ** (exponent + 1):
            exponent += 1
        unit = Fraction(2) ** (exponent - self.fraction)
        rounded = round(exact / unit) * unit  # Python's rounding of a fraction is to even
        limit = Fraction(2) ** (self.bias + 1)
        return math.copysign(float(rounded) if rounded < limit else INF, value)


FORMATS = {"f32": Format(8, 23), "f16": Format(5, 10), "bf16": Format(8, 7)}
REGISTER = {16: "%rs", 32: "%r", 64: "%rd"}


def same(result: float, expected: float) -> bool:
    """Return whether two numbers are the same: NaN is NaN whatever its bits, and zeros differ by their sign."""
    if math.isnan(expected):
        return math.isnan(result)
    return result == expected and math.copysign(1, result) == math.copysign(1, expected)


def edges(form: Format) -> list[int]:
    """Return zeros, subnormals, one and its neighbours, the largest number, infinity, NaN and some irregular patterns,
    of both signs."""
    one, top = form.bias << form.fraction, (1 << form.exponent) - 1 << form.fraction
    positive = [
        0,
        1,
        3,
        (1 << form.fraction) - 1,
        1 << form.fraction,
        one - 1,
        one,
        one + 1,
        one + 3,
        one + (1 << form.fraction),
    ]
    positive += [
        top - 1,
        top,
        top + 1,
        one // 2 + 5,
        one // 2 * 3 + 1,
        0x2AAAAAAA >> 32 - form.bits,
        0x3C5A5A5B >> 32 - form.bits,
    ]
    return [*positive, *(pattern | 1 << form.bits - 1 for pattern in positive)]


def unpack(pattern: int, form: Format, count: int) -> list[float]:
    return [form.decode(pattern >> form.bits * index & (1 << form.bits) - 1) for index in range(count)]


def check(run: Run, opcode: str, kind: str, operands: int, function: Callable[..., float]) -> None:
    """Run an instruction on all edges and check each result; if registers hold two numbers, they are of two different
    rows."""
    form, count = FORMATS[kind.removesuffix("x2")], 2 if kind.endswith("x2") else 1
    chosen = edges(form) if operands < 3 else edges(form)[1::2] + edges(form)[:2]
    rows = list(product(chosen, repeat=operands))
    packed = [
        [sum(rows[r - 5 * i][o] << form.bits * i for i in range(count)) for r in range(len(rows))]
        for o in range(operands)
    ]
    name = REGISTER[form.bits * count]
    names = [f"{name}{index}" for index in range(1, operands + 1)]
    machine = run(f"{opcode} {name}9, {', '.join(names)};", dict(zip(names, packed, strict=True)))
    for index, pattern in enumerate(machine.registers[f"{name}9"].tolist()):
        for half, result in enumerate(unpack(pattern, form, count)):
            row = [form.decode(cell) for cell in rows[index - 5 * half]]
            assert same(result, function(form, *row)), (row, result)


def total(a: float, b: float) -> tuple[Number, float]:
    """Return a sum, which is exact if it is finite, and the sign that it has if it is zero."""
    if not (math.isfinite(a) and math.isfinite(b)):
        return a + b, 1.0
    return Fraction(a) + Fraction(b), -1.0 if math.copysign(1, a) == math.copysign(1, b) == -1 else 1.0


def added(form: Format, a: float, b: float) -> float:
    return form.round(*total(a, b))


def multiplied(form: Format, a: float, b: float) -> float:
    sign = math.copysign(1, a) * math.copysign(1, b)
    return form.round(Fraction(a) * Fraction(b), sign) if math.isfinite(a) and math.isfinite(b) else a * b


def fused(form: Format, a: float, b: float, c: float) -> float:
    if not all(map(math.isfinite, (a, b, c))):
        return (a * b if not (math.isfinite(a) and math.isfinite(b)) else 1.0) + c
    sign = math.copysign(1, a) * math.copysign(1, b)
    return form.round(Fraction(a) * Fraction(b) + Fraction(c), -1.0 if sign == math.copysign(1, c) == -1 else 1.0)


ALL = ["f32", "f32x2", "f16", "f16x2", "bf16", "bf16x2"]


@pytest.mark.parametrize("opcode", ["add.f32", "add.f32x2"])
def test_add(run: Run, opcode: str) -> None:
    check(run, opcode, opcode[4:], 2, added)


@pytest.mark.parametrize("opcode", ["sub.f32", "sub.f32x2"])
def test_sub(run: Run, opcode: str) -> None:
    check(run, opcode, opcode[4:], 2, lambda form, a, b: added(form, a, -b))


@pytest.mark.parametrize("opcode", [f"mul.{kind}" for kind in ALL])
def test_mul(run: Run, opcode: str) -> None:
    check(run, opcode, opcode[4:], 2, multiplied)


@pytest.mark.parametrize("opcode", [f"fma.rn.{kind}" for kind in ALL])
def test_fma(run: Run, opcode: str) -> None:
    check(run, opcode, opcode[7:], 3, fused)


@pytest.mark.parametrize(
    ("opcode", "kind", "row"),
    [
        # The product is half way between two numbers, and float64 would lose the small addend beside it.
        ("fma.rn.f32", "f32", (1 + 2.0**-12, 1 + 2.0**-12, -(2.0**-80))),
        ("fma.rn.f32", "f32", (1 + 2.0**-12, 1 + 2.0**-12, 2.0**-80)),
        ("fma.rn.f32x2", "f32", (1 + 2.0**-12, -1 - 2.0**-12, 2.0**-80)),
        ("fma.rn.bf16", "bf16", (7.0, 37.0, -(2.0**-60))),
        ("fma.rn.bf16x2", "bf16", (7.0, 39.0, 2.0**-60)),
    ],
)
def test_fma_rounds_once(run: Run, opcode: str, kind: str, row: tuple[float, ...]) -> None:
    form, count = FORMATS[kind], 2 if opcode.endswith("x2") else 1
    encodings: dict[str, Callable[[float], Any]] = {
        "f32": np.float32,
        "bf16": lambda x: (np.float32(x).view(np.uint32) >> 16).astype(np.uint16),
    }
    encode = encodings[kind]
    patterns = [int(encode(value).view(f"u{form.bits // 8}")) for value in row]
    assert [form.decode(pattern) for pattern in patterns] == list(row)
    name = REGISTER[form.bits * count]
    packed = {f"{name}{i}": [sum(p << form.bits * half for half in range(count))] for i, p in enumerate(patterns, 1)}
    machine = run(f"{opcode} {name}9, {', '.join(packed)};", packed)
    assert unpack(int(machine.registers[f"{name}9"][0]), form, count) == [fused(form, *row)] * count


def smaller(form: Format, a: float, b: float) -> float:
    """Return the smaller of two numbers. A number wins over NaN, and -0 is below +0."""
    if math.isnan(a) or math.isnan(b):
        return a if math.isnan(b) else b
    return min((a, b), key=lambda x: (x, math.copysign(1, x)))


@pytest.mark.parametrize("opcode", ["min.f32", "max.f32"])
def test_min_and_max(run: Run, opcode: str) -> None:
    larger = lambda form, a, b: -smaller(form, -a, -b)  # noqa: E731
    check(run, opcode, "f32", 2, smaller if opcode[:3] == "min" else larger)


@pytest.mark.parametrize("opcode", ["div.full.f32"])
def test_div_is_within_two_units(run: Run, opcode: str) -> None:
    a, b = np.random.default_rng(0).normal(size=(2, 4096)).astype(np.float32)
    machine = run(f"{opcode} %r9, %r1, %r2;", {"%r1": a.view(np.uint32), "%r2": b.view(np.uint32)})
    exact = a.astype(np.float64) / b
    unit = np.exp2(np.floor(np.log2(np.abs(exact))) - 23)
    assert (np.abs(machine.registers["%r9"].view(np.float32) - exact) <= 2 * unit).all()


@pytest.mark.parametrize("opcode", ["div.full.f32"])
@pytest.mark.parametrize(
    ("a", "b", "expected"),
    [(1, 0.0, INF), (-1, 0.0, -INF), (1, -0.0, -INF), (0.0, 0.0, NAN), (INF, INF, NAN), (-0.0, 4, -0.0), (3, NAN, NAN)],
)
def test_div_at_its_limits(run: Run, opcode: str, a: float, b: float, expected: float) -> None:
    registers = {f"%r{index}": np.array([x], np.float32).view(np.uint32) for index, x in enumerate((a, b), 1)}
    result = run(f"{opcode} %r9, %r1, %r2;", registers).registers["%r9"].view(np.float32)
    assert same(float(result[0]), expected)


@pytest.mark.parametrize("opcode", ["ex2.approx.f32"])
def test_ex2(run: Run, opcode: str) -> None:
    """The ISA allows a relative error of 2^-22 where the result is no subnormal, and defines the results at these
    limits."""
    x = np.random.default_rng(0).uniform(-125, 127, 4096).astype(np.float32)
    limits = {-INF: 0.0, INF: INF, NAN: NAN, 0.0: 1.0, 200.0: INF, -200.0: 0.0, 10.0: 1024.0}
    given = np.concatenate([np.array([*limits, -0.0], np.float32), x])
    result = run(f"{opcode} %r9, %r1;", {"%r1": given.view(np.uint32)}).registers["%r9"].view(np.float32)
    assert all(map(same, result[: len(limits) + 1].tolist(), [*limits.values(), 1.0]))
    exact = np.array([math.exp2(value) for value in x.tolist()])
    assert (np.abs(result[len(limits) + 1 :] / exact - 1) <= 2.0**-22).all()


COMPARE = {
    "eq": operator.eq,
    "ne": lambda a, b: not math.isnan(a) and not math.isnan(b) and a != b,
    "lt": operator.lt,
    "le": operator.le,
    "gt": operator.gt,
    "ge": operator.ge,
    "num": lambda a, b: not math.isnan(a) and not math.isnan(b),
    "nan": lambda a, b: math.isnan(a) or math.isnan(b),
}


@pytest.mark.parametrize("opcode", [f"setp.{order}.f32" for order in COMPARE])
def test_setp(run: Run, opcode: str) -> None:
    """Only the comparison `nan` is true where an operand is NaN; zeros are equal whatever their signs."""
    form = FORMATS["f32"]
    rows = list(product(edges(form), repeat=2))
    machine = run(f"{opcode} %p1, %r1, %r2;", {"%r1": [a for a, _ in rows], "%r2": [b for _, b in rows]})
    expected = [COMPARE[opcode[5:-4]](form.decode(a), form.decode(b)) for a, b in rows]
    assert machine.registers["%p1"].tolist() == expected


@pytest.mark.parametrize("opcode", ["selp.f32", "mov.f32"])
def test_bits_stay_as_they_are(run: Run, opcode: str) -> None:
    """The bits of every number stay, even those of NaN."""
    patterns = edges(FORMATS["f32"])
    rest = ", %r2, %p1" if opcode == "selp.f32" else ""
    given = {"%r1": patterns, "%r2": [0] * len(patterns), "%p1": [True] * len(patterns)}
    assert run(f"{opcode} %r9, %r1{rest};", given).registers["%r9"].tolist() == patterns


@pytest.mark.parametrize("opcode", ["cvt.f32.bf16", "cvt.f32.f16"])
def test_to_wider_floats(run: Run, opcode: str) -> None:
    """The judge is torch's conversion, on every pattern."""
    patterns = np.arange(1 << 16, dtype=np.uint16)
    result = run(f"{opcode} %r1, %rs1;", {"%rs1": patterns}).registers["%r1"].view(np.float32)
    dtype = torch.bfloat16 if "bf16" in opcode else torch.float16
    expected = torch.from_numpy(patterns.view(np.int16)).view(dtype).float().numpy()
    assert np.array_equal(result, expected, equal_nan=True)
    assert np.array_equal(np.signbit(result), np.signbit(expected))


def floats_to_round(form: Format) -> list[float]:
    """Return each edge of a format, the number half way to its neighbour, and the float32 numbers just below and just
    above that."""
    found = []
    for pattern in edges(form):
        low, high = form.decode(pattern), form.decode(pattern + 1)
        middle = (low + high) / 2 if math.isfinite(high) else low * (1 + 2.0 ** -(form.fraction + 1))
        around = np.nextafter(np.float32(middle), np.array([-INF, INF], np.float32)).tolist()
        found += [low, float(np.float32(middle)), *around]
    return found


@pytest.mark.parametrize("opcode", ["cvt.rn.bf16.f32", "cvt.rn.f16.f32", "cvt.rn.bf16x2.f32", "cvt.rn.f16x2.f32"])
def test_to_narrower_floats(run: Run, opcode: str) -> None:
    """The first of two numbers goes to the upper half of a register. torch's conversion agrees with the fractions."""
    kind = opcode.split(".")[2].removesuffix("x2")
    form, dtype = FORMATS[kind], torch.bfloat16 if kind == "bf16" else torch.float16
    values = np.array(floats_to_round(form), np.float32)
    expected = [form.round(value, math.copysign(1, value)) for value in values.tolist()]
    by_torch = torch.from_numpy(values).to(dtype).double().tolist()
    assert all(map(same, by_torch, expected))
    given = {"%r1": values.view(np.uint32), "%r2": np.roll(values, 5).view(np.uint32)}
    if "x2" in opcode:
        patterns = run(f"{opcode} %r9, %r1, %r2;", given).registers["%r9"].tolist()
        low = [form.decode(pattern & 0xFFFF) for pattern in patterns]
        assert all(map(same, low, np.roll(expected, 5).tolist()))
        patterns = [pattern >> 16 for pattern in patterns]
    else:
        patterns = run(f"{opcode} %rs9, %r1;", given).registers["%rs9"].tolist()
    assert all(map(same, map(form.decode, patterns), expected))


@pytest.mark.parametrize("opcode", [f"cvt.rn.{to}.{kind}" for to in FORMATS for kind in ("s16", "s32", "u16", "u32")])
def test_integers_to_floats(run: Run, opcode: str) -> None:
    _, _, to, kind = opcode.split(".")
    form, bits = FORMATS[to], int(kind[1:])
    ties = [1 << n | 1 << max(n - form.fraction - 1, 0) | extra for n in range(bits - 1) for extra in (0, 1)]
    values = [0, *ties, (1 << bits - 1) - 1, *([-tie for tie in ties] if kind[0] == "s" else [(1 << bits) - 1])]
    source, target = REGISTER[bits], REGISTER[form.bits]
    machine = run(f"{opcode} {target}9, {source}1;", {f"{source}1": values})
    result = map(form.decode, machine.registers[f"{target}9"].tolist())
    assert all(map(same, result, (form.round(Fraction(value)) for value in values)))


@pytest.mark.parametrize("form", FORMATS.values(), ids=FORMATS)
def test_the_judge_of_this_file(form: Format) -> None:
    """Each number of a format rounds to itself, and torch reads the same number from its bits."""
    patterns = edges(form)
    values = [form.decode(pattern) for pattern in patterns]
    assert all(same(form.round(value, math.copysign(1, value)), value) for value in values)
    packed = torch.tensor(patterns, dtype=torch.int64).to(torch.int32 if form.bits == 32 else torch.int16)
    dtype = {(8, 23): torch.float32, (5, 10): torch.float16, (8, 7): torch.bfloat16}[form.exponent, form.fraction]
    assert all(map(same, packed.view(dtype).double().tolist(), values))
