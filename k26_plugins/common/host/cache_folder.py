"""Where the package keeps what it would otherwise compute again."""

from __future__ import annotations

import os
from pathlib import Path


def cache_folder() -> Path:
    """`k26-plugins` in `$XDG_CACHE_HOME` or `~/.cache`; not made. Where no home is known the `~` is left, to be named so."""
    return Path(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")) / "k26-plugins"  # noqa: PTH111


def outcome_folder() -> Path:
    """Where `k26 tune` keeps what it measured. The function is here because a plan calls it without importing torch."""
    return cache_folder() / "tuned"
