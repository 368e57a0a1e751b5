"""List the GPUs of the last three generations, with the memory that the driver shows and the published bandwidth.

Memory is the total that `nvidia-smi` or `amd-smi` shows, in MiB, read from published outputs of these tools. Where no
such output was found, memory is the data sheet's size in decimal GB, which is less than a driver shows. Bandwidth is
the data sheet's, in GB/s. Each GPU has a link to the vendor's page with these figures; where no such page was found, to
the secondary source that SECONDARY names.
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
# The vendors have no page for GPUs that are made for one market, so these figures have secondary sources.
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
    """A kind of GPU with its published figures."""

    name: str
    memory: int
    """Total bytes, as the driver shows them or, with the source DATA_SHEET, as the data sheet has them."""
    bandwidth: float | None
    """Bytes per second of the GPU's memory, as published; None if it is not known."""
    link: str
    """The page with the figures; empty if the user or the driver gave the memory of an unknown GPU."""
    vendor: str = "nvidia"
    """`nvidia` or `amd`."""
    source: str = DRIVER
    """The source of `memory`: DRIVER or DATA_SHEET."""


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
    # AMD publishes no bandwidth of the MI308X, and secondary sources do not agree.
    _amd("MI308X", 196592, None, LLM_PROF),
    _amd("MI325X", 262144, 6000, f"{AMD}accelerators/instinct/mi300/mi325x.html"),
    _sheet("MI350X", 288, 8000, f"{AMD}accelerators/instinct/mi350/mi350x.html", "amd"),
    _amd("MI355X", 294912, 8000, f"{AMD}accelerators/instinct/mi350/mi355x.html"),
    _sheet("W7900", 48, 864, f"{AMD}graphics/workstations/radeon-pro/w7900.html", "amd"),
    _sheet(
        "R9700", 32, 640, f"{AMD}graphics/workstations/radeon-ai-pro/ai-9000-series/amd-radeon-ai-pro-r9700.html", "amd"
    ),
)
# The figures of the MI250X are those of one of its two dies (GCDs), because programs see each die as a GPU of its own.
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
    # The driver's names of the GH200 state the memory of the CPU.
    "GH200480GB": "GH200",
    "GH200120GB": "GH200",
    "H20E": "H203E",
    "H20141GB": "H203E",
    "DGXSPARK": "GB10",
}
