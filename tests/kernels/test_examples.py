"""Tests that the examples in the kernels' docstrings give what they say."""

from __future__ import annotations

from pathlib import Path

import pytest
from support.examples import modules_with_examples, run_examples

MODULES = modules_with_examples("k26_kernels", Path(__file__).parents[2] / "kernels" / "k26_kernels")


def test_the_call_has_an_example() -> None:
    assert "k26_kernels.experts" in MODULES


@pytest.mark.parametrize("name", MODULES)
def test_the_examples_are_right(name: str) -> None:
    run_examples(name)
