"""Find the GPU that a user or a driver names: `8xH200`, `NVIDIA GeForce RTX 4090`, or a memory size."""

from __future__ import annotations

import re
from dataclasses import replace

from k26_plugins.operate.plan.gpus import ALIASES, GIB, KNOWN, Gpu

_REQUEST = re.compile(r"(?:(\d+)\s*[x×*]\s*)?(.+)", re.IGNORECASE | re.DOTALL)
_MEMORY = re.compile(r"(\d+(?:\.\d+)?)\s*(?:GI?B?)?", re.IGNORECASE)
_STATED = re.compile(r"[\s\-_](\d+)\s*G(?:I?B)?\b")
# The words that vendors and drivers write around a GPU's own name; `_known` removes them.
_AROUND = re.compile(
    r"MAX-?Q|[\s\-_\"']|NVIDIA|AMD|GEFORCE|INSTINCT|RADEON|TESLA|QUADRO|HBM\d?E?|SXM\d?|OAM|GENERATION|BLACKWELL|SERVER|"
    r"WORKSTATION|EDITION|GRAPHICS|AC$"
)
PLAUSIBLE_GIB = (4, 512)
"""The range of plausible memory sizes of one GPU. A number outside of this range is taken for part of the GPU's
name."""
SAME = 0.07
"""Largest relative difference at which a size that the user states is taken for the known size: a driver shows 79.6 GiB
for 80 GB and 140.4 GiB for 141 GB."""


class HardwareError(ValueError):
    """The error for GPUs that are unknown or missing. The message says what to give instead."""


def parse(request: str) -> tuple[int, Gpu]:
    """Return the number and the kind of the requested GPUs.

    A request is such as `8xH200`, `4 x "RTX 4090 48GB"`, a driver's own name, or `8x96` with a memory size in GiB. A
    size that the request states takes precedence over the size known for the name. Raises HardwareError if the GPU is
    not known.
    """
    matched = _REQUEST.fullmatch(request.strip())
    if matched is None:
        raise _unknown(request)
    count, kind = int(matched[1] or 1), matched[2].strip(" \"'")
    size = _MEMORY.fullmatch(kind)
    is_size = size is not None and PLAUSIBLE_GIB[0] <= float(size[1]) <= PLAUSIBLE_GIB[1]
    if is_size and size is not None:
        found: Gpu | None = Gpu(f"{size[1]} GiB", round(float(size[1]) * GIB), None, link="")
    else:
        found = named(kind)
    if found is None or count < 1:
        raise _unknown(request)
    return count, found


def named(kind: str) -> Gpu | None:
    """Return the GPU of this name, as users and drivers write names, or None if it is not known.

    If the name states a memory size that differs from the known one, the GPU has the stated size.
    """
    kind = kind.upper()
    stated = _STATED.search(kind)
    # The whole name is looked up first, because some known names end in a size and the driver's name of the GH200
    # states the memory of the CPU.
    found = _known(kind)
    if found is not None or stated is None:
        return found
    found = _known(kind[: stated.start()] + kind[stated.end() :])
    gibibytes = int(stated[1])
    if found is None or abs(found.memory / GIB - gibibytes) <= SAME * gibibytes:
        return found
    if not PLAUSIBLE_GIB[0] <= gibibytes <= PLAUSIBLE_GIB[1]:
        return None
    return replace(found, name=f"{found.name} {gibibytes}GB", memory=gibibytes * GIB)


def _known(kind: str) -> Gpu | None:
    plain = _AROUND.sub("", kind)
    names = (plain, plain.removesuffix("PCIE"), re.sub(r"(\d)G$", r"\1GB", plain))
    return next((KNOWN[ALIASES.get(name, name)] for name in names if ALIASES.get(name, name) in KNOWN), None)


def _unknown(request: str) -> HardwareError:
    return HardwareError(
        f"{request!r} is no GPU that is known: expected such as 8xH200, or a memory size in GiB such as 8x96. Known: "
        f"{', '.join(KNOWN)}."
    )
