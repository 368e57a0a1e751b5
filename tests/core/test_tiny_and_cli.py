"""Tests of the tiny checkpoint and of the commands that make and read it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from PIL import Image
from safetensors import safe_open
from safetensors.torch import save_file
from support.videos import make_video

from k26_plugins.cli import app
from k26_plugins.common.checkpoint import check
from k26_plugins.common.checkpoint.tensor_file import save_tensors
from k26_plugins.common.model.config import ConfigError
from k26_plugins.common.tiny.checkpoint import TinySizes, make_tiny
from k26_plugins.common.tiny.draft import layers_read


def contents(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def test_the_same_seed_gives_the_same_bytes(tiny_folder: Path, tmp_path: Path) -> None:
    make_tiny(tmp_path / "same")
    make_tiny(tmp_path / "other", seed=1)
    assert contents(tmp_path / "same") == contents(tiny_folder)
    assert contents(tmp_path / "other") != contents(tiny_folder)


def test_other_sizes_are_whole_checkpoints(tmp_path: Path) -> None:
    make_tiny(tmp_path / "a", TinySizes(layers=2, experts=4, hidden_size=192, heads=2, vision_layers=1, shards=5))
    report = check(tmp_path / "a")
    assert (report.num_files, report.problems) == (5, [])


def test_sizes_that_cannot_be(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="moe_intermediate_size"):
        make_tiny(tmp_path / "a", TinySizes(moe_intermediate_size=40))
    with pytest.raises(ValueError, match="vocab_size is 300"):
        make_tiny(tmp_path / "a", TinySizes(vocab_size=300))
    assert not (tmp_path / "a").exists()


def test_adapters_and_a_draft_are_made_beside_it(tmp_path: Path) -> None:
    """PEFT's reader and `k26 merge` take the adapters. The draft reads the layers that its configuration names."""
    out = {name: str(tmp_path / name) for name in ("DIR", "LORA", "DRAFT", "OUT")}
    command = ["tiny", out["DIR"], "--layers", "5", "--lora", out["LORA"], "--eagle3", out["DRAFT"]]
    assert CliRunner().invoke(app, command).exit_code == 0
    names = set()
    for folder in (tmp_path / "LORA").iterdir():
        with safe_open(folder / "adapter_model.safetensors", framework="pt") as file:
            names |= {name.split("layers.")[0] for name in file.keys()}  # noqa: SIM118 - the file is no mapping
            assert len(file.keys()) == 2 * (5 * 4 + 5 * 3)
    beginnings = ("language_model.model.", "model.language_model.", "model.")
    assert names == {f"base_model.model.{beginning}" for beginning in beginnings}
    merged = CliRunner().invoke(app, ["merge", out["DIR"], str(folder), out["OUT"]])
    assert "35 linear layers were changed, 0 of them INT4." in merged.output
    config = json.loads((tmp_path / "DRAFT" / "config.json").read_text())
    assert config["eagle_config"]["eagle_aux_hidden_state_layer_ids"] == [2, 3, 4]
    with safe_open(tmp_path / "DRAFT" / "model.safetensors", framework="pt") as file:
        assert file.get_slice("fc.weight").get_shape() == [128, 3 * 128]


def test_a_draft_of_the_published_size_reads_the_published_layers() -> None:
    assert layers_read(61) == (2, 30, 58)


def test_a_draft_needs_layers_to_read(tmp_path: Path) -> None:
    result = CliRunner().invoke(app, ["tiny", str(tmp_path / "DIR"), "--eagle3", str(tmp_path / "DRAFT")])
    assert result.exit_code == 1
    assert "make it with --layers 5 or more" in " ".join(result.output.split())
    assert list(tmp_path.iterdir()) == []


def test_an_existing_folder_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    result = CliRunner().invoke(app, ["tiny", str(tmp_path)])
    assert result.exit_code == 1
    assert "not empty" in result.output
    assert [file.name for file in tmp_path.iterdir()] == ["file"]


