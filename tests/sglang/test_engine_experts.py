"""Tests of the check that SGLang's own experts pass before they serve, with its real CPU kernels and with wrong
ones."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from support import layouts, sglang_wrong_experts, sglang_wrong_int4
from support.agreement import assert_same_distribution
from support.entry_point import of_sglang
from support.server import start_fails
from support.sglang_server import EAGER, HAS_ENTRY_POINT, generate, rows, serve

from k26_plugins.common.checkpoint import Checkpoint
from k26_plugins.common.reference.kimi_k26 import KimiK26

pytestmark = pytest.mark.long


@pytest.fixture(scope="module")
def dense_folder(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a bfloat16 checkpoint, whose experts SGLang's own code serves."""
    return layouts.make(layouts.dense, tiny_folder, tmp_path_factory.mktemp("dense") / "checkpoint")


def test_the_right_ones_serve(dense_folder: Path, tmp_path: Path) -> None:
    with serve(dense_folder, tmp_path / "log") as server:
        log = server.log.read_text()
    assert "SGLang's own experts (UnquantizedFusedMoEMethod" in log
    assert ") passed the test on cpu: relative error 0.00" in log


@pytest.mark.skipif(not HAS_ENTRY_POINT, reason="the wrong ones are put in their place by a plugin")
def test_wrong_ones_stop_the_start(dense_folder: Path, tmp_path: Path) -> None:
    settings = of_sglang(sglang_wrong_experts, tmp_path / "plugin")
    said = r"SGLang's own experts \(UnquantizedFusedMoEMethod.*\) are wrong on cpu: relative error .*, and the core's cannot"
    with start_fails(said), serve(dense_folder, tmp_path / "log", **settings):
        pass


@pytest.mark.skipif(not HAS_ENTRY_POINT, reason="the wrong ones are put in their place by a plugin")
def test_the_core_takes_the_place_of_wrong_ones(tiny_folder: Path, tmp_path: Path) -> None:
    """If SGLang's experts for the published weights are wrong, the core's experts take their place, read the weights
    again, and answer as the reference does."""
    settings = of_sglang(sglang_wrong_int4, tmp_path / "plugin")
    with serve(tiny_folder, tmp_path / "log", **settings, **EAGER) as server:
        log = server.log.read_text()
        said = (
            r"SGLang's own experts \(CompressedTensorsWNA16MoE.*\) are wrong on cpu: relative error 1 \(limit 0.05\)\. "
        )
        assert len(re.findall(said + "The core's take their place: the model is built and loaded again", log)) == 1
        prompt = torch.randint(0, 256, (40,), generator=torch.Generator().manual_seed(0))
        answer = generate(server, prompt.tolist(), 1)
    served = rows(answer["meta_info"]["input_top_logprobs"][1:])
    assert_same_distribution(served, KimiK26(Checkpoint(tiny_folder), torch.float32).logprobs(prompt)[:-1])


@pytest.mark.skipif(not HAS_ENTRY_POINT, reason="the wrong ones are put in their place by a plugin")
def test_the_core_does_not_take_the_place_of_those_asked_for(tiny_folder: Path, tmp_path: Path) -> None:
    settings = of_sglang(sglang_wrong_int4, tmp_path / "plugin") | {"K26_EXPERTS": "engine"}
    with (
        start_fails("K26_EXPERTS=engine asks for SGLang's. Unset it"),
        serve(tiny_folder, tmp_path / "log", **settings),
    ):
        pass
