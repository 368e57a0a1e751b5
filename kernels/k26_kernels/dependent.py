"""Let a launch begin while the one before it ends, on NVIDIA's GPUs from sm_90 on: programmatic dependent launch.

The cost of a launch before its first instruction then overlaps with the end of the launch before it. The sources are
CUDA's programming guide, "Programmatic Dependent Launch and Synchronization", and PTX's `griddepcontrol`.
"""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait


@triton.jit
def after_previous(DEPENDENT: tl.constexpr) -> None:
    """Wait until the launch before has ended; every kernel calls this before it reads or writes anything.

    The next launch may begin once all programs of this launch are here. It waits here until this launch has ended and
    its writes can be seen. So each launch waits for all launches before it, since each of them has waited itself.
    """
    if DEPENDENT:
        gdc_launch_dependents()
        gdc_wait()


def launch_options(dependent: bool) -> dict[str, Any]:
    """Return the arguments for launching a kernel that calls `after_previous`.

    `launch_pdl` is left out where it is not needed, because only the compiler for NVIDIA's GPUs knows this option.
    """
    return {"DEPENDENT": dependent, **({"launch_pdl": True} if dependent else {})}
