"""A checkpoint's tensors in the portions in which a trainer sends them, which cut through layers and experts."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from safetensors import safe_open

BUCKET = 100


def buckets(folder: Path) -> Iterator[tuple[Path, list[str]]]:
    """A file and the names of some of its tensors, until all were named."""
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            names = list(file.keys())
        for start in range(0, len(names), BUCKET):
            yield path, names[start : start + BUCKET]
