"""Records the batches for which an engine's layers ask a backend of experts to make itself ready."""

from __future__ import annotations

import pytest

from k26_plugins.common.experts import Batches, ExpertsBackend
from k26_plugins.common.experts.base import Sizes


def record(monkeypatch: pytest.MonkeyPatch, *backends: type[ExpertsBackend]) -> list[tuple[int, Batches]]:
    """Return a list that gets the number of experts and the batches of every later call of a backend's `make_ready`."""
    seen: list[tuple[int, Batches]] = []

    def make_ready(sizes: Sizes, batches: Batches) -> None:
        seen.append((sizes.num_experts, batches))

    for backend in backends:
        monkeypatch.setattr(backend, "make_ready", make_ready)
    return seen
