"""What a user may choose by hand, the same in every engine: environment variables, read when an engine starts."""

from __future__ import annotations

import os
from importlib.metadata import entry_points
from pathlib import Path

EXPERTS_VARIABLE = "K26_EXPERTS"
TUNED_VARIABLE = "K26_TUNED"
TUNE_VARIABLE = "K26_TUNE"
HOST_EXPERTS_VARIABLE = "K26_CPU_EXPERTS"
CPU_THREADS_VARIABLE = "K26_CPU_THREADS"
ENGINE = "engine"
CONTROL_TOKENS_VARIABLE = "K26_CONTROL_TOKENS"
PARSERS_VARIABLE = "K26_PARSERS"
PROMPTS_VARIABLE = "K26_PROMPTS"
MEDIA_VARIABLE = "K26_MEDIA"
TOOL_IDS_VARIABLE = "K26_TOOL_IDS"
STREAM_FROM_VARIABLE = "K26_STREAM_FROM"
MOVE_EXPERTS_VARIABLE = "K26_MOVE_EXPERTS"
BATCH_INVARIANT_VARIABLE = "K26_BATCH_INVARIANT"
STRICT_VARIABLE = "K26_STRICT"
CORE_BACKENDS = ("triton", "native", "cpu", "reference")
"""Names of the core's experts, in the order in which `auto` tries them."""
BACKENDS_GROUP = "k26_plugins.experts"
"""The entry points by which a package offers a backend that `auto` does not try: the KTransformers adapter's kt-kernel."""


def backend_names() -> tuple[str, ...]:
    """Every backend of experts that can be asked for by name."""
    offered = (point.name for point in entry_points(group=BACKENDS_GROUP))
    return (*CORE_BACKENDS, *(name for name in offered if name not in CORE_BACKENDS))


def experts_setting() -> str:
    """Which experts compute the INT4 layers: `auto`, `engine` (the engine's own) or the name of a core backend.

    Raises ValueError for any other value of K26_EXPERTS.
    """
    return _choice(EXPERTS_VARIABLE, ("auto", ENGINE, *CORE_BACKENDS))


def host_experts_setting() -> str:
    """Which experts compute on the host in a hybrid run: `auto` (the core's) or a backend's name, kt-kernel's included.

    Raises ValueError for any other value of K26_CPU_EXPERTS.
    """
    return _choice(HOST_EXPERTS_VARIABLE, ("auto", *backend_names()))


def _choice(variable: str, allowed: tuple[str, ...]) -> str:
    value = os.environ.get(variable, "auto").strip().lower()
    if value not in allowed:
        raise ValueError(f"{variable} is {value!r}: choose one of {', '.join(allowed)}, or unset it.")
    return value


def tuned_setting() -> Path | None:
    """The outcome of `k26 tune` that decides about the experts, in the place of the cache folder's: K26_TUNED.

    Raises ValueError where there is no such file.
    """
    value = os.environ.get(TUNED_VARIABLE, "").strip()
    if not value:
        return None
    file = Path(value)
    if not file.is_file():
        raise ValueError(f"{TUNED_VARIABLE} is {value!r}: no such file. Give one that `k26 tune` wrote, or unset it.")
    return file


def tune_at_start() -> bool:
    """Whether a server measures the experts of a GPU that `k26 tune` has not: K26_TUNE=start.

    Raises ValueError for any other value.
    """
    value = os.environ.get(TUNE_VARIABLE, "").strip().lower()
    if value not in ("", "start"):
        raise ValueError(f"{TUNE_VARIABLE} is {value!r}: choose start, or unset it.")
    return value == "start"


def control_tokens_as_text() -> bool:
    """Whether a control token's name in a message stays text (the default), or becomes the control token.

    Raises ValueError for any other value of K26_CONTROL_TOKENS than `text` and `allow`.
    """
    value = os.environ.get(CONTROL_TOKENS_VARIABLE, "text").strip().lower()
    if value not in ("text", "allow"):
        raise ValueError(f"{CONTROL_TOKENS_VARIABLE} is {value!r}: choose text or allow, or unset it.")
    return value == "text"


