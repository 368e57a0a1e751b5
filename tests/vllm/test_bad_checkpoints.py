"""Tests that a damaged checkpoint or a wrong setting stops `vllm serve`, with the name of the fault in what it
prints."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest
from support.checkpoints import DAMAGES, WRONG_SETTING
from support.server import start_fails
from support.vllm_server import serve
from vllm.config import ModelConfig

from k26_plugins.vllm import register


def damaged(name: str, whole: Path, folder: Path) -> Path:
    shutil.copytree(whole, folder)
    DAMAGES[name][0](folder)
    return folder


def configure(folder: Path) -> None:
    """Run what a start does in the process that the user looks at, before any other process is started."""
    register()
    ModelConfig(str(folder), enforce_eager=True, max_model_len=4096)


@pytest.mark.parametrize("name", DAMAGES)
def test_the_start_stops_with_the_name(tiny_folder: Path, tmp_path: Path, name: str) -> None:
    folder = damaged(name, tiny_folder, tmp_path / "copy")
    with pytest.raises(ValueError, match=re.escape(DAMAGES[name][1])):
        configure(folder)


def test_the_server_prints_it_and_ends(tiny_folder: Path, tmp_path: Path) -> None:
    with (
        start_fails(re.escape(DAMAGES["missing"][1])),
        serve(damaged("missing", tiny_folder, tmp_path / "copy"), tmp_path / "log", "--enforce-eager"),
    ):
        pass


def test_a_wrong_setting_stops_with_its_name(tiny_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("K26_EXPERTS", "marlin")
    with pytest.raises(ValueError, match=re.escape(WRONG_SETTING)):
        configure(tiny_folder)
