"""Splits a checkpoint's tensors into buckets as a trainer sends them; a bucket may end within a layer or an expert."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from safetensors import safe_open

BUCKET = 100


def buckets(folder: Path) -> Iterator[tuple[Path, list[str]]]:
    """Yield a safetensors file and the names of up to BUCKET of its tensors, until every tensor has been named once."""
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            names = list(file.keys())
        for start in range(0, len(names), BUCKET):
            yield path, names[start : start + BUCKET]
