"""Defines loads and stores, asynchronous copies, and barriers."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from support.ptx.machine import WARP, Lanes, Machine, Mask, PtxError
from support.ptx.text import Address, Instruction, Operand


def widths(instruction: Instruction) -> tuple[int, int]:
    """Return how many elements an access has, and the bytes of each."""
    elements = next((int(part[1:]) for part in instruction.modifiers if part[0] == "v" and part[1:].isdigit()), 1)
    return elements, int(instruction.modifiers[-1].lstrip("subf")) // 8


def names(operand: Operand) -> tuple[str, ...]:
    """Return the registers of an operand, which may be a vector."""
    assert not isinstance(operand, Address)
    return operand if isinstance(operand, tuple) else (operand,)


def is_shared(instruction: Instruction) -> bool:
    return any(part.startswith("shared") for part in instruction.modifiers)


def load(machine: Machine, instruction: Instruction, mask: Mask) -> None:
    """Run `ld` from global memory, shared memory or the kernel's parameters."""
    targets, address = instruction.operands
    elements, size = widths(instruction)
    if instruction.modifiers[0] == "param":
        assert isinstance(address, Address)
        machine.write(targets, machine.parameters[address.base], mask)
        return
    places = machine.addresses(address)[mask]
    if is_shared(instruction):
        data = machine.shared.load(places, elements * size, machine.lane[mask] // WARP)
    else:
        data = machine.memory.load(places, elements * size)
    values = np.ascontiguousarray(data).view(f"u{size}")
    for index, name in enumerate(names(targets)):
        whole = np.zeros(machine.threads, f"u{size}")
        whole[mask] = values[:, index]
        machine.write(name, whole, mask)


def store(machine: Machine, instruction: Instruction, mask: Mask) -> None:
    """Run `st` to global or shared memory."""
    address, sources = instruction.operands
    _, size = widths(instruction)
    parts = [machine.lanes(name, f"u{size}")[mask] for name in names(sources)]
    data = np.stack(parts, axis=1).view(np.uint8)
    places = machine.addresses(address)[mask]
    if is_shared(instruction):
        machine.shared.store(places, data, machine.lane[mask] // WARP)
    else:
        machine.memory.store(places, data)


def atomic(machine: Machine, instruction: Instruction, mask: Mask) -> None:
    """Run an atomic addition of 32-bit integers in shared memory, thread by thread."""
    target, address, value = instruction.operands
    places = machine.shared.offsets(machine.addresses(address)[mask], 4)
    machine.shared.note_atomic(places, machine.lane[mask] // WARP)
    counters = machine.shared.data.view(np.uint32)
    old = np.zeros(machine.threads, np.uint32)
    amounts = machine.lanes(value, np.uint32)[mask]
    seen = []
    for place, amount in zip(places[:, 0] // 4, amounts, strict=True):
        seen.append(counters[place])
        counters[place] += amount
    old[mask] = seen
    machine.write(target, old, mask)


ARRIVED = np.iinfo(np.int64).max
"""Replaces the number of a copy's group when this thread's part of the copy is done."""


def copy(machine: Machine, instruction: Instruction, mask: Mask) -> None:
    """Run `cp.async`, or close or wait for a group of copies, which each thread has for itself.

    The bytes arrive when a wait asks for them, not before, so that a missing wait is noticed.
    """
    if "commit_group" in instruction.modifiers:
        machine.committed += mask
        return
    if "wait_group" in instruction.modifiers:
        left = machine.read(instruction.operands[0], np.uint32).astype(np.int64)
        wait_for_copies(machine, np.where(mask, machine.committed - left, 0))
        return
    operands = instruction.operands
    if "L2::cache_hint" in instruction.modifiers:
        operands = operands[:-1]
    target, source, size, *given = operands
    width = int(machine.read(size, np.uint32))
    to, origin = machine.addresses(target)[mask], machine.addresses(source)[mask]
    count = machine.lanes(given[0], np.uint32)[mask] if given else np.full(len(to), width)
    warps = machine.lane[mask] // WARP
    offsets = machine.shared.offsets(to, width)
    machine.shared.note_write(offsets, warps)

    def arrive(due: Mask) -> None:
        data = np.zeros((len(to), width), np.uint8)
        whole = due & (count == width)
        if not (whole | (count == 0))[due].all():
            raise PtxError(f"the interpreter knows whole copies only: {instruction.text}")
        if whole.any():
            data[whole] = machine.memory.load(origin[whole], width)
        machine.shared.store(to[due], data[due], warps[due])

    machine.copies.append((machine.lane[mask], machine.committed[mask], arrive))


def wait_for_copies(machine: Machine, before: Lanes) -> None:
    """Complete the copies whose group comes before the number that `before` gives for their thread."""
    for threads, group, arrive in machine.copies:
        due = group < before[threads]
        if due.any():
            arrive(due)
            group[due] = ARRIVED
    machine.copies = [one for one in machine.copies if (one[1] != ARRIVED).any()]


def barrier(machine: Machine, instruction: Instruction, mask: Mask) -> None:
    """End a barrier that all threads have reached. The interpreter refuses a barrier for fewer threads."""
    _, *count = instruction.operands
    if count and (machine.read(count[0], np.uint32) != machine.threads).any():
        raise PtxError(f"a barrier that some threads do not reach: {instruction.text}")
    machine.shared.barrier()


def nothing(machine: Machine, instruction: Instruction, mask: Mask) -> None:
    """Do nothing, because threads in step keep the order of accesses, and there is no cache that could take advice."""


WIDTHS = tuple(
    f"{vector}b{bits}"
    for vector, most in (("", 64), ("v2.", 64), ("v4.", 32))
    for bits in (8, 16, 32, 64)
    if bits <= most
)
"""The widths of an access: one register or several, sixteen bytes at most."""

OPERATIONS: dict[str, Callable[[Machine, Instruction, Mask], None]] = {
    "ld.param.b32": load,
    "ld.param.b64": load,
    **{f"ld.{space}.{width}": load for space in ("global", "shared") for width in WIDTHS},
    **{f"st.{space}.{width}": store for space in ("global", "shared", "shared::cta") for width in WIDTHS},
    "atom.shared.add.u32": atomic,
    "atom.relaxed.sys.shared.add.u32": atomic,
    "cp.async.ca.shared.global": copy,
    "cp.async.cg.shared.global": copy,
    "cp.async.cg.shared.global.L2::cache_hint": copy,
    "cp.async.commit_group": copy,
    "cp.async.wait_group": copy,
    "bar.sync": barrier,
    "barrier.sync": barrier,
    "fence.proxy.async.shared::cta": nothing,
    "createpolicy.fractional.L2::evict_first.b64": nothing,
    # Here launches run one after the other, so dependent launches need no waiting.
    "griddepcontrol.launch_dependents": nothing,
    "griddepcontrol.wait": nothing,
}
