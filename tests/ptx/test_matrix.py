"""Tests of `mma`, `ldmatrix`, `stmatrix` and `wgmma`. Each lane's part of a matrix follows the ISA's formulas; the
judge of the products is a plain product in float64."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from support.ptx.memory import PtxError

Run = Callable[..., Any]
Matrix = torch.Tensor


def matrix(rows: int, columns: int, seed: int) -> Matrix:
    """Return a matrix of small integers, whose products and sums need no rounding."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-8, 9, (rows, columns), generator=generator).to(torch.bfloat16)


def pattern(value: torch.Tensor) -> int:
    return int(value.view(torch.int16)) & 0xFFFF


def pair(low: torch.Tensor, high: torch.Tensor) -> int:
    return pattern(low) | pattern(high) << 16


def left_registers(a: Matrix) -> list[list[int]]:
    """Return four registers for each lane that hold the left matrix `[16 · warps, 16]`: row and column of a0 to a7
    follow the ISA's formulas."""
    registers: list[list[int]] = [[] for _ in range(4)]
    for thread in range(len(a) * 2):
        group, place = thread % 32 // 4, thread % 4
        for index in range(4):
            row = thread // 32 * 16 + (group if index in (0, 2) else group + 8)
            column = place * 2 + (8 if index >= 2 else 0)
            registers[index].append(pair(a[row, column], a[row, column + 1]))
    return registers


def sums_of(thread: int, index: int) -> tuple[int, int]:
    """Return the row and column of one of a lane's sums."""
    group, place = thread % 32 // 4, thread % 4
    return thread // 32 * 16 + group + (8 if index % 4 >= 2 else 0), index // 4 * 8 + place * 2 + index % 2


def sum_registers(c: torch.Tensor) -> list[list[int]]:
    bits = c.float().view(torch.int32).tolist()
    count, threads = c.shape[1] // 2, len(c) * 2
    places = [[sums_of(thread, index) for thread in range(threads)] for index in range(count)]
    return [[bits[row][column] for row, column in register] for register in places]


def listed(first: int, count: int) -> str:
    return "{" + ", ".join(f"%r{first + index}" for index in range(count)) + "}"


def given(first: int, registers: list[list[int]]) -> dict[str, Any]:
    return {f"%r{first + index}": values for index, values in enumerate(registers)}


def results(machine: Any, first: int, count: int) -> list[list[int]]:
    return [machine.registers[f"%r{first + index}"].view(np.int32).tolist() for index in range(count)]


MMA = "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32"


@pytest.mark.parametrize("opcode", [MMA])
def test_mma(run: Run, opcode: str) -> None:
    """Each of two warps multiplies matrices of its own."""
    a, b, c = matrix(32, 16, 0), [matrix(16, 8, 1), matrix(16, 8, 2)], matrix(32, 8, 3)
    right: list[list[int]] = [[], []]
    for thread in range(64):
        group, place, mine = thread % 32 // 4, thread % 4, b[thread // 32]
        for index in range(2):
            row = place * 2 + 8 * index
            right[index].append(pair(mine[row, group], mine[row + 1, group]))
    registers = given(10, left_registers(a)) | given(20, right) | given(30, sum_registers(c))
    text = f"{opcode} {listed(40, 4)}, {listed(10, 4)}, {listed(20, 2)}, {listed(30, 4)};"
    product = torch.cat([a[:16].double() @ b[0].double(), a[16:].double() @ b[1].double()])
    assert results(run(text, registers), 40, 4) == sum_registers(product + c.double())


def test_mma_without_some_lanes(run: Run) -> None:
    registers = given(10, [[0] * 32] * 10) | {"%p1": [True] * 31 + [False]}
    text = f"@%p1 {MMA} {listed(40, 4)}, {listed(10, 4)}, {listed(14, 2)}, {listed(16, 4)};"
    with pytest.raises(PtxError, match="some threads do not reach"):
        run(text, registers)


