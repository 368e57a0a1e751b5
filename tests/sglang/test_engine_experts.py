"""SGLang's own experts, tested before they serve: its real kernels on the CPU, right and wrong."""

from __future__ import annotations

from pathlib import Path

import pytest
from support import layouts, sglang_wrong_experts
from support.entry_point import of_sglang
from support.server import start_fails
from support.sglang_server import HAS_ENTRY_POINT, serve

pytestmark = pytest.mark.long


@pytest.fixture(scope="module")
def dense_folder(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bfloat16 checkpoint, whose experts are SGLang's."""
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
