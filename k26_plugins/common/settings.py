"""What a user may choose by hand, the same in every engine: a table of environment variables, read when an engine starts."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import entry_points
from pathlib import Path
from typing import Generic, TypeVar

T_co = TypeVar("T_co", covariant=True)
Words = Callable[[], tuple[str, ...]]

AUTO = "auto"
ENGINE = "engine"
"""The word that leaves a piece to the engine's own code."""
CORE_BACKENDS = ("triton", "native", "cpu", "reference")
"""Names of the core's experts, in the order in which `auto` tries them."""
BACKENDS_GROUP = "k26_plugins.experts"
"""The entry points by which a package offers a backend that `auto` does not try: the KTransformers adapter's kt-kernel."""


def backend_names() -> tuple[str, ...]:
    """Every backend of experts that can be asked for by name."""
    offered = (point.name for point in entry_points(group=BACKENDS_GROUP))
    return (*CORE_BACKENDS, *(name for name in offered if name not in CORE_BACKENDS))


@dataclass(frozen=True, slots=True)
class Setting(Generic[T_co]):
    """One variable. `EXPERTS.read()` is what was chosen, and `EXPERTS.variable` the name to say it by."""

    variable: str
    default: str
    """What counts where the variable is unset; empty where that is no word."""
    words: Words
    """The words that it takes, by a function, since some come from other packages."""
    other: str
    """What it takes beside words, such as "a number of tokens"; empty for nothing."""
    meaning: str
    """What is chosen, as its row in docs/settings.md begins."""
    parse: Callable[[str], T_co]
    """The value of a text. Raises ValueError for a text that it does not take."""

    def choices(self) -> tuple[str, ...]:
        """All that it takes, words first."""
        return (*self.words(), *([self.other] if self.other else []))

    def read(self) -> T_co:
        """What is chosen now. Raises ValueError, which names the variable and all that it takes."""
        text = os.environ.get(self.variable, self.default).strip()
        try:
            return self.parse(text)
        except ValueError:
            *others, last = self.choices()
            choices = f"{', '.join(others)} or {last}" if others else last
            raise ValueError(f"{self.variable} is {text!r}: choose {choices}, or unset it.") from None


def _word(text: str, words: tuple[str, ...]) -> str:
    if text.lower() not in words:
        raise ValueError(text)
    return text.lower()


def _number(text: str) -> int:
    if not text.isdecimal() or int(text) == 0:
        raise ValueError(text)
    return int(text)


def _file(text: str) -> Path:
    if not Path(text).is_file():
        raise ValueError(text)
    return Path(text)


def _choice(variable: str, default: str, words: Words, meaning: str) -> Setting[str]:
    return Setting(variable, default, words, "", meaning, lambda text: _word(text, words()))


def _switch(variable: str, meaning: str) -> Setting[bool]:
    words = ("0", "1")
    return Setting(variable, "0", lambda: words, "", meaning, lambda text: _word(text, words) == "1")


EXPERTS = _choice(
    "K26_EXPERTS",
    AUTO,
    lambda: (AUTO, ENGINE, *CORE_BACKENDS),
    "which experts compute the INT4 layers",
)
TUNE: Setting[bool] = Setting(
    "K26_TUNE",
    "",
    lambda: ("start",),
    "",
    "a server that meets a GPU and sizes that were not measured measures them",
    lambda text: bool(text and _word(text, ("start",))),
)
TUNED: Setting[Path | None] = Setting(
    "K26_TUNED",
    "",
    lambda: (),
    "an existing file of `k26 tune`",
    "the measurement that decides about the experts on a GPU",
    lambda text: _file(text) if text else None,
)
CPU_EXPERTS = _choice(
    "K26_CPU_EXPERTS",
    AUTO,
    lambda: (AUTO, *backend_names()),
    "which experts compute on the CPU in a hybrid run",
)
CPU_THREADS: Setting[int | None] = Setting(
    "K26_CPU_THREADS",
    "",
    lambda: (),
    "a number of cores",
    "cores that `native` takes for itself beside a GPU, for each rank",
    lambda text: _number(text) if text else None,
)
STREAM_FROM: Setting[int | str] = Setting(
    "K26_STREAM_FROM",
    AUTO,
    lambda: (AUTO, "never"),
    "a number of tokens",
    "in a hybrid run, from which batch on the CPU's experts are computed on the GPU",
    lambda text: _number(text) if text.isdecimal() else _word(text, (AUTO, "never")),
)
MOVE_EXPERTS = _switch(
    "K26_MOVE_EXPERTS",
    "in a hybrid run, whether the experts that are used most move to the GPU while it serves",
)
BATCH_INVARIANT = _switch(
    "K26_BATCH_INVARIANT",
    "a token's bits in `triton` do not depend on its batch",
)
CONTROL_TOKENS = _choice(
    "K26_CONTROL_TOKENS",
    "text",
    lambda: ("text", "allow"),
    "whether the name of a control token in a message stays text",
)
TOOL_IDS = _choice(
    "K26_TOOL_IDS",
    "kimi",
    lambda: ("kimi", "sent"),
    "whether past tool calls get ids of the form that the model writes",
)
PROMPTS = _choice(
    "K26_PROMPTS",
    AUTO,
    lambda: (AUTO, ENGINE),
    "whose the tokenizer and the rendering of chats are",
)
MEDIA = _choice(
    "K26_MEDIA",
    AUTO,
    lambda: (AUTO, ENGINE),
    "who reads and prepares images and videos",
)
PARSERS = _choice(
    "K26_PARSERS",
    AUTO,
    lambda: (AUTO, ENGINE, "none"),
    "what takes answers apart where the flags name no parser",
)
STRICT = _switch(
    "K26_STRICT",
    "ends the start where this engine's release lacks something that the plugin needs",
)

TABLE: tuple[Setting[object], ...] = tuple(value for value in list(globals().values()) if isinstance(value, Setting))
"""All of the above, in this order, which is that of docs/settings.md."""


def check_settings() -> None:
    """Read every setting, so that a wrong one stops a server's start before anything is loaded. Raises ValueError."""
    for setting in TABLE:
        setting.read()
