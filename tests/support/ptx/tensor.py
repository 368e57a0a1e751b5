"""Defines tensor memory and its matrix instructions (sm_100), and the `mbarrier`s that tell when those are done."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable

import numpy as np
from support.ptx.access import names, nothing
from support.ptx.arithmetic import bfloat16_to_double
from support.ptx.machine import WARP, Lanes, Machine, Mask, NotYetError, PtxError, need_everyone
from support.ptx.matrix import read_described
from support.ptx.text import Address, Instruction

LANES, COLUMNS = 128, 512


class TensorMemory:
    """Tensor memory: 128 lanes of 512 columns of 32 bits. An address has the lane from bit 16 on, the column below."""

    def __init__(self) -> None:
        self.data = np.full((LANES, COLUMNS), 0xFFFFFFFF, np.uint32)
        self.allocated = 0
        self.pending: deque[Callable[[], None]] = deque()
        self.commits: deque[tuple[int, int]] = deque()
        """Each commit's barrier, and the number of matrix instructions between the commit before it and this one."""
        self.since_commit = 0
        self.phases: dict[int, int] = {}
        """How many phases each barrier has ended, by its address."""


def memory_of(machine: Machine) -> TensorMemory:
    if machine.tensor_memory is None:
        machine.tensor_memory = TensorMemory()
    found = machine.tensor_memory
    assert isinstance(found, TensorMemory)
    return found


def one(machine: Machine, operand: object, mask: Mask) -> int:
    """Return the address that all threads in `mask` compute. Raises PtxError if they compute different ones."""
    assert isinstance(operand, Address)
    values = np.unique(machine.addresses(operand)[mask])
    if len(values) != 1:
        raise PtxError(f"the threads disagree: {machine.instruction.text}")
    return int(values[0])