def test_generate_answers_text_and_image(tiny_folder: Path, tmp_path: Path) -> None:
    image = tmp_path / "a.png"
    Image.new("RGB", (60, 40), (200, 10, 10)).save(image)
    command = ["generate", str(tiny_folder), "Hello", "--max-new-tokens", "4"]
    text = CliRunner().invoke(app, command)
    seen = CliRunner().invoke(app, [*command, "--image", str(image)])
    assert (text.exit_code, seen.exit_code) == (0, 0)
    assert text.output != seen.output


def test_media_shows_what_the_model_sees(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    pixels = np.random.default_rng(0).integers(0, 256, (60, 80, 3), dtype=np.uint8)
    Image.fromarray(pixels).save("a.png")
    Path("v.mp4").write_bytes(make_video(30))
    result = CliRunner().invoke(app, ["media", "a.png"])
    assert result.exit_code == 0, result.output
    assert "1 frames, 9 tokens; picture: a-k26.png" in result.output
    with Image.open("a-k26.png") as sheet:
        # The picture has 84 × 84 pixels with the padding, 4 around it, and a label of 16 above it.
        assert np.array_equal(np.asarray(sheet)[20:80, 4:84], pixels)
        assert np.asarray(sheet)[80:104, 4:88].max() == 0
    result = CliRunner().invoke(app, ["media", "v.mp4", "--sheet", "sheet.png"])
    assert "6 frames, 12 tokens; picture: sheet.png" in result.output
    assert "00:00:02.299" in result.output
    assert Path("sheet.png").exists()
    Path("text.png").write_text("neither")
    result = CliRunner().invoke(app, ["media", "text.png"])
    assert result.exit_code == 1
    assert "as an image:" in result.output
    assert "as a video:" in result.output.lower()


@pytest.mark.parametrize("arguments", [["generate", "nowhere", "Hi"], ["check", "nowhere"], ["tensors", "nowhere"]])
def test_a_folder_that_is_not_there(arguments: list[str]) -> None:
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 1
    assert "does not exist" in result.output


def test_importing_the_package_is_light() -> None:
    """The engines import the package in every process: neither torch nor an engine may come with it."""
    heavy = ("torch", "transformers", "vllm")
    code = f"import sys, k26_plugins, k26_plugins.vllm; print([name for name in {heavy} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


COMPUTING = ("torch", "transformers", "pydantic")
HEAVY = (*COMPUTING, "numpy", "rich", "markdown_it", "pygments", "concurrent.futures", "asyncio")


@pytest.mark.parametrize(
    ("command", "heavy"),
    [(["--help"], HEAVY), (["plan", "--gpus", "8xH200"], HEAVY), (["check", "FOLDER"], COMPUTING)],
)
def test_what_answers_at_once_imports_nothing_heavy(
    command: list[str], heavy: tuple[str, ...], tiny_folder: Path
) -> None:
    """Importing torch takes two seconds. Importing the other modules takes as long as all else that these commands do,
    and the commands do not need them."""
    arguments = [str(tiny_folder) if argument == "FOLDER" else argument for argument in command]
    imported = f"[name for name in {heavy} if name in sys.modules]"
    code = (
        f"import sys\nfrom k26_plugins.cli import app\ntry: app({arguments})\nfinally: print('imported:', {imported})"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip().splitlines()[-1] == "imported: []"


def test_written_files_are_safetensors_own(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    tensors = {
        "b.ü": torch.randn(3, 5, generator=generator).to(torch.bfloat16),
        "a": torch.randint(-9, 9, (7, 2), generator=generator, dtype=torch.int32).t(),
        "c": torch.randn(4, generator=generator, dtype=torch.float64),
        "empty": torch.empty(0, 3),
        "none": torch.tensor(True),
        "d": torch.arange(3, dtype=torch.uint8),
    }
    save_tensors(tensors, tmp_path / "ours", {"format": "pt"})
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, tmp_path / "theirs", {"format": "pt"})
    assert (tmp_path / "ours").read_bytes() == (tmp_path / "theirs").read_bytes()
