"""What all tests share: the tiny checkpoint, and how a GPU test is skipped."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from k26_plugins.common.tiny import make_tiny


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The default tiny checkpoint. Tests that damage one copy it first."""
    folder = tmp_path_factory.mktemp("checkpoint") / "tiny"
    make_tiny(folder)
    return folder


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(pytest.mark.skip(reason="needs a GPU, this machine has none"))
