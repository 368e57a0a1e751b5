"""The machine that is planned for: given by the user, or this one."""

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
    gpu: Gpu
    count: int
    ram: int | None = None
    """Bytes of system memory."""
    ram_bandwidth: float | None = None
    """Bytes a second."""
    cores: int
    sockets: int
    request: str
    """The GPUs as `--gpus` takes them."""


def this_machine() -> Machine | None:
    """This machine, None where it has no GPU. Raises AcceleratorError."""
    found = accelerators()
    if not found:
        return None
    smallest = min(found, key=lambda item: item.memory)
    known = named(smallest.name) or Gpu(smallest.name, smallest.memory, None, link="", vendor=smallest.vendor)
    # What the driver shows of this very GPU, whatever is known of its kind.
    gpu = replace(known, memory=smallest.memory)
    request = f"{len(found)}x{smallest.memory / GIB:.1f}"
    return Machine(
        gpu=gpu, count=len(found), ram=total_bytes(), cores=own_cores(), sockets=own_sockets(), request=request
    )


def machine_of(
    gpus: str | None, ram: float | None, bandwidth: float | None, cores: int | None, sockets: int | None
) -> Machine:
    """What the options say; this machine for those that are left out. ram: GB. bandwidth: GB/s.

    Raises HardwareError, AcceleratorError.
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
    """Physical cores that this process may keep busy."""
    return min(len(cores()), usable_cpus())


def own_sockets() -> int:
    """NUMA nodes with a CPU of this process."""
    allowed = os.sched_getaffinity(0)
    with_cpus = {node.parent.name for cpu in allowed for node in NODES.glob(f"node[0-9]*/cpu{cpu}")}
    return max(len(with_cpus), 1)
