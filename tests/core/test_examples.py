"""Tests that the examples in the core's docstrings give what they say."""

from __future__ import annotations

from pathlib import Path

import pytest
from support.examples import modules_with_examples, run_examples

MODULES = modules_with_examples("k26_plugins.common", Path(__file__).parents[2] / "k26_plugins" / "common")


def test_many_modules_have_examples() -> None:
    assert len(MODULES) >= 8


@pytest.mark.parametrize("name", MODULES)
def test_the_examples_are_right(name: str, tiny_folder: Path) -> None:
    run_examples(name, tiny_folder=tiny_folder)
