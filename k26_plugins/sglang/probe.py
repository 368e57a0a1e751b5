"""Whether the plugin is active in the SGLang of this environment: run by `k26 doctor` in a process of its own.

    python -m k26_plugins.sglang.probe

SGLang's own plugin loading runs, then its registry is asked whose configuration class it would take. Prints one line of
JSON.
"""

from __future__ import annotations

import importlib
import json
import logging
from importlib.util import find_spec

from k26_plugins.sglang import compat, logger


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
    hint = "SGLANG_PLUGINS is set and has no k26 in it, or the entry point is gone"
    if find_spec("sglang.srt.plugins") is not None:
        compat.private("sglang.srt.plugins", "load_plugins")()
    else:
        hint = "this SGLang has no plugins: start it with PYTHONPATH=$(python -m k26_plugins.sglang.boot)"
        importlib.import_module("sglang.srt.utils.hf_transformers_utils")
    registered = compat.registered_config()
    active = registered is not None and registered.__module__.startswith("k26_plugins.")
    print(
        json.dumps(
            {
                "version": compat.sglang_version(),
                "checked": compat.CHECKED_VERSIONS,
                "active": active,
                "why_not": "" if active else " ".join(messages.lines) or hint,
            }
        )
    )


if __name__ == "__main__":
    main()
