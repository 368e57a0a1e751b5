"""How an adapter becomes active in a process, or says why it does not.

An engine runs this in every process and for every model: no more than the settings is imported outside of what catches.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import TYPE_CHECKING

from k26_plugins.common.settings import STRICT

if TYPE_CHECKING:
    from k26_plugins.common.adapters.registration import Registration


def activate(engine: str, logger: logging.Logger, note: Callable[[Registration], None]) -> None:
    """Make the changes to an engine that `note` is to note. Repeatable.

    A failure is logged, and the engine stays as it was; with K26_STRICT=1 it is a SystemExit, which ends the start.
    """
    try:
        from k26_plugins.common.adapters.registration import Registration
        from k26_plugins.common.adapters.remote_code import refuse_remote_code

        changes = Registration()
        refuse_remote_code(changes)
        note(changes)
        changes.apply()
    except Exception as error:
        if STRICT.read():
            raise SystemExit(f"k26-plugins is not active, and {STRICT.variable}=1 stops the start: {error}") from error
        logger.exception("k26-plugins is not active: %s serves Kimi-K2.6 with its own code.", engine)
