"""Lets an adapter's `probe` module tell `k26 doctor` about its engine, in one line of JSON."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable


class KeptErrors(logging.Handler):
    """A log handler that keeps a plugin's warnings and errors.

    They are the only trace of a plugin that failed or goes without a part, because a plugin raises nothing.
    """

    def __init__(self, logger: logging.Logger) -> None:
        super().__init__(logging.WARNING)
        self.lines: list[str] = []
        logger.addHandler(self)

    def emit(self, record: logging.LogRecord) -> None:
        """Keep the record's message, followed by the exception that was logged with it."""
        cause = record.exc_info[1] if record.exc_info else None
        self.lines.append(f"{record.getMessage()} {cause or ''}".strip())


def serves_with_ours(load: Callable[[], type | None], errors: KeptErrors) -> bool:
    """Return whether the model class that the engine loads is the plugin's.

    If `load` raises, which would end a server's start, add the exception's text to `errors` and return False.
    """
    try:
        found = load()
    except Exception as error:  # a module may raise anything if the engine's names have changed
        errors.lines.append(f"the model's class cannot be imported: {type(error).__name__}: {error}")
        return False
    return found is not None and found.__module__.startswith("k26_plugins.")


def say(
    package: str,
    version: str,
    checked: str,
    errors: KeptErrors,
    *,
    active: bool,
    hint: str,
    fix: str = "",
    no_start: str = "",
) -> None:
    """Print one line of JSON: the engine's package and version, the checked versions, and whether the plugin is active.

    If the plugin is not active, the line has its errors as the reason, or `hint` if there are none. fix: the shell
    command that activates the plugin where nothing failed. no_start: what would end this user's server at its start,
    and the remedy; empty if nothing would.
    """
    failed = " ".join(errors.lines)
    state = {"package": package, "version": version, "checked": checked, "active": active, "no_start": no_start}
    why_not, fix = ("", "") if active else (failed, "") if failed else (hint, fix)
    print(json.dumps({**state, "why_not": why_not, "fix": fix}))
