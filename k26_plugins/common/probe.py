"""What an adapter's `probe` module tells `k26 doctor` about its engine, in one line of JSON."""

from __future__ import annotations

import json
import logging


class KeptErrors(logging.Handler):
    """Keeps what a plugin logs when it fails: its only trace, as it never raises."""

    def __init__(self, logger: logging.Logger) -> None:
        super().__init__(logging.ERROR)
        self.lines: list[str] = []
        logger.addHandler(self)

    def emit(self, record: logging.LogRecord) -> None:
        cause = record.exc_info[1] if record.exc_info else None
        self.lines.append(f"{record.getMessage()} {cause or ''}".strip())


def say(version: str, checked: str, errors: KeptErrors, *, active: bool, hint: str, no_start: str = "") -> None:
    """Print the engine's version, the versions checked, and whether the plugin is active; if not, its errors or `hint`.

    no_start: what would end a server of this user at its start, with the remedy.
    """
    why_not = "" if active else " ".join(errors.lines) or hint
    print(
        json.dumps({"version": version, "checked": checked, "active": active, "why_not": why_not, "no_start": no_start})
    )
