"""What an adapter's `probe` module tells `k26 doctor` about its engine, in one line of JSON."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable


class KeptErrors(logging.Handler):
    """Keeps what a plugin logs when it fails, or goes without a part: its only trace, as it never raises."""

    def __init__(self, logger: logging.Logger) -> None:
        super().__init__(logging.WARNING)
        self.lines: list[str] = []
        logger.addHandler(self)

    def emit(self, record: logging.LogRecord) -> None:
        """Keep the record's message and the error that it was logged with."""
        cause = record.exc_info[1] if record.exc_info else None
        self.lines.append(f"{record.getMessage()} {cause or ''}".strip())


def serves_with_ours(load: Callable[[], type | None], errors: KeptErrors) -> bool:
    """Whether the model's class that the engine loads is the plugin's. Why it cannot be loaded is kept: that would end a
    server's start."""
    try:
        found = load()
    except Exception as error:  # whatever a module raises where the engine's names are not what they were
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
    """Print the engine's package and version, the versions checked, and whether the plugin is active; if not, its errors or
    `hint`.

    fix: the shell command that activates it where nothing failed. no_start: what would end a server of this user at its
    start, with the remedy.
    """
    failed = " ".join(errors.lines)
    state = {"package": package, "version": version, "checked": checked, "active": active, "no_start": no_start}
    why_not, fix = ("", "") if active else (failed, "") if failed else (hint, fix)
    print(json.dumps({**state, "why_not": why_not, "fix": fix}))
