"""Describe the machine that `k26 plan` plans for: the one that the user gives, or this one."""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from pathlib import Path

from k26_plugins.common.host.control_groups import usable_cpus
from k26_plugins.common.host.cores import cores
from k26_plugins.common.host.memory import total_bytes
from k26_plugins.operate.accelerators import accelerators
from k26_plugins.operate.plan.gpus import GIB, Gpu
from k26_plugins.operate.plan.hardware import HardwareError, named, parse

NODES = Path("/sys/devices/system/node")


@dataclass(frozen=True, slots=True, kw_only=True)
class Machine:
    """The GPUs that are planned for, and the system memory and cores of the machine that holds them."""

    gpu: Gpu
    count: int
    """Number of GPUs, all of the kind `gpu`."""
    ram: int | None = None
    """Bytes of system memory; None if they are not known."""
    ram_bandwidth: float | None = None
    """Bytes per second of system memory; None if they are not known."""
    cores: int
    """Physical cores."""
    sockets: int
    """NUMA nodes."""
    request: str
    """The GPUs in the form that `--gpus` takes."""


def this_machine() -> Machine | None:
    """Return this machine, or None if it has no GPU; GPUs of several kinds all count as the one with the least memory.

    Raises AcceleratorError if a GPU is present and cannot be queried.
    """
    found = accelerators()
    if not found:
        return None
    smallest = min(found, key=lambda item: item.memory)
    known = named(smallest.name) or Gpu(smallest.name, smallest.memory, None, link="", vendor=smallest.vendor)
    # The memory that the driver reports for this GPU counts, not the one in the table of known GPUs.
    gpu = replace(known, memory=smallest.memory)
    request = f"{len(found)}x{smallest.memory / GIB:.1f}"
    return Machine(
        gpu=gpu, count=len(found), ram=total_bytes(), cores=own_cores(), sockets=own_sockets(), request=request
    )


def machine_of(
    gpus: str | None, ram: float | None, bandwidth: float | None, cores: int | None, sockets: int | None
) -> Machine:
    """Return the machine that the options of `k26 plan` describe, with this machine's values for options left out.

    This machine's system memory is used only if `gpus` is left out too; its memory bandwidth is never known. ram: GB.
    bandwidth: GB/s. Raises HardwareError if the GPUs are unknown or missing, and AcceleratorError if this machine's
    GPUs cannot be queried.
    """
    if gpus is None:
        own = this_machine()
        if own is None:
            raise HardwareError("this machine has no GPU: give those to plan for, such as --gpus 8xH200.")
        machine = own
    else:
        count, gpu = parse(gpus)
        machine = Machine(gpu=gpu, count=count, cores=own_cores(), sockets=own_sockets(), request=gpus)
    return replace(
        machine,
        ram=machine.ram if ram is None else int(ram * 1e9),
        ram_bandwidth=None if bandwidth is None else bandwidth * 1e9,
        cores=cores or machine.cores,
        sockets=sockets or machine.sockets,
    )


def own_cores() -> int:
    """Return the number of physical cores that this process may keep busy."""
    return min(len(cores()), usable_cpus())


def own_sockets() -> int:
    """Return the number of NUMA nodes that have a CPU on which this process may run; at least 1."""
    allowed = os.sched_getaffinity(0)
    with_cpus = {node.parent.name for cpu in allowed for node in NODES.glob(f"node[0-9]*/cpu{cpu}")}
    return max(len(with_cpus), 1)
