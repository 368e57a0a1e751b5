"""What a user may choose by hand, the same in every engine: environment variables, read when an engine starts."""

from __future__ import annotations

import os

import torch

EXPERTS_VARIABLE = "K26_EXPERTS"
ENGINE = "engine"
BATCH_INVARIANT_VARIABLE = "K26_BATCH_INVARIANT"


def experts_setting() -> str:
    """Which experts compute the INT4 layers: `auto`, `engine` (the engine's own) or the name of a core backend.

    Raises ValueError for any other value of K26_EXPERTS.
    """
    from k26_plugins.common.experts import BACKENDS

    value = os.environ.get(EXPERTS_VARIABLE, "auto").strip().lower()
    allowed = ("auto", ENGINE, *BACKENDS)
    if value not in allowed:
        raise ValueError(f"{EXPERTS_VARIABLE} is {value!r}: choose one of {', '.join(allowed)}, or unset it.")
    return value


def experts_for_device(device_type: str) -> str:
    """The setting with `auto` resolved: a core backend where the core has a fast one for the device, else `engine`."""
    from k26_plugins.common.experts.triton import unusable_on

    setting = experts_setting()
    if setting != "auto" or device_type == "cpu":
        return setting
    return setting if device_type == "cuda" and unusable_on(torch.device(device_type)) is None else ENGINE


def batch_invariant_setting() -> bool:
    """Whether a token's experts must give the same bits in any batch: K26_BATCH_INVARIANT, `0` (default) or `1`.

    Raises ValueError for any other value.
    """
    value = os.environ.get(BATCH_INVARIANT_VARIABLE, "0").strip()
    if value not in ("0", "1"):
        raise ValueError(f"{BATCH_INVARIANT_VARIABLE} is {value!r}: choose 0 or 1, or unset it.")
    return value == "1"
