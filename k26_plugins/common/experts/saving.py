"""Put a running model's experts into the checkpoint's form while an engine saves its parameters."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from contextlib import contextmanager

from k26_plugins.common.experts.base import ExpertsError
from k26_plugins.common.experts.loading import ExpertsOfLayer


@contextmanager
def in_checkpoint_form(layers: Collection[ExpertsOfLayer]) -> Iterator[None]:
    """Open the layers for the body of a `with` statement, and close them again after it.

    Repacked weights are good only for this machine and this release, and saved ones must be readable on any other.
    Nothing may be computed meanwhile. Raises ExpertsError if a backend keeps its weights to itself.
    """
    for layer in layers:
        if not layer.experts.is_restorable:
            raise ExpertsError(
                f"{layer.experts.backend_name} keeps its weights to itself, and a state without them is none: choose the "
                f"core's experts (K26_EXPERTS=auto)."
            )
    opened: list[ExpertsOfLayer] = []
    try:
        for layer in layers:
            if layer.open():
                opened.append(layer)
        yield
    finally:
        for layer in opened:
            layer.close()
