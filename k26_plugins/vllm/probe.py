"""Whether the plugin is active in the vLLM of this environment: run by `k26 doctor` in a process of its own.

    python -m k26_plugins.vllm.probe

vLLM's own plugin loading runs, then its registry is asked whose class it would take. Prints one line of JSON.
"""

from __future__ import annotations

import json
import logging

from k26_plugins.common.config import ARCHITECTURE
from k26_plugins.vllm import compat, logger


class _Messages(logging.Handler):
    """Keeps what the plugin logs when it fails: its only trace, as it never raises."""

    def __init__(self) -> None:
        super().__init__(logging.ERROR)
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        cause = record.exc_info[1] if record.exc_info else None
        self.lines.append(f"{record.getMessage()} {cause or ''}".strip())


def main() -> None:
    messages = _Messages()
    logger.addHandler(messages)
    compat.private("vllm.plugins", "load_general_plugins")()
    registry = compat.private("vllm.model_executor.models.registry", "ModelRegistry")
    module = getattr(registry.models.get(ARCHITECTURE), "module_name", "")
    active = module.startswith("k26_plugins.")
    why_not = (
        ""
        if active
        else " ".join(messages.lines) or "VLLM_PLUGINS is set and has no k26 in it, or the entry point is gone"
    )
    print(
        json.dumps(
            {
                "version": compat.vllm_version(),
                "checked": compat.CHECKED_VERSIONS,
                "active": active,
                "why_not": why_not,
            }
        )
    )


if __name__ == "__main__":
    main()
