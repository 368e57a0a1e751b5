"""Define what users may choose through environment variables, the same in every engine.

The variables form one table (`TABLE`), which is read when an engine starts.
"""

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
"""The value that leaves a part of the work to the engine's own code."""
CORE_BACKENDS = ("triton", "native", "cpu", "reference")
"""Names of the core's experts backends, in the order in which `auto` tries them."""
BACKENDS_GROUP = "k26_plugins.experts"
"""The entry-point group in which other packages offer experts backends that `auto` does not try, such as the
KTransformers adapter's kt-kernel.
"""


def backend_names() -> tuple[str, ...]:
    """Return the names of all experts backends that can be chosen by name: the core's and those of other installed
    packages.
    """
    offered = (point.name for point in entry_points(group=BACKENDS_GROUP))
    return (*CORE_BACKENDS, *(name for name in offered if name not in CORE_BACKENDS))


@dataclass(frozen=True, slots=True)
class Setting(Generic[T_co]):
    """One environment variable: `EXPERTS.read()` returns the user's choice, `EXPERTS.variable` is the name to print."""

    variable: str
    default: str
    """The text that counts where the variable is unset; an empty one need not be among `words`."""
    words: Words
    """Returns the words that the variable accepts. A function, because some of the words come from other packages."""
    other: str
    """The values that the variable accepts besides words, such as "a number of tokens"; empty if there are none."""
    meaning: str
    """The choice that the user makes with the variable: the beginning of its row in docs/settings.md."""
    parse: Callable[[str], T_co]
    """Converts the text to the value. Raises ValueError for a text that the variable does not accept."""

    def choices(self) -> tuple[str, ...]:
        """Return everything that the variable accepts, words first, for an error message."""
        return (*self.words(), *([self.other] if self.other else []))

    def read(self) -> T_co:
        """Return the value chosen now. Raises ValueError, which names the variable and everything that it accepts."""
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
"""All settings of this module in the order of docs/settings.md."""


def check_settings() -> None:
    """Read every setting, so that a wrong value stops a server before anything is loaded. Raises ValueError."""
    for setting in TABLE:
        setting.read()