def parsers_setting() -> str:
    """What takes this model's output apart where a server's flags name no parser: `auto` (the core's), `engine` (the
    engine's own for this model) or `none`.

    Raises ValueError for any other value of K26_PARSERS.
    """
    return _choice(PARSERS_VARIABLE, ("auto", ENGINE, "none"))


def core_prompts() -> bool:
    """Whether the tokenizer and the rendering of chats are the core's (the default), or the engine's own.

    Raises ValueError for any other value of K26_PROMPTS than `auto` and `engine`.
    """
    return _choice(PROMPTS_VARIABLE, ("auto", ENGINE)) == "auto"


def core_media() -> bool:
    """Whether images and videos are read and prepared by the core (the default), or by the engine's own code.

    Raises ValueError for any other value of K26_MEDIA than `auto` and `engine`.
    """
    return _choice(MEDIA_VARIABLE, ("auto", ENGINE)) == "auto"


def kimis_ids() -> bool:
    """Whether past tool calls get ids of the form that the model writes (the default), or keep those that were sent.

    Raises ValueError for any other value of K26_TOOL_IDS than `kimi` and `sent`.
    """
    value = os.environ.get(TOOL_IDS_VARIABLE, "kimi").strip().lower()
    if value not in ("kimi", "sent"):
        raise ValueError(f"{TOOL_IDS_VARIABLE} is {value!r}: choose kimi or sent, or unset it.")
    return value == "kimi"


def cpu_threads_setting() -> int | None:
    """How many cores the native experts take at most; None for all that the process may use.

    For several ranks on one machine that the engine does not pin to cores of their own. Raises ValueError for anything
    but a positive number in K26_CPU_THREADS.
    """
    value = os.environ.get(CPU_THREADS_VARIABLE, "").strip()
    if not value:
        return None
    if not value.isdecimal() or int(value) == 0:
        raise ValueError(f"{CPU_THREADS_VARIABLE} is {value!r}: give the number of cores for the experts, or unset it.")
    return int(value)


def stream_from_setting() -> int | str:
    """From how many tokens in a batch a hybrid run streams the host's experts to the device.

    `auto` (as the machine's times say, expert by expert), `never`, or a number. Raises ValueError for anything else in
    K26_STREAM_FROM.
    """
    value = os.environ.get(STREAM_FROM_VARIABLE, "auto").strip().lower()
    if value in ("auto", "never"):
        return value
    if not value.isdecimal() or int(value) == 0:
        raise ValueError(f"{STREAM_FROM_VARIABLE} is {value!r}: choose auto, never or a number of tokens, or unset it.")
    return int(value)


def batch_invariant_setting() -> bool:
    """Whether a token's experts must give the same bits in any batch: K26_BATCH_INVARIANT, `0` (default) or `1`.

    Raises ValueError for any other value.
    """
    return _switch(BATCH_INVARIANT_VARIABLE)


def move_experts_setting() -> bool:
    """Whether a hybrid run moves the experts that are used most to the device: K26_MOVE_EXPERTS, `0` (default) or `1`.

    Raises ValueError for any other value.
    """
    return _switch(MOVE_EXPERTS_VARIABLE)


def strict() -> bool:
    """Whether a start ends where this engine lacks something that the plugin needs: K26_STRICT, `0` (default) or `1`.

    Raises ValueError for any other value.
    """
    return _switch(STRICT_VARIABLE)


def _switch(variable: str) -> bool:
    value = os.environ.get(variable, "0").strip()
    if value not in ("0", "1"):
        raise ValueError(f"{variable} is {value!r}: choose 0 or 1, or unset it.")
    return value == "1"


def check_settings() -> None:
    """Read every setting, so that a wrong one stops a server's start before anything is loaded. Raises ValueError."""
    for read in (
        experts_setting,
        host_experts_setting,
        tuned_setting,
        tune_at_start,
        cpu_threads_setting,
        stream_from_setting,
        batch_invariant_setting,
        move_experts_setting,
        control_tokens_as_text,
        kimis_ids,
        parsers_setting,
        core_prompts,
        core_media,
        strict,
    ):
        read()
