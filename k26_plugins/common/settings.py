"""What a user may choose by hand, the same in every engine: environment variables, read when an engine starts."""

from __future__ import annotations

import os

EXPERTS_VARIABLE = "K26_EXPERTS"
HOST_EXPERTS_VARIABLE = "K26_CPU_EXPERTS"
ENGINE = "engine"
CONTROL_TOKENS_VARIABLE = "K26_CONTROL_TOKENS"
PARSERS_VARIABLE = "K26_PARSERS"


def experts_setting() -> str:
    """Which experts compute the INT4 layers: `auto`, `engine` (the engine's own) or the name of a core backend.

    Raises ValueError for any other value of K26_EXPERTS.
    """
    from k26_plugins.common.experts import BACKENDS

    return _choice(EXPERTS_VARIABLE, ("auto", ENGINE, *BACKENDS))


def host_experts_setting() -> str:
    """Which experts compute on the host in a hybrid run: `auto` (the core's) or a backend's name, kt-kernel's included.

    Raises ValueError for any other value of K26_CPU_EXPERTS.
    """
    from k26_plugins.common.experts import backend_names

    return _choice(HOST_EXPERTS_VARIABLE, ("auto", *backend_names()))


def _choice(variable: str, allowed: tuple[str, ...]) -> str:
    value = os.environ.get(variable, "auto").strip().lower()
    if value not in allowed:
        raise ValueError(f"{variable} is {value!r}: choose one of {', '.join(allowed)}, or unset it.")
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
