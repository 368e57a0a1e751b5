"""Launches that begin while the one before them ends, on NVIDIA's GPUs from sm_90 on: programmatic dependent launch.

What a launch costs before its first instruction is then beside the end of the launch before it. Source: CUDA's
programming guide, "Programmatic Dependent Launch and Synchronization"; PTX's `griddepcontrol`.
"""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait


@triton.jit
def after_previous(DEPENDENT: tl.constexpr) -> None:
    """Stands at the head of every kernel, before it reads or writes anything.

    The next launch may begin once all programs of this one are here; it comes no further than here until this one has
    ended and what it wrote can be seen. So each launch waits for all before it, since each has waited itself.
    """
    if DEPENDENT:
        gdc_launch_dependents()
        gdc_wait()


def launch_options(dependent: bool) -> dict[str, Any]:
    """Arguments of a launch of a kernel that calls `after_previous`. No compiler but NVIDIA's knows the option."""
    return {"DEPENDENT": dependent, **({"launch_pdl": True} if dependent else {})}
