"""Pause Python's garbage collector where it costs time: while hundreds of thousands of objects are created and kept."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def paused() -> Iterator[None]:
    """Disable the garbage collector within the block.

    While a checkpoint is checked, the collector would traverse all objects that are kept again and again, which takes a
    third of the time.
    """
    if not gc.isenabled():
        yield
        return
    gc.disable()
    try:
        yield
    finally:
        gc.enable()
