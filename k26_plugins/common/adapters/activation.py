"""Makes an adapter active in a process, or logs why it is not.

An engine runs this module in every process and for every model. So it imports at its top no other module of this
package than the settings: every other import stands inside the `try` of `activate`, which logs a failure.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import TYPE_CHECKING

from k26_plugins.common.settings import STRICT

if TYPE_CHECKING:
    from k26_plugins.common.adapters.registration import Registration


def activate(engine: str, logger: logging.Logger, note: Callable[[Registration], None]) -> None:
    """Let `note` note its changes to an engine, and make them. Calling this function again does no harm.

    A failure is logged, and the engine stays as it was. With K26_STRICT=1 a failure raises SystemExit instead, which
    ends the start.

    engine: the engine's name for the log.
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
