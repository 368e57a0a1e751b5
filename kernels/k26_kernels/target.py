"""Describe the kinds of GPU that the kernels are written for, and find out which kind a device is."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import torch
import triton

from k26_kernels.unpack import INTERPRETED

# Before version 3.8 Triton lets a program write the next weights into registers that an instruction of sm_90 (wgmma)
# still reads (triton issue 9433): the program waits until the last but one group of these instructions has ended, and
# the last group may still run.
OVERWRITES_WEIGHTS = tuple(int(part) for part in triton.__version__.split(".")[:2]) < (3, 8)


@dataclass(frozen=True, slots=True)
class Target:
    """A kind of GPU.

    `fragment` names the weights' layout for it. `shared_memory` is the bytes of shared memory that one program may use,
    `shared_memory_per_sm` the bytes that an SM (on AMD a compute unit) has for all its programs.
    """

    name: str
    fragment: str
    shared_memory: int
    shared_memory_per_sm: int
    amd: bool = False

    @property
    def options(self) -> dict[str, int]:
        """Compiler options beside a config's own; on AMD, the matrix instruction that the layout is made for.

        The fusion of multiply and add is set explicitly because Triton's default changes between versions.
        """
        return {"enable_fp_fusion": True, **({"matrix_instr_nonkdim": 16} if self.amd else {})}

    @property
    def dependent(self) -> bool:
        """Whether a launch can begin while the one before it ends (`dependent.py`)."""
        return self.name in ("sm_90", "sm_100", "sm_120") and not INTERPRETED.value

    @property
    def waits(self) -> bool:
        """Whether a kernel must let its matrix instructions end before the weights change, which makes it slower."""
        return self.name == "sm_90" and OVERWRITES_WEIGHTS


# Shared memory is that of the family's smallest member: sm_86 and sm_89 have less than sm_80.
TARGETS = {
    target.name: target
    for target in (
        Target("sm_80", "mma", 101376, 102400),
        Target("sm_90", "wgmma", 232448, 233472),
        Target("sm_100", "tmem", 232448, 233472),
        Target("sm_120", "mma", 101376, 102400),
        Target("gfx942", "mfma", 65536, 65536, amd=True),
        Target("gfx950", "mfma32", 163840, 163840, amd=True),
    )
}
TENSOR_COLUMNS = 512  # columns of tensor memory in an SM of sm_100
_BY_MAJOR = {8: "sm_80", 9: "sm_90", 10: "sm_100", 12: "sm_120"}


@dataclass(frozen=True, slots=True)
class Device:
    """The properties of a device that launches depend on."""

    target: Target
    name: str
    num_sms: int
    shared_memory_per_sm: int = 0
    """Bytes of shared memory; 0 if the target's value holds."""

    def programs_per_sm(self, threads: int, registers: int, shared: int, columns: int = 0) -> int:
        """Return how many programs an SM holds at a time, at least one.

        threads: of a program. registers: of a thread. shared: a program's bytes of shared memory. columns: a program's
        columns of tensor memory, on a GPU that has tensor memory. The threads of an SM are not counted, because they
        run out later than its registers: a thread of the GEMMs has more than 42 registers.
        """
        # Registers are allocated eight at a time, and AMD has twice as many. NVIDIA keeps 1 KB of shared memory for
        # each program.
        amd = self.target.amd
        limits = [
            (131072 if amd else 65536) // (threads * -(-registers // 8) * 8),
            (self.shared_memory_per_sm or self.target.shared_memory_per_sm) // max(1, shared + (0 if amd else 1024)),
        ]
        if columns:
            limits.append(TENSOR_COLUMNS // columns)
        return max(1, min(limits))


@cache
def device_of(device: torch.device) -> Device:
    """Return a device's properties. Under Triton's interpreter a CPU counts as a small sm_90.

    Raises ValueError for a device that no target fits.
    """
    if device.type == "cpu" and INTERPRETED:
        return Device(TARGETS["sm_90"], "interpreter", 4)
    if device.type != "cuda":
        raise ValueError(f"the Triton kernels run on CUDA and ROCm GPUs, not on {device.type}.")
    properties = torch.cuda.get_device_properties(device)
    if torch.version.hip:
        found = properties.gcnArchName.split(":")[0]
        target = TARGETS.get(found)
    else:
        found = f"sm_{properties.major}{properties.minor}"
        target = TARGETS.get(_BY_MAJOR.get(properties.major, ""))
    if target is None:
        raise ValueError(
            f"the Triton kernels have no layout for {properties.name} ({found}), only for {', '.join(TARGETS)}."
        )
    # Not every torch has this property. On AMD all GPUs of a target have the same shared memory.
    memory = 0 if torch.version.hip else getattr(properties, "shared_memory_per_multiprocessor", 0)
    return Device(target, properties.name, properties.multi_processor_count, memory)
