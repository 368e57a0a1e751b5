"""What a user may choose by hand, the same in every engine: environment variables, read when an engine starts."""

from __future__ import annotations

import os

EXPERTS_VARIABLE = "K26_EXPERTS"
ENGINE = "engine"
CONTROL_TOKENS_VARIABLE = "K26_CONTROL_TOKENS"
PARSERS_VARIABLE = "K26_PARSERS"


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


def control_tokens_as_text() -> bool:
    """Whether a control token's name in a message stays text (the default), or becomes the control token.

    Raises ValueError for any other value of K26_CONTROL_TOKENS than `text` and `allow`.
    """
    value = os.environ.get(CONTROL_TOKENS_VARIABLE, "text").strip().lower()
    if value not in ("text", "allow"):
        raise ValueError(f"{CONTROL_TOKENS_VARIABLE} is {value!r}: choose text or allow, or unset it.")
    return value == "text"


def parsers_by_default() -> bool:
    """Whether a server takes this model's output apart where its flags name no parser (the default).

    Raises ValueError for any other value of K26_PARSERS than `auto` and `none`.
    """
    value = os.environ.get(PARSERS_VARIABLE, "auto").strip().lower()
    if value not in ("auto", "none"):
        raise ValueError(f"{PARSERS_VARIABLE} is {value!r}: choose auto or none, or unset it.")
    return value == "auto"
