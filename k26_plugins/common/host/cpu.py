"""Read what Linux says of this machine's CPU."""

from __future__ import annotations

import platform
from pathlib import Path

_CPUINFO = Path("/proc/cpuinfo")


def cpu_flags() -> frozenset[str]:
    """Return the features of this CPU as Linux names them; empty if Linux does not tell."""
    fields = _fields()
    return frozenset((fields.get("flags") or fields.get("Features") or "").split())


def cpu_model() -> str:
    """Return the CPU's name, or the machine's architecture if Linux does not tell a name, as on ARM."""
    return _fields().get("model name") or platform.machine()


def _fields() -> dict[str, str]:
    """Return the fields of the first CPU that have a value."""
    try:
        first = _CPUINFO.read_text(encoding="utf-8").partition("\n\n")[0]
    except OSError:
        return {}
    pairs = (line.partition(":") for line in first.splitlines())
    return {name.strip(): value.strip() for name, _, value in pairs}
