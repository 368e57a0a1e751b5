"""Defines the matrix instructions of sm_80 and sm_90, and the loads and stores that feed them."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from support.ptx.access import names
from support.ptx.arithmetic import bfloat16_to_double
from support.ptx.machine import WARP, Lanes, Machine, Mask, PtxError, need_everyone
from support.ptx.text import Instruction

GROUP = np.arange(WARP) // 4  # each lane's row in its part of a fragment
PAIR = np.arange(WARP) % 4 * 2  # each lane's first column in its part of a fragment
WARPS = 4  # the warps of a warp group


def of_warps(machine: Machine, name: str) -> Lanes:
    """Return a register's bits for each lane, uint32 `[warps, 32]`."""
    return machine.lanes(name, np.uint32).reshape(-1, WARP)


def left_operand(registers: list[Lanes]) -> Lanes:
    """Return each warp's left operand, float64 `[warps, 16, 16]`, from four registers of two bfloat16 each."""
    matrix = np.empty((len(registers[0]), 16, 16))
    for index, register in enumerate(registers):
        row, column = GROUP + 8 * (index % 2), PAIR + 8 * (index // 2)
        matrix[:, row, column] = bfloat16_to_double(register & np.uint32(0xFFFF))
        matrix[:, row, column + 1] = bfloat16_to_double(register >> np.uint32(16))
    return matrix


def accumulators(registers: list[Lanes]) -> Lanes:
    """Return each warp's accumulators, float64 `[warps, 16, 2 · registers]`; four registers hold eight columns."""
    matrix = np.empty((len(registers[0]), 16, 2 * len(registers)))
    for index, register in enumerate(registers):
        block, part = divmod(index, 4)
        matrix[:, GROUP + 8 * (part // 2), 8 * block + PAIR + part % 2] = register.view(np.float32)
    return matrix


def store_accumulators(machine: Machine, targets: tuple[str, ...], matrix: Lanes) -> None:
    """Write accumulators `[warps, 16, 2 · registers]` to the registers `targets`, as float32."""
    for index, name in enumerate(targets):
        block, part = divmod(index, 4)
        values = matrix[:, GROUP + 8 * (part // 2), 8 * block + PAIR + part % 2]
        # `write` would refuse a register that is owned, as it is if later instructions of the same sum are under way.
        machine.registers[name] = values.astype(np.float32).reshape(-1).view(np.uint32)


def multiply(machine: Machine, instruction: Instruction, mask: Mask) -> None:
    """Run `mma.sync`: each warp multiplies bfloat16 matrices `[16, 16]` and `[16, 8]`, and adds the accumulators."""
    need_everyone(instruction, mask)
    d, a, b, c = map(names, instruction.operands)
    left = left_operand([of_warps(machine, name) for name in a])
    right = np.empty((len(left), 16, 8))
    for index, name in enumerate(b):
        register = of_warps(machine, name)
        right[:, PAIR + 8 * index, GROUP] = bfloat16_to_double(register & np.uint32(0xFFFF))
        right[:, PAIR + 8 * index + 1, GROUP] = bfloat16_to_double(register >> np.uint32(16))
    store_accumulators(machine, d, left @ right + accumulators([of_warps(machine, name) for name in c]))


def move_matrices(machine: Machine, instruction: Instruction, mask: Mask) -> None:
    """Run `ldmatrix` or `stmatrix`, which move 8 × 8 matrices of 16-bit elements between shared memory and registers.

    Each lane gives the address of one row, and a register holds two elements.
    """
    need_everyone(instruction, mask)
    loads = instruction.name == "ldmatrix"
    first, second = instruction.operands
    registers, address = (first, second) if loads else (second, first)
    targets = names(registers)
    places = machine.addresses(address).reshape(-1, WARP)
    warps = np.arange(len(places)).repeat(8)
    transposed = "trans" in instruction.modifiers
    row, column = (PAIR, GROUP) if transposed else (GROUP, PAIR)
    step = (1, 0) if transposed else (0, 1)
    for index, name in enumerate(targets):
        rows = places[:, 8 * index : 8 * index + 8].reshape(-1)
        if loads:
            matrix = machine.shared.load(rows, 16, warps).view(np.uint16).reshape(-1, 8, 8)
            low, high = matrix[:, row, column], matrix[:, row + step[0], column + step[1]]
            value = low.astype(np.uint32) | (high.astype(np.uint32) << np.uint32(16))
            machine.write(name, value.reshape(-1), machine.everyone)
        else:
            value = of_warps(machine, name)
            matrix = np.empty((len(places), 8, 8), np.uint16)
            matrix[:, row, column] = value & np.uint32(0xFFFF)
            matrix[:, row + step[0], column + step[1]] = value >> np.uint32(16)
            machine.shared.store(rows, matrix.reshape(-1, 8).view(np.uint8), warps)


def described_offsets(descriptor: int, rows: int, columns: int) -> Lanes:
    """Return the addresses in shared memory of an operand's 2-byte elements, `[rows, columns]`; columns are adjacent.

    In the PTX ISA's matrix descriptor, bits 0 to 13 are the address, bits 16 to 29 the step between core matrices along
    the columns, and bits 32 to 45 the step along the rows, all in units of 16 bytes. The swizzle begins at bit 61.
    """

    def field(first: int) -> int:
        return (descriptor >> first & 0x3FFF) << 4

    swizzle = {0: 0, 2: 128, 4: 64, 6: 32}[descriptor >> 61 & 7]
    row, column = np.arange(rows)[:, None], np.arange(columns)[None, :] * 2
    if not swizzle:
        return field(0) + row // 8 * field(32) + column // 16 * field(16) + row % 8 * 16 + column % 16
    place = field(0) + row // 8 * field(32) + row % 8 * swizzle + column
    # The swizzle permutes the 16-byte units within a line by the number of the 128-byte line.
    return place ^ ((place >> 7 & swizzle // 16 - 1) << 4)


def read_described(machine: Machine, descriptor: int, rows: int, columns: int, warps: int) -> Lanes:
    """Return a bfloat16 operand in shared memory as float64 `[rows, columns]`, and note that `warps` warps read it."""
    offsets = described_offsets(descriptor, rows, columns).astype(np.int64).reshape(-1)
    for warp in range(warps):
        machine.shared.note_read(machine.shared.offsets(offsets, 2), np.full(len(offsets), warp))
    data = machine.shared.data[machine.shared.offsets(offsets, 2)].view(np.uint16)
    return bfloat16_to_double(data).reshape(rows, columns)


def multiply_group(machine: Machine, instruction: Instruction, mask: Mask) -> None:
    """Run `wgmma`: each warp group multiplies 64 rows in registers by shared memory, asynchronously until a wait."""
    kind = instruction.modifiers[0]
    need_everyone(instruction, mask)
    if kind == "fence":
        return
    if kind == "commit_group":
        machine.products.append([])
        return
    if kind == "wait_group":
        in_flight = int(machine.read(instruction.operands[0], np.uint32))
        while len(machine.products) - 1 > in_flight:
            for work in machine.products.pop(0):
                work()
        return
    shape = instruction.modifiers[3]
    n = int(shape[4:-3])
    d, a, descriptor, scale, *signs = instruction.operands
    if not isinstance(a, tuple) or signs != ["1", "1", "0"]:
        raise PtxError(f"the interpreter does not know {instruction.text}")
    targets = names(d)
    described = np.unique(machine.lanes(descriptor, np.uint64).reshape(-1, WARP * WARPS), axis=1)
    if described.shape[1] != 1:
        raise PtxError(f"the threads of a warp group disagree: {instruction.text}")
    adds = bool(np.all(machine.read(scale, np.bool_)))
    left = [of_warps(machine, name).copy() for name in a]
    machine.owned.update(targets)

    def finish() -> None:
        machine.owned.subtract(targets)
        if any(not np.array_equal(of_warps(machine, name), value) for name, value in zip(a, left, strict=True)):
            raise PtxError(f"weights change under a product that is under way: {instruction.text}")
        groups = left_operand(left).reshape(-1, WARPS * 16, 16)
        right = (read_described(machine, int(one), n, 16, WARPS) for one in described[:, 0])
        total = np.stack([rows @ columns.T for rows, columns in zip(groups, right, strict=True)]).reshape(-1, 16, n)
        if adds:
            total += accumulators([machine.registers[name].reshape(-1, WARP) for name in targets])
        store_accumulators(machine, targets, total)

    machine.products[-1].append(finish)


OPERATIONS: dict[str, Callable[[Machine, Instruction, Mask], None]] = {
    "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32": multiply,
    **{
        f"{name}.sync.aligned.m8n8.x{count}{transposed}.shared.b16": move_matrices
        for name in ("ldmatrix", "stmatrix")
        for count in (1, 2, 4)
        for transposed in ("", ".trans")
    },
    "wgmma.fence.sync.aligned": multiply_group,
    "wgmma.commit_group.sync.aligned": multiply_group,
    "wgmma.wait_group.sync.aligned": multiply_group,
    **{f"wgmma.mma_async.sync.aligned.m64n{n}k16.f32.bf16.bf16": multiply_group for n in range(8, 257, 8)},
}
