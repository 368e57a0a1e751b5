"""Tests of what vLLM reads from a checkpoint's folder before it loads weights, and of what it hands to its workers."""

from __future__ import annotations

import copy
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from support.layouts import OTHER, PUBLISHED, make
from support.remote_code import plant

from k26_plugins.common.adapters.serving import core_answer
from k26_plugins.common.model.config import K26Config
from k26_plugins.vllm import compat, config, register


def hf_config(folder: Path) -> Any:
    from vllm.transformers_utils.config import get_config

    return get_config(str(folder), trust_remote_code=False)


def test_the_configuration_is_understood_and_written_back(tiny_folder: Path) -> None:
    class ModelConfig:
        model = str(tiny_folder)
        revision = None

    ModelConfig.hf_config = hf_config(tiny_folder)  # type: ignore[attr-defined]
    ModelConfig.hf_config.vision_config.hidden_size = 1152  # type: ignore[attr-defined]
    config.prepare(ModelConfig)
    found = ModelConfig.hf_config  # type: ignore[attr-defined]
    assert found.vision_config.hidden_size == 144
    assert compat.media_token_id(found) == 277


def test_a_worker_without_the_package_cannot_read_the_configuration(tiny_folder: Path, tmp_path: Path) -> None:
    """A worker without the package, as on another machine of a Ray cluster, fails here. If every rank lacked the
    package, no rank could check the others later."""
    from vllm.config import ModelConfig

    register()
    model_config = ModelConfig(str(tiny_folder), enforce_eager=True, max_model_len=4096)
    (tmp_path / "config.pickle").write_bytes(pickle.dumps(copy.deepcopy(model_config)))
    read = "import pickle, sys; print(type(pickle.load(open(sys.argv[1], 'rb'))).__name__)"
    absent = "import sys; sys.modules['k26_plugins'] = None; "
    with_package, without = (
        subprocess.run(
            [sys.executable, "-c", before + read, str(tmp_path / "config.pickle")],
            check=False,
            capture_output=True,
            text=True,
        )
        for before in ("", absent)
    )
    assert with_package.stdout.strip().endswith("ModelConfig"), with_package.stderr
    assert without.returncode != 0
    assert "No module named 'k26_plugins" in without.stderr, without.stderr


@pytest.mark.parametrize("name", OTHER)
def test_another_layout_is_left_to_vllm(tiny_folder: Path, tmp_path: Path, name: str) -> None:
    """vLLM's own reading of the configuration decides whether the layout is the published one; if it is not, one
    warning gives the reason."""
    folder = make(OTHER[name][0], tiny_folder, tmp_path / "made")
    warnings: list[str] = []
    assert core_answer(hf_config(folder), folder, warnings.append) is None
    assert len(warnings) == 1
    assert "the engine's own code serves it" in warnings[0]


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_published_layout_is_the_cores(tiny_folder: Path, tmp_path: Path, name: str) -> None:
    folder = make(PUBLISHED[name], tiny_folder, tmp_path / "made")
    answer = core_answer(hf_config(folder), folder, pytest.fail)
    assert answer is not None
    assert answer.config == K26Config.from_path(folder)


@pytest.mark.parametrize("trusted", [False, True])
def test_no_file_of_the_checkpoint_is_executed(tiny_folder: Path, tmp_path: Path, trusted: bool) -> None:
    """vLLM builds the configuration, the tokenizer and the processor, all that comes before the model, without running
    a Python file of the checkpoint."""
    from vllm.config import ModelConfig
    from vllm.multimodal import MULTIMODAL_REGISTRY
    from vllm.tokenizers import cached_tokenizer_from_config

    register()
    mark = plant(tiny_folder, tmp_path / "DIR")
    model_config = ModelConfig(str(tmp_path / "DIR"), trust_remote_code=trusted, enforce_eager=True, max_model_len=4096)
    assert model_config.tokenizer_mode == compat.TOKENIZER_MODE
    cached_tokenizer_from_config(model_config)
    MULTIMODAL_REGISTRY.create_processor(model_config)
    assert not mark.exists(), mark.read_text()
