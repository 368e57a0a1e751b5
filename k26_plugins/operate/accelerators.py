"""Find the GPUs of this machine, without an engine and without torch.

The drivers are queried in a process of its own, with a time limit, because a driver that hangs blocks every process
that queries it. `python -m` on this module is that process: it prints the GPUs as JSON.
"""

from __future__ import annotations

import ctypes
import json
import os
import shutil
import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

SECONDS = 30
NVML = "libnvidia-ml.so.1"
DEVICES = Path("/dev")
AMD_CARDS = Path("/sys/class/drm")
AMD_VENDOR = "0x1002"


class AcceleratorError(RuntimeError):
    """The error for a GPU that is present and cannot be queried. The message says which tool failed, and why."""


class Accelerator(NamedTuple):
    """One GPU, as its driver describes it."""

    name: str
    memory: int
    """Total bytes of GPU memory, as the driver reports them."""
    vendor: str
    """`nvidia` or `amd`."""
    driver: str
    """The driver's version; `amdgpu` for an AMD GPU."""


def accelerators() -> list[Accelerator]:
    """Return every GPU that this process may use; the list is empty if there is none.

    CUDA_VISIBLE_DEVICES restricts NVIDIA GPUs; HIP_VISIBLE_DEVICES or else ROCR_VISIBLE_DEVICES restricts AMD GPUs.
    Raises AcceleratorError if a GPU is present and its driver does not answer.
    """
    command = [sys.executable, "-m", __spec__.name]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=SECONDS)
    except subprocess.TimeoutExpired:
        raise AcceleratorError(
            f"the GPU's driver does not answer within {SECONDS} s: see `dmesg`, and restart the machine or the driver."
        ) from None
    lines = done.stdout.splitlines()
    if done.returncode or not lines:
        raise AcceleratorError((done.stderr.strip().splitlines() or ["the GPU's driver cannot be asked"])[-1])
    found = [Accelerator(*fields) for fields in json.loads(lines[-1])]
    return [item for vendor in ("nvidia", "amd") for item in _visible([g for g in found if g.vendor == vendor], vendor)]


def _visible(found: list[Accelerator], vendor: str) -> list[Accelerator]:
    names = ("CUDA_VISIBLE_DEVICES",) if vendor == "nvidia" else ("HIP_VISIBLE_DEVICES", "ROCR_VISIBLE_DEVICES")
    chosen = next((os.environ[name] for name in names if name in os.environ), None)
    if chosen is None:
        return found
    entries = [entry.strip() for entry in chosen.split(",") if entry.strip()]
    if all(entry.isdigit() for entry in entries):
        return [found[int(entry)] for entry in entries if int(entry) < len(found)]
    # The entries are UUIDs. Only the number of GPUs is kept: no caller needs to know which UUID is which GPU.
    return found[: len(entries)]


def nvidia() -> list[Accelerator]:
    """Return the NVIDIA GPUs that NVML, the driver's own library, lists, or `nvidia-smi` if the library is not found.

    Raises AcceleratorError if a GPU is present and cannot be queried.
    """
    try:
        nvml = ctypes.CDLL(NVML)
    except OSError:
        return _nvidia_smi()
    code = nvml.nvmlInit_v2()
    if code:
        nvml.nvmlErrorString.restype = ctypes.c_char_p
        said = nvml.nvmlErrorString(code).decode()
        if not _nvidia_devices():
            return []  # a machine or a container image that has the library but no GPU
        raise AcceleratorError(
            f"an NVIDIA GPU is there and its driver answers: {said}. After an update of the driver restart the machine; in "
            f"a container give it the host's driver (--gpus all)."
        )
    count, version = ctypes.c_uint(), ctypes.create_string_buffer(96)
    _check(nvml, nvml.nvmlDeviceGetCount_v2(ctypes.byref(count)))
    _check(nvml, nvml.nvmlSystemGetDriverVersion(version, len(version)))
    found = []
    for index in range(count.value):
        handle, name, memory = ctypes.c_void_p(), ctypes.create_string_buffer(96), (ctypes.c_ulonglong * 3)()
        _check(nvml, nvml.nvmlDeviceGetHandleByIndex_v2(index, ctypes.byref(handle)))
        _check(nvml, nvml.nvmlDeviceGetName(handle, name, len(name)))
        _check(nvml, nvml.nvmlDeviceGetMemoryInfo(handle, ctypes.byref(memory)))
        found.append(Accelerator(name.value.decode(), memory[0], "nvidia", version.value.decode()))
    return found


def _check(nvml: Any, code: int) -> None:
    if code:
        nvml.nvmlErrorString.restype = ctypes.c_char_p
        raise AcceleratorError(f"an NVIDIA GPU does not answer: {nvml.nvmlErrorString(code).decode()}.")


def _nvidia_smi() -> list[Accelerator]:
    tool = shutil.which("nvidia-smi")
    if tool is None:
        if _nvidia_devices():
            raise AcceleratorError(f"an NVIDIA GPU is there, and neither {NVML} nor nvidia-smi: install its driver.")
        return []
    query = [tool, "--query-gpu=name,memory.total,driver_version", "--format=csv,noheader,nounits"]
    done = subprocess.run(query, capture_output=True, text=True, check=False)
    if done.returncode:
        if "No devices were found" in done.stdout + done.stderr:
            return []
        said = " ".join((done.stdout + done.stderr).split()) or f"exit status {done.returncode}"
        raise AcceleratorError(f"nvidia-smi says: {said}")
    rows = [[field.strip() for field in line.split(",")] for line in done.stdout.splitlines() if line.strip()]
    return [Accelerator(name, int(float(memory)) * 2**20, "nvidia", driver) for name, memory, driver in rows]


def _nvidia_devices() -> bool:
    return any(DEVICES.glob("nvidia[0-9]*"))


def amd() -> list[Accelerator]:
    """Return the AMD GPUs from what the kernel's driver shows under /sys, so that ROCm is not needed."""
    found = []
    for card in sorted(AMD_CARDS.glob("card[0-9]*/device"), key=lambda path: path.parent.name):
        with suppress(OSError, ValueError):
            if (card / "vendor").read_text().strip() != AMD_VENDOR or not (card / "mem_info_vram_total").exists():
                continue
            product = card / "product_name"
            name = product.read_text().strip() if product.exists() else ""
            memory = int((card / "mem_info_vram_total").read_text())
            found.append(Accelerator(name or "AMD GPU", memory, "amd", "amdgpu"))
    # A GPU with less than 8 GiB is taken for one that only drives a screen.
    return [item for item in found if item.memory >= 8 * 2**30]


if __name__ == "__main__":
    try:
        print(json.dumps([*nvidia(), *amd()]))
    except AcceleratorError as error:
        sys.exit(str(error))
