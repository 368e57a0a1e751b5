"""Compiles Triton kernels for an NVIDIA GPU and runs their PTX in the interpreter."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import triton
from support.ptx.machine import Machine
from support.ptx.memory import Global
from support.ptx.operations import OPERATIONS
from support.ptx.text import Kernel, parse
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

POINTER = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32", torch.int32: "i32", torch.int64: "i64"}


class Emulated:
    """A stand-in for a kernel of `triton.jit`: `kernel[grid](…)` compiles for `capability` and runs on CPU tensors.

    capability: the compute capability, such as 90. edit: changes the PTX before it runs, to test what the checks
    notice.
    """

    def __init__(self, kernel: Any, capability: int, edit: Callable[[str], str] | None = None) -> None:
        self.kernel = kernel
        self.capability = capability
        self.edit = edit
        self.compiled: dict[Any, tuple[Kernel, int]] = {}
        self.launches = 0
        self.conflicts = 0
        """How many bank conflicts all launches together had in shared memory."""

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        return lambda *arguments, **options: self.launch(grid, arguments, options)

    def launch(self, grid: tuple[int, ...], arguments: tuple[Any, ...], options: dict[str, Any]) -> None:
        """Compile the kernel for these arguments, unless it is already, and run the grid's programs one after
        another."""
        names = self.kernel.arg_names
        values = dict(zip(names, arguments, strict=False)) | {k: v for k, v in options.items() if k in names}
        options = {name: value for name, value in options.items() if name not in names}
        constants = {p.name: values[p.name] for p in self.kernel.params if p.is_constexpr}
        given = [values[name] for name in names if name not in constants]
        kernel, shared = self.compile(names, constants, given, options)
        parameters: dict[str, Any] = dict.fromkeys(
            kernel.parameters, np.uint64(0)
        )  # the last are Triton's own scratch: none
        for name, value in zip(kernel.parameters, given, strict=False):
            parameters[name] = number(value)
        memory = Global([value for value in given if isinstance(value, torch.Tensor)])
        self.launches += 1
        with np.errstate(over="ignore", invalid="ignore"):
            for z in range(grid[2] if len(grid) > 2 else 1):
                for y in range(grid[1] if len(grid) > 1 else 1):
                    for x in range(grid[0]):
                        machine = Machine(kernel, parameters, memory, shared, (x, y, z), grid)
                        machine.run(OPERATIONS)
                        self.conflicts += machine.shared.conflicts

    def compile(
        self, names: list[str], constants: dict[str, Any], given: list[Any], options: dict[str, Any]
    ) -> tuple[Kernel, int]:
        """Return the parsed kernel and the bytes of its shared memory. given: the arguments that are not constants."""
        kinds = [kind_of(value) for value in given]
        key = (*sorted(constants.items(), key=str), *kinds, *sorted(options.items()))
        if key not in self.compiled:
            signature = dict(zip((name for name in names if name not in constants), kinds, strict=True))
            aligned = {(index,): [["tt.divisibility", 16]] for index, kind in enumerate(kinds) if kind[0] == "*"}
            source = ASTSource(self.kernel, signature=signature, constexprs=constants, attrs=aligned)
            binary = triton.compile(source, target=GPUTarget("cuda", self.capability, 32), options=options)
            ptx = binary.asm["ptx"]
            self.compiled[key] = parse(ptx if self.edit is None else self.edit(ptx)), binary.metadata.shared
        return self.compiled[key]


def kind_of(value: Any) -> str:
    if isinstance(value, torch.Tensor):
        return f"*{POINTER[value.dtype]}"
    return "fp32" if isinstance(value, float) else "i32"


def number(value: Any) -> np.generic:
    if isinstance(value, torch.Tensor):
        return np.uint64(value.data_ptr())
    return np.float32(value) if isinstance(value, float) else np.int32(value)
