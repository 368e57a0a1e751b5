"""What an engine's layers have a backend make itself ready for."""

from __future__ import annotations

import pytest

from k26_plugins.common.experts import Batches, ExpertsBackend
from k26_plugins.common.experts.base import Sizes


def record(monkeypatch: pytest.MonkeyPatch, *backends: type[ExpertsBackend]) -> list[tuple[int, Batches]]:
    """The number of experts and the batches of each call, in the list that is returned."""
    seen: list[tuple[int, Batches]] = []

    def make_ready(sizes: Sizes, batches: Batches) -> None:
        seen.append((sizes.num_experts, batches))

    for backend in backends:
        monkeypatch.setattr(backend, "make_ready", make_ready)
    return seen
