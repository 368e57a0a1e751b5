"""Loads and stores, copies that run beside the program, and barriers."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from support.ptx.machine import WARP, Machine, Mask, PtxError
from support.ptx.text import Address, Instruction, Operand


def widths(instruction: Instruction) -> tuple[int, int]:
    """Elements of an access, and the bytes of each."""
    elements = next((int(part[1:]) for part in instruction.modifiers if part[0] == "v" and part[1:].isdigit()), 1)
    return elements, int(instruction.modifiers[-1].lstrip("subf")) // 8


def names(operand: Operand) -> tuple[str, ...]:
    assert not isinstance(operand, Address)
    return operand if isinstance(operand, tuple) else (operand,)


def is_shared(instruction: Instruction) -> bool:
    return any(part.startswith("shared") for part in instruction.modifiers)


def load(machine: Machine, instruction: Instruction, mask: Mask) -> None:
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
    if not is_shared(instruction) or "add" not in instruction.modifiers or instruction.modifiers[-1] != "u32":
        raise PtxError(f"the interpreter does not know {instruction.text}")
    target, address, value = instruction.operands
    places = machine.shared.offsets(machine.addresses(address)[mask], 4)
    counters = machine.shared.data.view(np.uint32)
    old = np.zeros(machine.threads, np.uint32)
    amounts = machine.lanes(value, np.uint32)[mask]
    seen = []
    for place, amount in zip(places[:, 0] // 4, amounts, strict=True):
        seen.append(counters[place])
        counters[place] += amount
    old[mask] = seen
    # Atomics need no barrier among one another, but whatever else touches the place does.
    machine.shared.written[places] = machine.shared.epoch
    machine.shared.writer[places] = machine.shared.MANY
    machine.write(target, old, mask)


def copy(machine: Machine, instruction: Instruction, mask: Mask) -> None:
    """`cp.async` and its groups: the bytes arrive when a wait asks for them, not before."""
    if "commit_group" in instruction.modifiers:
        machine.pending["copy"].append([])
        return
    if "wait_group" in instruction.modifiers:
        machine.wait("copy", int(machine.read(instruction.operands[0], np.uint32)))
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

    def arrive() -> None:
        data = np.zeros((len(to), width), np.uint8)
        whole = count == width
        if not (whole | (count == 0)).all():
            raise PtxError(f"the interpreter knows whole copies only: {instruction.text}")
        if whole.any():
            data[whole] = machine.memory.load(origin[whole], width)
        machine.shared.store(to, data, warps)

    machine.pending["copy"][-1].append(arrive)


def barrier(machine: Machine, instruction: Instruction, mask: Mask) -> None:
    """All threads are here."""
    machine.shared.barrier()


def nothing(machine: Machine, instruction: Instruction, mask: Mask) -> None:
    """Does nothing: threads in step keep the order by themselves, and advice to a cache has none to go to."""


OPERATIONS: dict[str, Callable[[Machine, Instruction, Mask], None]] = {
    "ld": load,
    "st": store,
    "atom": atomic,
    "cp": copy,
    "bar": barrier,
    "barrier": barrier,
    "fence": nothing,
    "createpolicy": nothing,
    # Launches come one after the other here.
    "griddepcontrol": nothing,
}
