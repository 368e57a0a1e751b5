"""What a server is for. Apart from the experts: the command line's help names it, and imports no torch."""

from __future__ import annotations

from enum import StrEnum


class Purpose(StrEnum):
    """Which batches a server's kernel is chosen for."""

    DECODE = "decode"
    PREFILL = "prefill"
    BOTH = "both"
