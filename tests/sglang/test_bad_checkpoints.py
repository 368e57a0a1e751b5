"""A checkpoint that is not whole stops SGLang's server, with the same words as vLLM's."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from support.checkpoints import DAMAGES, WRONG_SETTING
from support.server import StartError
from support.sglang_server import serve


@pytest.mark.parametrize("name", DAMAGES)
def test_the_start_stops_with_the_name(tiny_folder: Path, tmp_path: Path, name: str) -> None:
    damage, message = DAMAGES[name]
    folder = Path(shutil.copytree(tiny_folder, tmp_path / "copy"))
    damage(folder)
    with pytest.raises(StartError) as raised, serve(folder, tmp_path / "log"):
        pass
    assert message in str(raised.value)


def test_a_wrong_setting_stops_with_its_name(tiny_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(StartError) as raised, serve(tiny_folder, tmp_path / "log", K26_EXPERTS="marlin"):
        pass
    assert WRONG_SETTING in str(raised.value)
