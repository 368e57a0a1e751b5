"""GPUs by name: the memory that the driver shows and the bandwidth that the vendor publishes."""

from __future__ import annotations

import re
from dataclasses import dataclass

MIB = 2**20
GIB = 2**30


class HardwareError(ValueError):
    """A GPU that is not known. The message says how to give its memory instead."""


@dataclass(frozen=True, slots=True)
class Gpu:
    name: str
    memory: int
    """Bytes in all, as `nvidia-smi` or `rocm-smi` shows them."""
    bandwidth: float | None
    """Bytes a second of its memory, as published; None where only the memory is known."""
    vendor: str = "nvidia"


def _gpu(name: str, mebibytes: int, gigabytes_per_second: int, vendor: str = "nvidia") -> Gpu:
    return Gpu(name, mebibytes * MIB, gigabytes_per_second * 1e9, vendor)


KNOWN = {
    gpu.name: gpu
    for gpu in (
        _gpu("RTX4090", 24564, 1008),
        _gpu("RTX5090", 32607, 1792),
        _gpu("L20", 46068, 864),
        _gpu("L40S", 46068, 864),
        _gpu("A6000", 49140, 768),
        _gpu("A100", 81920, 2039),
        _gpu("H100", 81559, 3350),
        _gpu("RTXPRO6000", 97887, 1792),
        _gpu("H20", 97871, 4000),
        _gpu("H200", 143771, 4800),
        _gpu("B200", 183359, 8000),
        _gpu("B300", 275040, 8000),
        _gpu("MI300X", 196592, 5300, "amd"),
        _gpu("MI325X", 262144, 6000, "amd"),
        _gpu("MI355X", 294912, 8000, "amd"),
    )
}
_REQUEST = re.compile(r"(?:(\d+)\s*[x×*]\s*)?(.+)", re.IGNORECASE)
_MEMORY = re.compile(r"(\d+(?:\.\d+)?)\s*(?:GI?B)?", re.IGNORECASE)


def parse(request: str) -> tuple[int, Gpu]:
    """Number and kind of `8xH200`, `4 x H100`, `RTX PRO 6000`, or a memory size in GiB: `8x96`. Raises HardwareError."""
    matched = _REQUEST.fullmatch(request.strip())
    assert matched is not None, "the pattern takes anything"
    count, kind = int(matched[1] or 1), matched[2].strip()
    plain = re.sub(r"[\s\-_]|NVIDIA|AMD|GEFORCE|INSTINCT", "", kind.upper())
    # "H100 80GB": the memory after a known name only says it again.
    named = next(
        (gpu for name, gpu in sorted(KNOWN.items(), reverse=True) if re.fullmatch(rf"{name}(\d+GB)?", plain)), None
    )
    if named is not None and count > 0:
        return count, named
    size = _MEMORY.fullmatch(kind)
    if size is None or count < 1:
        raise HardwareError(
            f"{request!r} is no GPU that is known: expected such as 8xH200, or a memory size in GiB such as 8x96. Known: "
            f"{', '.join(KNOWN)}."
        )
    return count, Gpu(f"{size[1]} GiB", round(float(size[1]) * GIB), None)
