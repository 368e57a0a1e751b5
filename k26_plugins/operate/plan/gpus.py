"""GPUs of the last three generations: the memory that the driver shows and the bandwidth that the vendor publishes.

Memory is what `nvidia-smi` or `amd-smi` shows as total, in MiB, read from its published output. Where no such output was
found it is the data sheet's size in decimal GB, which is less than a driver shows. Bandwidth is the data sheet's, in GB/s.
"""

from __future__ import annotations

from dataclasses import dataclass

MIB = 2**20
GIB = 2**30
DRIVER, DATA_SHEET = "driver", "data sheet"


@dataclass(frozen=True, slots=True)
class Gpu:
    name: str
    memory: int
    """Bytes in all, as the driver shows them."""
    bandwidth: float | None
    """Bytes a second of its memory, as published; None where only the memory is known."""
    vendor: str = "nvidia"
    source: str = DRIVER
    """Where the memory is from."""


def _nvidia(name: str, mebibytes: int, gigabytes_per_second: int) -> Gpu:
    return Gpu(name, mebibytes * MIB, gigabytes_per_second * 1e9)


def _sheet(name: str, gigabytes: int, gigabytes_per_second: int, vendor: str = "nvidia") -> Gpu:
    return Gpu(name, gigabytes * 10**9, gigabytes_per_second * 1e9, vendor, DATA_SHEET)


def _amd(name: str, mebibytes: int, gigabytes_per_second: int) -> Gpu:
    return Gpu(name, mebibytes * MIB, gigabytes_per_second * 1e9, "amd")


GPUS = (
    # Ampere
    _nvidia("RTX3090", 24576, 936),
    _nvidia("A10", 23028, 600),
    _nvidia("A40", 46068, 696),
    _nvidia("A6000", 49140, 768),
    _nvidia("A10040GB", 40960, 1555),
    _nvidia("A100", 81920, 2039),
    _nvidia("A800", 81920, 2039),
    # Ada
    _nvidia("RTX4090", 24564, 1008),
    _nvidia("L4", 23034, 300),
    _nvidia("L20", 46068, 864),
    _nvidia("L40", 46068, 864),
    _nvidia("L40S", 46068, 864),
    _nvidia("RTX6000ADA", 49140, 960),
    # Hopper
    _nvidia("H100", 81559, 3350),
    _nvidia("H100PCIE", 81559, 2000),
    _nvidia("H100NVL", 95830, 3900),
    _nvidia("H800", 81559, 3350),
    _nvidia("H20", 97871, 4000),
    _nvidia("H203E", 143771, 4800),
    _nvidia("H200", 143771, 4800),
    _nvidia("H200NVL", 143771, 4800),
    _nvidia("GH200", 97871, 4000),
    _nvidia("GH200144GB", 145920, 4900),
    # Blackwell
    _nvidia("RTX5090", 32607, 1792),
    _sheet("RTXPRO5000", 48, 1344),
    _nvidia("RTXPRO6000", 97887, 1792),
    _nvidia("B200", 183359, 8000),
    _nvidia("GB200", 189471, 8000),
    _nvidia("B300", 275040, 8000),
    _nvidia("GB300", 284208, 8000),
    _sheet("GB10", 128, 273),
    # CDNA 2, 3 and 4, RDNA 3 and 4
    _sheet("MI210", 64, 1638, "amd"),
    _sheet("MI250X", 64, 1638, "amd"),
    _sheet("MI300A", 128, 5300, "amd"),
    _amd("MI300X", 196592, 5300),
    _amd("MI308X", 196592, 5300),
    _amd("MI325X", 262144, 6000),
    _sheet("MI350X", 288, 8000, "amd"),
    _amd("MI355X", 294912, 8000),
    _sheet("W7900", 48, 864, "amd"),
    _sheet("R9700", 32, 640, "amd"),
)
# A GCD of MI250X is a GPU of its own to every program.
KNOWN = {gpu.name: gpu for gpu in GPUS}
ALIASES = {
    "3090": "RTX3090",
    "4090": "RTX4090",
    "5090": "RTX5090",
    "RTXA6000": "A6000",
    "6000ADA": "RTX6000ADA",
    "PRO6000": "RTXPRO6000",
    "RTX6000PRO": "RTXPRO6000",
    "PRO5000": "RTXPRO5000",
    # The driver's name, which states the memory of the CPU.
    "GH200480GB": "GH200",
    "GH200120GB": "GH200",
    "H20E": "H203E",
    "H20141GB": "H203E",
    "DGXSPARK": "GB10",
}
