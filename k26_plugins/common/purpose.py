"""Define what a server is meant for: decode, prefill or both.

The enum is separate from the experts because the command line's help lists its values and must not import torch.
"""

from __future__ import annotations

from enum import StrEnum


class Purpose(StrEnum):
    """The kind of batches that the kernels of a server are chosen for."""

    DECODE = "decode"
    PREFILL = "prefill"
    BOTH = "both"
