"""Tests of what SGLang reads from a checkpoint's folder before it loads weights."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from support.layouts import OTHER, PUBLISHED, make
from support.remote_code import plant
from support.sglang_parts import hf_utils

from k26_plugins.common.model.config import ConfigError


def test_the_configuration_is_understood_in_the_hubs_spelling(tiny_folder: Path, tmp_path: Path) -> None:
    """The hub's config.json lacks the names that SGLang's own configuration class reads; that class would take the
    published model's sizes for them."""
    folder = Path(shutil.copytree(tiny_folder, tmp_path / "hub"))
    content = json.loads((folder / "config.json").read_text())
    vision = content["vision_config"]
    content["vision_config"] = {name: value for name, value in vision.items() if f"vt_{name}" not in vision}
    (folder / "config.json").write_text(json.dumps(content))
    found = hf_utils().get_config(str(folder), trust_remote_code=False)
    assert type(found).__name__ == "KimiK25Config"
    assert found.vision_config.hidden_size == vision["vt_hidden_size"] == 144
    assert found.vision_config.num_hidden_layers == 2


def test_a_configuration_of_another_model_is_refused(tiny_folder: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(tiny_folder, tmp_path / "other"))
    content = json.loads((folder / "config.json").read_text())
    content["text_config"]["kv_lora_rank"] = -1
    (folder / "config.json").write_text(json.dumps(content))
    with pytest.raises(ConfigError, match=r"text_config.kv_lora_rank"):
        hf_utils().get_config(str(folder), trust_remote_code=False)


@pytest.mark.parametrize("name", OTHER)
def test_another_layout_is_left_to_sglang(
    tiny_folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, name: str
) -> None:
    """SGLang's own reading of the configuration decides whether the layout is the published one; if it is not, one line
    of the log gives the reason."""
    folder = make(OTHER[name][0], tiny_folder, tmp_path / "made")
    config = hf_utils().get_config(str(folder), trust_remote_code=False)
    assert not config.k26_published_layout
    assert caplog.text.count("the engine's own code serves it") == 1


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_published_layout_is_the_cores(tiny_folder: Path, tmp_path: Path, name: str) -> None:
    folder = make(PUBLISHED[name], tiny_folder, tmp_path / "made")
    assert hf_utils().get_config(str(folder), trust_remote_code=False).k26_published_layout


def test_no_file_of_the_checkpoint_is_executed(tiny_folder: Path, tmp_path: Path) -> None:
    """The configuration, the tokenizer and the processor, which every process reads with the value of
    --trust-remote-code, are read without running a Python file of the checkpoint."""
    utils = hf_utils()
    mark = plant(tiny_folder, tmp_path / "DIR")
    for read in (utils.get_config, utils.get_tokenizer, utils.get_processor):
        read(str(tmp_path / "DIR"), trust_remote_code=True)
    assert not mark.exists(), mark.read_text()
