"""Tests that an engine's quantization configuration is made to answer with the core's experts, and for which layers."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch

from k26_plugins.common.adapters.engine import UnsupportedEngineError
from k26_plugins.common.adapters.experts import (
    answer_with,
    backend_of_layer,
    core_serves_layer,
    require_config,
)
from k26_plugins.common.experts.base import LayerSizes


class Config:
    def method_of(self, layer: Any, prefix: str = "none") -> Any:
        return f"{prefix}: the engine's for {layer}"


class Other(Config):
    pass


def test_one_object_answers_with_ours_where_there_is_one() -> None:
    ours, another = Other(), Other()
    answer_with(ours, "method_of", {"experts": "ours"}.get)
    assert ours.method_of("experts") == ours.method_of(layer="experts", prefix="a") == "ours"
    assert ours.method_of("norm", "a") == ours.method_of(layer="norm", prefix="a") == "a: the engine's for norm"
    assert isinstance(ours, Other)
    assert another.method_of("experts") == "none: the engine's for experts"


def test_another_configuration_is_one_clear_error() -> None:
    require_config(Other(), Config, "Engine 1.0", "remove the flag")
    with pytest.raises(
        UnsupportedEngineError, match=r"Engine 1\.0 read .* as Config, expected Other: remove the flag\."
    ):
        require_config(Config(), Other, "Engine 1.0", "remove the flag")


@pytest.mark.parametrize(
    ("chosen", "by_name", "expected"),
    [
        ("cpu", True, "cpu"),
        ("auto", True, "auto"),
        ("auto", False, "auto"),
        ("engine", False, None),
        ("engine", True, None),
    ],
)
def test_a_layer_is_the_cores_by_what_was_chosen(chosen: str, by_name: bool, expected: str | None) -> None:
    asked = []

    def sizes() -> LayerSizes:
        asked.append("sizes")
        return LayerSizes(4, 64, 32, torch.device("cpu"))

    def backend(serves: bool) -> str | None:
        logger = logging.getLogger(__name__)
        return backend_of_layer(chosen, sizes, "vllm", logger, by_name=by_name, serves=lambda name: serves)

    assert (backend(True), backend(False)) == (expected, None)
    assert bool(asked) == (chosen == "auto" and not by_name)


@pytest.mark.parametrize(("device", "said"), [("cpu", 1), ("meta", 0)])
def test_the_core_is_named_where_its_experts_are_loaded(
    device: str, said: int, caplog: pytest.LogCaptureFixture
) -> None:
    """A server of encoders alone has the language model's layers on the meta device, where none is loaded."""
    logger = logging.getLogger(f"{__name__}.{device}")
    with caplog.at_level(logging.INFO):
        for _ in range(2):
            assert core_serves_layer(logger, "Engine", "cpu", torch.device(device), None)
    assert caplog.text.count("INT4 experts run on the core (cpu)") == said
