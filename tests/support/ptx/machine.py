"""Runs one program of a kernel: holds its registers and its threads' positions, and loops over its instructions."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np
from support.ptx.memory import Global, PtxError, Shared
from support.ptx.text import Address, Instruction, Kernel, Operand

Lanes = np.ndarray[Any, np.dtype[Any]]
Mask = np.ndarray[Any, np.dtype[np.bool_]]

WARP = 32
REGISTER_TYPES = {"%p": np.bool_, "%rs": np.uint16, "%r": np.uint32, "%rd": np.uint64}
DECLARED_TYPES = {".pred": np.bool_, ".b16": np.uint16, ".b32": np.uint32, ".b64": np.uint64}


JUMPS = ("bra", "bra.uni", "ret")
BARRIERS = ("bar.sync", "barrier.sync")


class NotYetError(Exception):
    """The instruction must wait for something that other threads have not done yet."""


class Machine:
    """One program of a kernel. Its threads go in step; after they diverge, those that are furthest behind go first."""

    def __init__(
        self,
        kernel: Kernel,
        parameters: dict[str, Any],
        memory: Global,
        shared_bytes: int,
        place: tuple[int, ...],
        programs: tuple[int, ...],
    ) -> None:
        self.kernel = kernel
        self.parameters = parameters
        self.threads = kernel.threads
        self.memory = memory
        self.shared = Shared(shared_bytes)
        self.registers: dict[str, Lanes] = {}
        self.owned: Counter[str] = Counter()
        """The registers that matrix instructions still work on, and for each how many such instructions."""
        self.products: list[list[Callable[[], None]]] = [[]]
        """The matrix instructions under way, in groups, of which the last is still open."""
        self.copies: list[tuple[Lanes, Lanes, Callable[[Mask], None]]] = []
        """The copies under way: the threads, each thread's group, and a function that completes some threads' parts."""
        self.committed = np.zeros(kernel.threads, np.int64)
        """How many groups of copies each thread has closed."""
        self.tensor_memory: object = None
        """The tensor memory, which only sm_100 has; it is made when it is first touched."""
        lane = np.arange(self.threads, dtype=np.uint32)
        self.lane = lane
        self.everyone = np.ones(self.threads, np.bool_)
        self.special = {
            "%tid.x": lane,
            "%laneid": lane % WARP,
            "global_smem": 0,
            **{f"%ctaid.{axis}": number for axis, number in zip("xyz", place, strict=False)},
            **{f"%nctaid.{axis}": number for axis, number in zip("xyz", programs, strict=False)},
        }
        self.at = np.zeros(self.threads, np.int64)
        """The index of each thread's next instruction, while the threads are not all at the same one."""
        self.waiting = np.zeros(self.threads, np.bool_)
        self.progress = False
        self.instruction: Instruction = kernel.instructions[0]

    def type_of(self, name: str) -> type[np.generic]:
        """Return the type of a register, declared or by its prefix."""
        if name in self.kernel.registers:
            return DECLARED_TYPES[self.kernel.registers[name]]
        return REGISTER_TYPES[name.rstrip("0123456789")]

    def read(self, operand: Operand, kind: Any) -> Any:
        """Return an operand's value as the numpy type `kind`: an array over the threads, or a scalar.

        Raises PtxError if the operand is a register that has not been written or that a matrix instruction owns.
        """
        assert isinstance(operand, str), operand
        kind = np.dtype(kind)
        if operand[0].isdigit() or operand[0] == "-":
            return immediate(operand, kind)
        if operand in self.special:
            return np.asarray(self.special[operand]).astype(kind)
        if self.owned[operand]:
            raise PtxError(f"{operand} is read while a matrix instruction owns it: {self.instruction.text}")
        value = self.registers.get(operand)
        if value is None:
            raise PtxError(f"{operand} is read before it is written: {self.instruction.text}")
        if value.dtype.itemsize == kind.itemsize or value.dtype == np.bool_:
            return value.view(kind)
        # A register may be wider than the part that the instruction reads.
        return value.astype(f"u{kind.itemsize}").view(kind)

    def lanes(self, operand: Operand, kind: Any) -> Lanes:
        """Return an operand's value for each thread, even if it is the same for all."""
        return np.broadcast_to(self.read(operand, kind), self.threads)

    def write(self, name: Operand, value: Any, mask: Mask) -> None:
        """Write a register for the threads in `mask`. Raises PtxError if a matrix instruction owns the register."""
        assert isinstance(name, str), name
        if name == "_":
            return
        if self.owned[name]:
            raise PtxError(f"{name} is written while a matrix instruction owns it: {self.instruction.text}")
        kind = np.dtype(self.type_of(name))
        value = np.asarray(value)
        if value.dtype.itemsize != kind.itemsize:
            # A narrow result is extended: by its sign if its type is signed, otherwise by zeros.
            value = value.astype(np.int64 if value.dtype.kind == "i" else np.uint64).astype(kind)
        value = value.view(kind)
        if mask is not self.everyone and not mask.all():
            old = self.registers.get(name)
            value = np.where(mask, value, np.zeros(1, kind) if old is None else old)
        elif value.shape != self.lane.shape:
            value = np.full(self.threads, value)
        self.registers[name] = value

    def addresses(self, operand: Operand) -> Lanes:
        """Return the address that each thread computes for a memory operand."""
        assert isinstance(operand, Address), operand
        wide = self.read(operand.base, self.type_of(operand.base) if operand.base[0] == "%" else np.uint32)
        return np.broadcast_to(wide.astype(np.int64) + operand.offset, self.threads)

    def run(self, operations: dict[str, Callable[[Machine, Instruction, Mask], None]]) -> None:
        """Run the program to its end. Raises PtxError if it breaks a rule or has an instruction not in `operations`."""
        instructions = self.kernel.instructions
        end, place = len(instructions), 0
        together = True
        while True:
            active = self.everyone
            if not together:
                chosen = self.next_threads(end)
                if chosen is None:
                    return
                place, active = chosen
                together = bool(active.all())
            if place >= end:
                return
            instruction = self.instruction = instructions[place]
            mask = active
            if instruction.predicate is not None:
                mask = active & (self.read(instruction.predicate, np.bool_) ^ instruction.negated)
            if instruction.opcode in JUMPS:
                target = end if instruction.target is None else instruction.target
                if together and (mask.all() or not mask.any()):
                    place = target if mask.any() else place + 1
                    continue
                together = False
                self.at[active] = place + 1
                self.at[mask] = target
                continue
            if instruction.opcode in BARRIERS and mask.any():
                if (mask != active).any():
                    raise PtxError(f"a barrier that some threads do not reach: {instruction.text}")
                if not together:
                    self.waiting |= active
                    continue
            operation = operations.get(instruction.opcode)
            if operation is None:
                raise PtxError(f"the interpreter does not know {instruction.text}")
            try:
                if mask.any():
                    operation(self, instruction, mask)
            except NotYetError:
                if together:
                    raise PtxError(f"nothing will ever end this wait: {instruction.text}") from None
                self.waiting |= active
                continue
            self.progress = True
            place += 1
            if not together:
                self.at[active] = place

    def next_threads(self, end: int) -> tuple[int, Mask] | None:
        """Return the instruction and the threads that go on while the threads are at different instructions.

        These threads are the ones furthest behind among those that do not wait. Returns None if all threads have ended.
        """
        ready = ~self.waiting & (self.at < end)
        if ready.any():
            place = int(self.at[ready].min())
            return place, ready & (self.at == place)
        if not self.waiting.any():
            return None
        at_barrier = {
            place for place in np.unique(self.at[self.waiting]) if self.instruction_at(place).opcode in BARRIERS
        }
        if len(at_barrier) == len(np.unique(self.at[self.waiting])):
            if len(at_barrier) == 1 and self.waiting.all():
                self.waiting[:] = False
                return at_barrier.pop(), self.everyone
            raise PtxError(f"a barrier that some threads do not reach: {self.instruction_at(at_barrier.pop()).text}")
        if not self.progress:
            raise PtxError(f"nothing will ever end this wait: {self.instruction.text}")
        self.progress = False
        self.waiting &= np.isin(self.at, list(at_barrier))
        return self.next_threads(end)

    def instruction_at(self, place: Any) -> Instruction:
        return self.kernel.instructions[int(place)]


def need_everyone(instruction: Instruction, mask: Mask) -> None:
    if not mask.all():
        raise PtxError(f"an instruction of whole warps that some threads do not reach: {instruction.text}")


def need_whole_warps(instruction: Instruction, mask: Mask) -> None:
    warps = mask.reshape(-1, WARP)
    if (warps.any(axis=1) != warps.all(axis=1)).any():
        raise PtxError(f"the interpreter knows whole warps only: {instruction.text}")


@cache
def immediate(text: str, kind: np.dtype[Any]) -> Any:
    if text.startswith(("0f", "0F")):
        return np.uint32(int(text[2:], 16)).view(np.float32)
    if kind == np.bool_:
        return np.bool_(int(text, 0) != 0)
    value = int(text.rstrip("U"), 0) % (1 << 8 * kind.itemsize)
    return np.array(value, f"u{kind.itemsize}").view(kind)[()]