@pytest.mark.parametrize(
    "opcode",
    [
        f"{name}.sync.aligned.m8n8.x{count}{transposed}.shared.b16"
        for name in ("ldmatrix", "stmatrix")
        for count in (1, 2, 4)
        for transposed in ("", ".trans")
    ],
)
def test_matrices_in_shared_memory(run: Run, opcode: str) -> None:
    """Eight lanes give the addresses of a matrix's rows. A lane holds two neighbours of a row or, transposed, of a
    column."""
    count = int(opcode.split(".x")[1][0])
    generator = np.random.default_rng(0)
    # The rows of all matrices of two warps lie in no order; lanes that give no row have an address outside the memory.
    places = generator.permutation(2 * 8 * count) * 16
    addresses = np.full((2, 32), 1 << 20)
    addresses[:, : 8 * count] = places.reshape(2, 8 * count)
    memory = generator.integers(0, 1 << 16, 2 * 8 * count * 8, dtype=np.uint16)
    expected: list[list[int]] = []
    for index in range(count):
        expected.append([])
        for thread in range(64):
            lane, warp = thread % 32, thread // 32
            element = lambda row, column: int(memory[addresses[warp, 8 * index + row] // 2 + column])  # noqa: B023, E731
            major, minor = lane // 4, lane % 4 * 2
            if "trans" in opcode:
                low, high = element(minor, major), element(minor + 1, major)
            else:
                low, high = element(major, minor), element(major, minor + 1)
            expected[index].append(low | high << 16)
    registers = {"%r1": addresses.reshape(-1)}
    if opcode.startswith("ld"):
        machine = run(f"{opcode} {listed(10, count)}, [%r1];", registers, shared=memory.view(np.uint8))
        assert [machine.registers[f"%r{10 + index}"].tolist() for index in range(count)] == expected
    else:
        text = f"{opcode} [%r1], {listed(10, count)};"
        machine = run(text, registers | given(10, expected), shared=memory.nbytes)
        assert np.array_equal(machine.shared.data.view(np.uint16), memory)


BASE = 1024
MODES = {0: 0, 128: 1, 64: 2, 32: 3}
"""Bits 62 and 63 of a matrix descriptor, by the number of bytes that a swizzle spans."""


def in_shared_memory(b: Matrix, swizzle: int) -> tuple[np.ndarray[Any, Any], Callable[[int], int]]:
    """Lay out `[n, k]` as the ISA's canonical layouts do; return the memory, and a function that gives the descriptor
    of the sixteen columns from a given one on.

    Without a swizzle each matrix of eight rows and 16 bytes is in one piece, here with room between the pieces. With a
    swizzle eight rows are adjacent and their 16-byte units are exchanged: in a row of 128 bytes by its number, in a row
    of 64 bytes by half of it, in a row of 32 bytes by a quarter.
    """
    n, k = b.shape
    memory = np.full(BASE + 2 * max(n * k * 2, n * 32), 0xEE, np.uint8)
    bits = b.view(torch.int16).numpy().view(np.uint16)
    along_k, along_n = 144, 144 * (k // 8) + 16
    for row in range(n):
        for unit in range(k // 8):
            if swizzle:
                exchanged = unit ^ row % 8 // (128 // swizzle)
                place = BASE + row // 8 * 8 * swizzle + row % 8 * swizzle + exchanged * 16
            else:
                place = BASE + row // 8 * along_n + unit * along_k + row % 8 * 16
            memory[place : place + 16] = bits[row, unit * 8 : unit * 8 + 8].view(np.uint8)

    def descriptor(column: int) -> int:
        start = BASE + (column * 2 if swizzle else column // 8 * along_k)
        leading, stride = (16, 8 * swizzle) if swizzle else (along_k, along_n)
        return start >> 4 | leading >> 4 << 16 | stride >> 4 << 32 | MODES[swizzle] << 62

    return memory, descriptor


FENCE, COMMIT, WAIT = (f"wgmma.{name}.sync.aligned" for name in ("fence", "commit_group", "wait_group"))


def product_of(n: int) -> str:
    return f"wgmma.mma_async.sync.aligned.m64n{n}k16.f32.bf16.bf16"


def wgmma(n: int, descriptor: str, adds: str) -> str:
    return f"{product_of(n)} {listed(100, n // 2)}, {listed(10, 4)}, {descriptor}, {adds}, 1, 1, 0;\n"


@pytest.mark.parametrize("opcode", [product_of(n) for n in range(8, 257, 8)])
def test_wgmma(run: Run, opcode: str) -> None:
    """A warp group multiplies 64 rows in registers by `n` columns in shared memory. The sums are new, or the products
    are added to them."""
    n = int(opcode.split("m64n")[1].split("k")[0])
    a, b, c = matrix(64, 16, 0), matrix(n, 16, 1), matrix(64, n, 2)
    memory, descriptor = in_shared_memory(b, 32)
    product = a.double() @ b.double().T
    for adds, expected in (("1", product + c.double()), ("0", product)):
        registers = given(10, left_registers(a)) | given(100, sum_registers(c)) | {"%rd1": [descriptor(0)] * 128}
        text = f"{FENCE};\nsetp.ne.b32 %p1, {adds}, 0;\n{wgmma(n, '%rd1', '%p1')}{COMMIT};\n{WAIT} 0;"
        assert results(run(text, registers, shared=memory), 100, n // 2) == sum_registers(expected)


@pytest.mark.parametrize("swizzle", MODES)
def test_layouts_of_wgmma(run: Run, swizzle: int) -> None:
    """Two warp groups take different columns of the matrix that lies in shared memory."""
    n, k = 24, {0: 32, 32: 16, 64: 32, 128: 64}[swizzle]
    columns = (k - 16, 0)
    a, b = matrix(128, 16, 0), matrix(n, k, 1)
    memory, descriptor = in_shared_memory(b, swizzle)
    registers = given(10, left_registers(a)) | given(100, [[0] * 256] * 12)
    registers["%rd1"] = [descriptor(columns[0])] * 128 + [descriptor(columns[1])] * 128
    parts = [b[:, column : column + 16].double().T for column in columns]
    expected = torch.cat([a[:64].double() @ parts[0], a[64:].double() @ parts[1]])
    machine = run(f"{wgmma(n, '%rd1', '0')}{COMMIT};\n{WAIT} 0;", registers, shared=memory)
    assert results(machine, 100, n // 2) == sum_registers(expected)


@pytest.mark.parametrize("opcode", [FENCE, COMMIT, WAIT])
def test_a_wait_ends_the_oldest_groups(run: Run, opcode: str) -> None:
    """Two products run in two groups. After a wait for all groups but one, the sums of the first may be read."""
    a, b = matrix(64, 16, 0), matrix(8, 16, 1)
    memory, descriptor = in_shared_memory(b, 32)
    second = f"{product_of(8)} {listed(200, 4)}, {listed(10, 4)}, %rd1, 0, 1, 1, 0;\n"
    text = f"{FENCE};\n{wgmma(8, '%rd1', '0')}{COMMIT};\n{second}{COMMIT};\n{WAIT} 1;\nmov.b32 %r1, %r100;\n"
    registers = given(10, left_registers(a)) | {"%rd1": [descriptor(0)] * 128}
    expected = sum_registers(a.double() @ b.double().T)
    machine = run(text, registers, shared=memory)
    assert opcode in text
    assert results(machine, 1, 1) == expected[:1]
    assert "%r200" not in machine.registers
    machine = run(f"{text}{WAIT} 0;\nmov.b32 %r2, %r200;", registers, shared=memory)
    assert results(machine, 2, 1) == expected[:1]


START = wgmma(8, "%rd1", "0")


WRONG = [
    (f"{START}{COMMIT};\nmov.b32 %r1, %r100;", "read while a matrix instruction owns it"),
    (f"{START}{COMMIT};\nmov.b32 %r103, 0;", "written while a matrix instruction owns it"),
    (f"{START}{WAIT} 0;\nmov.b32 %r1, %r100;", "read while a matrix instruction owns it"),
    (f"{START}{COMMIT};\n{START}{COMMIT};\n{WAIT} 1;\nmov.b32 %r1, %r100;", "a matrix instruction owns it"),
    (f"{START}{COMMIT};\nmov.b32 %r11, 7;\n{WAIT} 0;", "weights change under a product"),
    (f"@%p1 {START}", "some threads do not reach"),
    (f"selp.b64 %rd1, %rd1, 0, %p1;\n{START}", "the threads of a warp group disagree"),
    (START.replace("1, 1, 0;", "-1, 1, 0;"), "does not know"),
    (START.replace("1, 1, 0;", "1, 1, 1;"), "does not know"),
    (START.replace(listed(10, 4), "%rd1"), "does not know"),
    (f"st.shared.b8 [1024], 0;\n{START}{COMMIT};\n{WAIT} 0;", "read that another warp wrote"),
]


@pytest.mark.parametrize(("text", "reason"), WRONG, ids=[reason for _, reason in WRONG])
def test_what_is_wrong_with_wgmma(run: Run, text: str, reason: str) -> None:
    memory, descriptor = in_shared_memory(matrix(8, 16, 1), 32)
    registers = given(10, left_registers(matrix(64, 16, 0))) | {"%rd1": [descriptor(0)] * 128, "%p1": [1] * 127 + [0]}
    with pytest.raises(PtxError, match=reason):
        run(text, registers, shared=memory)