def allocate(machine: Machine, instruction: Instruction, mask: Mask) -> None:
    """Allocate columns of tensor memory, and store the address of the first in shared memory."""
    memory = memory_of(machine)
    columns = int(machine.read(instruction.operands[1], np.uint32))
    if memory.allocated + columns > COLUMNS:
        raise PtxError(f"{memory.allocated + columns} columns of tensor memory are wanted, there are {COLUMNS}")
    place = np.array([one(machine, instruction.operands[0], mask)])
    value = np.array([[memory.allocated]], np.uint32).view(np.uint8)
    machine.shared.store(place, value, machine.lane[mask][:1] // WARP)
    memory.allocated += columns


def deallocate(machine: Machine, instruction: Instruction, mask: Mask) -> None:
    memory_of(machine).allocated -= int(machine.read(instruction.operands[1], np.uint32))


def places(machine: Machine, instruction: Instruction, address: object, count: int) -> tuple[Lanes, Lanes]:
    """Return the lane and the column of tensor memory for each register, both `[registers, threads]`.

    The instruction's shape determines how a warp's registers are laid out. Raises PtxError if a warp touches lanes of
    another or columns that were not allocated.
    """
    assert isinstance(address, Address)
    base = machine.addresses(address)
    lane, column = base >> 16, base & 0xFFFF
    thread = machine.lane % WARP
    register = np.arange(count)[:, None]
    shape = instruction.modifiers[3]
    if shape == "32x32b":
        rows, columns = thread + 0 * register, register + 0 * thread
    elif shape == "16x128b":
        rows, columns = thread // 4 + register % 2 * 8, thread % 4 + register // 2 * 4
    else:
        second = int(machine.read(instruction.operands[1 if instruction.modifiers[0] == "st" else 2], np.uint32))
        rows, columns = thread % 16 + 0 * register, register + thread // 16 * second
    if (lane // WARP != machine.lane // WARP % 4).any():
        raise PtxError(f"a warp touches lanes of tensor memory that are another's: {instruction.text}")
    if (column + columns >= memory_of(machine).allocated).any():
        raise PtxError(f"tensor memory is touched that was not allocated: {instruction.text}")
    return lane + rows, column + columns


def store(machine: Machine, instruction: Instruction, mask: Mask) -> None:
    need_everyone(instruction, mask)
    registers = names(instruction.operands[-1])
    lane, column = places(machine, instruction, instruction.operands[0], len(registers))
    for index, name in enumerate(registers):
        memory_of(machine).data[lane[index], column[index]] = machine.read(name, np.uint32)


def load(machine: Machine, instruction: Instruction, mask: Mask) -> None:
    need_everyone(instruction, mask)
    registers = names(instruction.operands[0])
    lane, column = places(machine, instruction, instruction.operands[1], len(registers))
    for index, name in enumerate(registers):
        machine.write(name, memory_of(machine).data[lane[index], column[index]], mask)


def multiply(machine: Machine, instruction: Instruction, mask: Mask) -> None:
    """Start `tcgen05.mma`, which multiplies tensor memory by shared memory and is issued by one thread.

    A wait for its commit ends it.
    """
    d, a, descriptor, shape, adds = instruction.operands
    described = int(machine.lanes(descriptor, np.uint64)[mask][0])
    kind = int(machine.lanes(shape, np.uint32)[mask][0])
    # The only known formats in the instruction descriptor are float32 sums and bfloat16 operands, neither negated nor
    # transposed.
    rows, columns, formats = (kind >> 24 & 0x1F) << 4, (kind >> 17 & 0x3F) << 3, kind & 0x1FFFF
    if mask.sum() != 1 or formats != 1 << 4 | 1 << 7 | 1 << 10:
        raise PtxError(f"the interpreter does not know {instruction.text}")
    out, left = (one(machine, operand, mask) for operand in (d, a))
    adding = bool(machine.lanes(adds, np.bool_)[mask][0])
    memory = memory_of(machine)
    # If there are 64 rows, they lie in the first half of each warp's lanes.
    lanes = np.arange(rows) if rows == LANES else np.arange(rows) // 16 * 32 + np.arange(rows) % 16

    def finish() -> None:
        words = memory.data[(left >> 16) + lanes[:, None], (left & 0xFFFF) + np.arange(8)]
        weights = np.stack([words & np.uint32(0xFFFF), words >> np.uint32(16)], axis=-1).reshape(rows, 16)
        right = read_described(machine, described, columns, 16, 0)
        total = bfloat16_to_double(weights) @ right.T
        place = ((out >> 16) + lanes[:, None], (out & 0xFFFF) + np.arange(columns))
        if adding:
            total = total + memory.data[place].view(np.float32)
        memory.data[place] = total.astype(np.float32).view(np.uint32)

    memory.pending.append(finish)
    memory.since_commit += 1


def commit(machine: Machine, instruction: Instruction, mask: Mask) -> None:
    """Have an `mbarrier` end a phase when the matrix instructions since the last commit are done."""
    memory = memory_of(machine)
    memory.commits.append((one(machine, instruction.operands[0], mask), memory.since_commit))
    memory.since_commit = 0


def barrier(machine: Machine, instruction: Instruction, mask: Mask) -> None:
    """Make, remove or wait for an `mbarrier`.

    Matrix instructions are computed only when a thread waits for the phase that their commit ends.
    """
    phases, memory = memory_of(machine).phases, memory_of(machine)
    kind = instruction.modifiers[0]
    if kind in ("init", "inval"):
        place = one(machine, instruction.operands[0], mask)
        if kind == "init":
            if (machine.read(instruction.operands[1], np.uint32) != 1).any():
                raise PtxError(f"the interpreter knows barriers for one arrival only: {instruction.text}")
            phases[place] = 0
        else:
            del phases[place]
    else:
        place = one(machine, instruction.operands[1], mask)
        parity = int(machine.lanes(instruction.operands[2], np.uint32)[mask][0])
        if place not in phases:
            raise PtxError(f"a barrier is waited for that was not made: {instruction.text}")
        while phases[place] % 2 == parity:
            if not memory.commits:
                raise NotYetError
            ended, count = memory.commits.popleft()
            for _ in range(count):
                memory.pending.popleft()()
            phases[ended] += 1
        machine.write(instruction.operands[0], machine.everyone, mask)


OPERATIONS: dict[str, Callable[[Machine, Instruction, Mask], None]] = {
    "tcgen05.alloc.cta_group::1.sync.aligned.shared::cta.b32": allocate,
    "tcgen05.dealloc.cta_group::1.sync.aligned.b32": deallocate,
    "tcgen05.relinquish_alloc_permit.cta_group::1.sync.aligned": nothing,
    **{
        f"tcgen05.{name}.sync.aligned.{shape}.x{count}.b32": operation
        for name, operation in (("ld", load), ("st", store))
        for shape, most in (("32x32b", 128), ("16x128b", 64), ("16x32bx2", 128))
        for count in (1, 2, 4, 8, 16, 32, 64, 128)
        if count <= most
    },
    "tcgen05.mma.cta_group::1.kind::f16": multiply,
    "tcgen05.commit.cta_group::1.mbarrier::arrive::one.shared::cluster.b64": commit,
    "tcgen05.commit.cta_group::1.mbarrier::arrive::one.b64": commit,
    # In the interpreter, loads and stores of tensor memory are done at once.
    "tcgen05.wait::ld.sync.aligned": nothing,
    "tcgen05.wait::st.sync.aligned": nothing,
    "tcgen05.fence::before_thread_sync": nothing,
    "tcgen05.fence::after_thread_sync": nothing,
    "mbarrier.init.shared::cta.b64": barrier,
    "mbarrier.inval.shared::cta.b64": barrier,
    "mbarrier.try_wait.parity.shared::cta.b64": barrier,
    "mbarrier.try_wait.parity.shared.b64": barrier,
}
