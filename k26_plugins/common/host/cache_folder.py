"""Locate the folders in which the package caches what would otherwise be computed again."""

from __future__ import annotations

import os
from pathlib import Path


def cache_folder() -> Path:
    """Return `k26-plugins` in `$XDG_CACHE_HOME` or in `~/.cache`, without creating it.

    If no home directory is known, the `~` stays in the path, so that an error message shows it.
    """
    return Path(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")) / "k26-plugins"  # noqa: PTH111


def outcome_folder() -> Path:
    """Return the folder in which `k26 tune` keeps its measurements.

    The function is in this module because `k26 plan` calls it and must not import torch.
    """
    return cache_folder() / "tuned"
