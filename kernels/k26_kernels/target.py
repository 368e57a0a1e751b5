"""The kinds of GPU that the kernels are written for, and which one a device is."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import torch
import triton

from k26_kernels.unpack import INTERPRETED

# Before 3.8 Triton lets a program write the next weights into registers that an instruction of sm_90 (wgmma) still reads
# (triton issue 9433): its wait for the last but one group of them says nothing of the last.
OVERWRITES_WEIGHTS = tuple(int(part) for part in triton.__version__.split(".")[:2]) < (3, 8)


@dataclass(frozen=True, slots=True)
class Target:
    """A kind of GPU. `fragment` names the weights' layout for it. Bytes of shared memory: what one program may use, and
    what an SM (on AMD a compute unit) has for all of them."""

    name: str
    fragment: str
    shared_memory: int
    shared_memory_per_sm: int
    amd: bool = False

    @property
    def options(self) -> dict[str, int]:
        """Compiler options beside a config's own: on AMD, the instruction that the layout is made for.

        Fused multiply and add is said aloud because Triton's default changes between versions.
        """
        return {"enable_fp_fusion": True, **({"matrix_instr_nonkdim": 16} if self.amd else {})}

    @property
    def dependent(self) -> bool:
        """Whether a launch can begin while the one before it ends (`dependent.py`)."""
        return self.name in ("sm_90", "sm_100", "sm_120") and not INTERPRETED.value

    @property
    def waits(self) -> bool:
        """Whether a kernel has to let its matrix instructions end before the weights change: slower, and right."""
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
TENSOR_COLUMNS = 512  # of an SM of sm_100
_BY_MAJOR = {8: "sm_80", 9: "sm_90", 10: "sm_100", 12: "sm_120"}


@dataclass(frozen=True, slots=True)
class Device:
    """What a launch needs to know of a device."""

    target: Target
    name: str
    num_sms: int
    shared_memory_per_sm: int = 0
    """Bytes of shared memory; 0 for the target's."""

    def programs_per_sm(self, threads: int, registers: int, shared: int, columns: int = 0) -> int:
        """How many programs an SM holds at a time, at least one.

        registers: of a thread. shared: bytes of shared memory, columns: of tensor memory, where there is such. Threads run
        out later than registers, of which the GEMMs have more than 42 each.
        """
        # Registers are given out eight at a time; on AMD there are twice as many. NVIDIA keeps 1 KB for each program.
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
    """Raises ValueError for a device that no target fits. Under the interpreter a CPU passes for a small sm_90."""
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
    # Not in every torch; a target of AMD is one size of it.
    memory = 0 if torch.version.hip else getattr(properties, "shared_memory_per_multiprocessor", 0)
    return Device(target, properties.name, properties.multi_processor_count, memory)
