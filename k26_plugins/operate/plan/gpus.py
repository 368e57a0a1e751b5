"""GPUs of the last three generations: the memory that the driver shows and the bandwidth that the vendor publishes.

Memory is what `nvidia-smi` or `amd-smi` shows as total, in MiB, read from its published output. Where no such output was
found it is the data sheet's size in decimal GB, which is less than a driver shows. Bandwidth is the data sheet's, in GB/s.
Each has a link to where the vendor publishes it; where no page of the vendor's was found, to the secondary source that is
named beside it.
"""

from __future__ import annotations

from dataclasses import dataclass

MIB = 2**20
GIB = 2**30
DRIVER, DATA_SHEET = "driver", "data sheet"

NVIDIA = "https://www.nvidia.com/en-us/"
NVIDIA_PDF = "https://www.nvidia.com/content/dam/en-zz/Solutions/"
GEFORCE = "https://images.nvidia.com/aem-dam/Solutions/geforce/"
DESIGN = f"{NVIDIA}design-visualization/desktop-graphics/"
AMD = "https://www.amd.com/en/products/"
# GPUs for one market, of which neither vendor keeps a page.
TOMS_HARDWARE = (
    "https://www.tomshardware.com/pc-components/gpus/new-nvidia-ai-gpus-designed-to-get-around-us-export-bans-come-to-china-"
    "h20-l20-and-l2-to-fill-void-left-by-restricted-models"
)
LLM_PROF = "https://github.com/citsjtu2020/LLM-Prof/blob/main/hardware_spec.md"
SECONDARY = {TOMS_HARDWARE: "Tom's Hardware", LLM_PROF: "citsjtu2020/LLM-Prof"}
A100 = f"{NVIDIA_PDF}Data-Center/a100/pdf/nvidia-a100-datasheet-us-nvidia-1758950-r4-web.pdf"
H100, H200 = f"{NVIDIA}data-center/h100/", f"{NVIDIA}data-center/h200/"
GH200 = f"{NVIDIA}data-center/grace-hopper-superchip/"
HGX = f"{NVIDIA}data-center/hgx/"


@dataclass(frozen=True, slots=True)
class Gpu:
    name: str
    memory: int
    """Bytes in all, as the driver shows them."""
    bandwidth: float | None
    """Bytes a second of its memory, as published; None where only the memory is known."""
    link: str
    """Where its figures are published; empty where the user gave the memory."""
    vendor: str = "nvidia"
    source: str = DRIVER
    """The source of `memory`."""


def _nvidia(name: str, mebibytes: int, gigabytes_per_second: int, link: str) -> Gpu:
    return Gpu(name, mebibytes * MIB, gigabytes_per_second * 1e9, link)


def _sheet(name: str, gigabytes: int, gigabytes_per_second: int, link: str, vendor: str = "nvidia") -> Gpu:
    return Gpu(name, gigabytes * 10**9, gigabytes_per_second * 1e9, link, vendor, DATA_SHEET)


def _amd(name: str, mebibytes: int, gigabytes_per_second: int | None, link: str) -> Gpu:
    bandwidth = None if gigabytes_per_second is None else gigabytes_per_second * 1e9
    return Gpu(name, mebibytes * MIB, bandwidth, link, "amd")


GPUS = (
    # Ampere
    _nvidia(
        "RTX3090",
        24576,
        936,
        "https://www.nvidia.com/content/PDF/nvidia-ampere-ga-102-gpu-architecture-whitepaper-v2.pdf",
    ),
    _nvidia("A10", 23028, 600, f"{NVIDIA}data-center/products/a10-gpu/"),
    _nvidia("A40", 46068, 696, f"{NVIDIA}data-center/a40/"),
    _nvidia("A6000", 49140, 768, f"{NVIDIA_PDF}products/workstations/nvidia-rtx-a6000-datasheet.pdf"),
    _nvidia("A10040GB", 40960, 1555, A100),
    _nvidia("A100", 81920, 2039, A100),
    _nvidia("A800", 81920, 2039, LLM_PROF),
    # Ada
    _nvidia("RTX4090", 24564, 1008, f"{GEFORCE}ada/nvidia-ada-gpu-architecture.pdf"),
    _nvidia("L4", 23034, 300, f"{NVIDIA}data-center/l4/"),
    _nvidia("L20", 46068, 864, TOMS_HARDWARE),
    _nvidia("L40", 46068, 864, f"{NVIDIA}data-center/l40/"),
    _nvidia("L40S", 46068, 864, f"{NVIDIA}data-center/l40s/"),
    _nvidia("RTX6000ADA", 49140, 960, DESIGN),
    # Hopper
    _nvidia("H100", 81559, 3350, H100),
    _nvidia("H100PCIE", 81559, 2000, H100),
    _nvidia("H100NVL", 95830, 3900, H100),
    _nvidia("H800", 81559, 3350, LLM_PROF),
    _nvidia("H20", 97871, 4000, TOMS_HARDWARE),
    _nvidia("H203E", 143771, 4800, LLM_PROF),
    _nvidia("H200", 143771, 4800, H200),
    _nvidia("H200NVL", 143771, 4800, H200),
    _nvidia("GH200", 97871, 4000, GH200),
    _nvidia("GH200144GB", 145920, 4900, GH200),
    # Blackwell
    _nvidia("RTX5090", 32607, 1792, f"{GEFORCE}blackwell/nvidia-rtx-blackwell-gpu-architecture.pdf"),
    _sheet("RTXPRO5000", 48, 1344, f"{NVIDIA}products/workstations/professional-desktop-gpus/rtx-pro-5000/"),
    _nvidia("RTXPRO6000", 97887, 1792, f"{NVIDIA}products/workstations/professional-desktop-gpus/rtx-pro-6000/"),
    _nvidia("B200", 183359, 8000, HGX),
    _nvidia("GB200", 189471, 8000, f"{NVIDIA}data-center/gb200-nvl72/"),
    _nvidia("B300", 275040, 8000, HGX),
    _nvidia("GB300", 284208, 8000, f"{NVIDIA}data-center/gb300-nvl72/"),
    _sheet("GB10", 128, 273, f"{NVIDIA}products/workstations/dgx-spark/"),
    # CDNA 2, 3 and 4, RDNA 3 and 4
    _sheet("MI210", 64, 1638, f"{AMD}accelerators/instinct/mi200/mi210.html", "amd"),
    _sheet("MI250X", 64, 1638, f"{AMD}accelerators/instinct/mi200/mi250x.html", "amd"),
    _sheet("MI300A", 128, 5300, f"{AMD}accelerators/instinct/mi300/mi300a.html", "amd"),
    _amd("MI300X", 196592, 5300, f"{AMD}accelerators/instinct/mi300/mi300x.html"),
    # AMD publishes no bandwidth of it, and others do not agree.
    _amd("MI308X", 196592, None, LLM_PROF),
    _amd("MI325X", 262144, 6000, f"{AMD}accelerators/instinct/mi300/mi325x.html"),
    _sheet("MI350X", 288, 8000, f"{AMD}accelerators/instinct/mi350/mi350x.html", "amd"),
    _amd("MI355X", 294912, 8000, f"{AMD}accelerators/instinct/mi350/mi355x.html"),
    _sheet("W7900", 48, 864, f"{AMD}graphics/workstations/radeon-pro/w7900.html", "amd"),
    _sheet(
        "R9700", 32, 640, f"{AMD}graphics/workstations/radeon-ai-pro/ai-9000-series/amd-radeon-ai-pro-r9700.html", "amd"
    ),
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
