"""What a user may choose by hand, the same in every engine: environment variables, read when an engine starts."""

from __future__ import annotations

import os

EXPERTS_VARIABLE = "K26_EXPERTS"
ENGINE = "engine"


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
    setting = experts_setting()
    return ENGINE if setting == "auto" and device_type != "cpu" else setting
