"""What a user calls a machine's GPUs."""

from __future__ import annotations

import re
from dataclasses import replace

from k26_plugins.operate.plan.gpus import ALIASES, GIB, KNOWN, Gpu

_REQUEST = re.compile(r"(?:(\d+)\s*[x×*]\s*)?(.+)", re.IGNORECASE | re.DOTALL)
_MEMORY = re.compile(r"(\d+(?:\.\d+)?)\s*(?:GI?B?)?", re.IGNORECASE)
_STATED = re.compile(r"[\s\-_](\d+)\s*G(?:I?B)?\b")
# What vendors and drivers write around a GPU's own name.
_AROUND = re.compile(
    r"MAX-?Q|[\s\-_\"']|NVIDIA|AMD|GEFORCE|INSTINCT|RADEON|TESLA|QUADRO|HBM\d?E?|SXM\d?|OAM|GENERATION|BLACKWELL|SERVER|"
    r"WORKSTATION|EDITION|GRAPHICS|AC$"
)
PLAUSIBLE_GIB = (4, 512)
"""A number outside of it is no memory of one GPU, and then a model's number."""
SAME = 0.07
"""Up to this difference a stated size says the known one again: 80 GB of a driver's 79.6 GiB, 141 of 140.4."""


class HardwareError(ValueError):
    """A GPU that is not known. The message says how to give its memory instead."""


def parse(request: str) -> tuple[int, Gpu]:
    """Number and kind of `8xH200`, `4 x "RTX 4090 48GB"`, a driver's own name, or a memory size in GiB: `8x96`.

    A size that the request states wins over the one that is known of the name. Raises HardwareError.
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
    """The GPU of a name as users and drivers write it, None for one that is not known."""
    kind = kind.upper()
    stated = _STATED.search(kind)
    # Whole first: some names end in a size, and the driver's name of GH200 states the CPU's memory.
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
