"""A checkpoint that is not whole stops `vllm serve`, with the tensor's or field's name in what it prints."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file
from server import StartError, serve

EXPERT = "language_model.model.layers.2.mlp.experts.5.down_proj"


def _file_of(folder: Path, name: str) -> Path:
    return folder / str(json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"][name])


def truncate(folder: Path) -> None:
    file = _file_of(folder, f"{EXPERT}.weight_packed")
    file.write_bytes(file.read_bytes()[:-1000])


def drop(folder: Path) -> None:
    file = _file_of(folder, f"{EXPERT}.weight_packed")
    weights = load_file(file)
    del weights[f"{EXPERT}.weight_packed"]
    save_file(weights, file)


def half_scales(folder: Path) -> None:
    file = _file_of(folder, f"{EXPERT}.weight_scale")
    weights = load_file(file)
    weights[f"{EXPERT}.weight_scale"] = weights[f"{EXPERT}.weight_scale"].half()
    save_file(weights, file)


def another_model(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    config["text_config"]["scoring_func"] = "softmax"
    (folder / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (truncate, "truncated: "),
        (drop, f"missing: {EXPERT}.weight_packed should be I32"),
        (half_scales, f"wrong dtype: {EXPERT}.weight_scale has dtype F16, expected BF16"),
        (another_model, "'text_config.scoring_func' is 'softmax', expected 'sigmoid'"),
    ],
    ids=["truncated", "missing", "float16-scales", "another-model"],
)
def test_the_start_stops_with_the_name(
    tiny_folder: Path, tmp_path: Path, damage: Callable[[Path], None], message: str
) -> None:
    folder = Path(shutil.copytree(tiny_folder, tmp_path / "copy"))
    damage(folder)
    with pytest.raises(StartError) as raised, serve(folder, tmp_path / "log", "--enforce-eager"):
        pass
    assert message in str(raised.value)


def test_a_wrong_setting_stops_with_its_name(tiny_folder: Path, tmp_path: Path) -> None:
    with (
        pytest.raises(StartError) as raised,
        serve(tiny_folder, tmp_path / "log", "--enforce-eager", K26_EXPERTS="marlin"),
    ):
        pass
    assert "K26_EXPERTS is 'marlin': choose one of auto, engine, cpu, reference" in str(raised.value)
