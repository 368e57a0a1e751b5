"""A running model's experts in the checkpoint's form, while an engine saves its own parameters."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from contextlib import contextmanager

from k26_plugins.common.experts.base import ExpertsError
from k26_plugins.common.experts.loading import ExpertsOfLayer


@contextmanager
def in_checkpoint_form(layers: Collection[ExpertsOfLayer]) -> Iterator[None]:
    """What a backend repacked is for this machine and this release: what is saved is to be read by any other.

    Nothing may be computed meanwhile. Raises ExpertsError where a backend keeps its weights to itself.
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
