"""Fixtures for the tests of the PTX interpreter (support/ptx), which need neither Triton nor the kernels.

The tests compute what an instruction has to give from the PTX ISA's own definition: in Python's integers and fractions,
by torch's conversions, or by hand.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from support.ptx.machine import JUMPS, Machine
from support.ptx.memory import Global
from support.ptx.operations import OPERATIONS
from support.ptx.text import parse

Run = Callable[..., Machine]


class Noting(dict[str, Any]):
    """The interpreter's table of operations, which notes the opcodes that are looked up in it."""

    def __init__(self) -> None:
        super().__init__(OPERATIONS)
        self.used: set[str] = set()

    def get(self, opcode: str, default: Any = None) -> Any:
        self.used.add(opcode)
        return super().get(opcode, default)


@pytest.fixture
def run(request: pytest.FixtureRequest) -> Iterator[Run]:
    """Yield `run(text, {"%r1": values})`, which runs PTX on one block with a thread for each value and returns its
    machine.

    Its argument `shared` is the contents of shared memory or only their number of bytes.

    The instruction that a test has in its parameter `opcode` must be among those that ran.
    """
    table = Noting()

    def go(
        text: str,
        registers: Mapping[str, Sequence[Any] | np.ndarray[Any, Any]] | None = None,
        *,
        threads: int = 32,
        shared: int | np.ndarray[Any, Any] = 0,
        tensors: Sequence[torch.Tensor] = (),
        parameters: Mapping[str, Any] | None = None,
        place: tuple[int, ...] = (0, 0, 0),
        programs: tuple[int, ...] = (1, 1, 1),
    ) -> Machine:
        registers = registers or {}
        threads = len(next(iter(registers.values()))) if registers else threads
        head = f".visible .entry kernel(\n)\n.reqntid {threads}\n"
        kernel = parse(f"{head}{{\n{text}\n$L__func_end0:\n}}\n")
        size = shared if isinstance(shared, int) else len(shared)
        machine = Machine(kernel, dict(parameters or {}), Global(list(tensors)), size, place, programs)
        if not isinstance(shared, int):
            machine.shared.data[:] = shared
        for name, values in registers.items():
            kind = np.dtype(machine.type_of(name))
            if kind.kind == "u":
                values = [int(value) % (1 << 8 * kind.itemsize) for value in values]
            machine.registers[name] = np.array(values, kind)
        table.used |= {one.opcode for one in kernel.instructions if one.opcode in JUMPS}
        with np.errstate(over="ignore", invalid="ignore"):
            machine.run(table)
        return machine

    yield go
    callspec = getattr(request.node, "callspec", None)
    if callspec and "opcode" in callspec.params:
        assert callspec.params["opcode"] in table.used
