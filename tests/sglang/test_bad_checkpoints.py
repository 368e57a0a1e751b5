"""Tests that a damaged checkpoint or a wrong setting stops SGLang's server, with the same error text as vLLM's."""

from __future__ import annotations

import os
import re
import shutil
from pathlib import Path

import pytest
from support.checkpoints import DAMAGES, WRONG_SETTING
from support.server import start_fails
from support.sglang_server import serve

# SGLang reads this variable when it is imported, which nothing above does.
os.environ["SGLANG_USE_CPU_ENGINE"] = "1"


def damaged(name: str, whole: Path, folder: Path) -> Path:
    shutil.copytree(whole, folder)
    DAMAGES[name][0](folder)
    return folder


def configure(folder: Path) -> None:
    """Run the first step of a server's start, which happens in the process that the user looks at."""
    import sglang.srt.utils.hf_transformers_utils as utils

    from k26_plugins.sglang import register

    register()
    utils.get_config(str(folder), trust_remote_code=False)


@pytest.mark.parametrize("name", DAMAGES)
def test_the_start_stops_with_the_name(tiny_folder: Path, tmp_path: Path, name: str) -> None:
    folder = damaged(name, tiny_folder, tmp_path / "copy")
    with pytest.raises(ValueError, match=re.escape(DAMAGES[name][1])):
        configure(folder)


def test_the_server_prints_it_and_ends(tiny_folder: Path, tmp_path: Path) -> None:
    with (
        start_fails(re.escape(DAMAGES["missing"][1])),
        serve(damaged("missing", tiny_folder, tmp_path / "copy"), tmp_path / "log"),
    ):
        pass


def test_a_wrong_setting_stops_with_its_name(
    tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("K26_EXPERTS", "marlin")
    # The folder is a copy because SGLang caches the configuration of a folder that it has read.
    folder = Path(shutil.copytree(tiny_folder, tmp_path / "copy"))
    with pytest.raises(ValueError, match=re.escape(WRONG_SETTING)):
        configure(folder)
