"""Tests of what `k26 check` says of a folder: which files are faulty, why, and what to do. The judge of a whole file is
safetensors' own reader."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest
from click.testing import CliRunner
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from support.layouts import OTHER, make

from k26_plugins.cli import app
from k26_plugins.common.checkpoint import CheckpointError, check, classify_folder

FIRST = "model-00001-of-000003.safetensors"


@pytest.fixture
def copied(tiny_folder: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_folder, tmp_path / "copy"))


def said(folder: Path, code: int = 1) -> list[str]:
    """Return the lines that the command prints after asserting its exit code; if it is 1, assert that a server's start
    refuses the folder too."""
    result = CliRunner().invoke(app, ["check", str(folder)])
    assert result.exit_code == code, result.output
    if code:
        with pytest.raises(CheckpointError):
            classify_folder(folder)
    return [line for line in result.output.splitlines() if line.strip()]


def test_a_missing_file_is_one_line(copied: Path) -> None:
    index = json.loads((copied / "model.safetensors.index.json").read_text())["weight_map"]
    count = sum(file == FIRST for file in index.values())
    (copied / FIRST).unlink()
    lines = said(copied)
    assert lines[0] == f"missing file: {FIRST} is not in the folder, with {count} tensors: download it."
    assert lines[-1] == "error: 1 faults."
    assert f"{222 - count} tensors" in lines[1]


def test_a_file_that_this_user_may_not_read(copied: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened = Path.open

    def refuse(file: Path, *args: object, **kwargs: object) -> object:
        if file.name == FIRST:
            raise PermissionError(13, os.strerror(13))
        return opened(file, *args, **kwargs)  # type: ignore[call-overload]

    monkeypatch.setattr(Path, "open", refuse)
    remedy = "let this user read it: chmod, or start as its owner."
    assert said(copied)[0] == f"unreadable: {FIRST} cannot be read (Permission denied): {remedy}"


def test_a_pointer_is_no_file(copied: Path) -> None:
    (copied / FIRST).write_text(f"version https://git-lfs.github.com/spec/v1\noid sha256:{'0' * 64}\nsize 9809268736\n")
    line = said(copied)[0]
    assert line.startswith(f"unreadable: {FIRST} is a Git LFS pointer of 135 bytes, not the file: `git lfs pull`")


def test_a_file_ends_with_its_last_tensor(copied: Path) -> None:
    with (copied / FIRST).open("ab") as file:
        file.write(bytes(4096))
    with pytest.raises(SafetensorError), safe_open(copied / FIRST, "pt"):
        pass
    assert said(copied)[0] == (
        f"wrong end: {FIRST} has 4,096 bytes behind its last tensor, where a file ends: download it again."
    )


@pytest.mark.parametrize(
    "left", [f"{FIRST}.aria2", f"{FIRST}.part", ".cache/huggingface/download/Qk3-9=.0a1b.incomplete"]
)
def test_an_unfinished_download(copied: Path, left: str) -> None:
    """An unfinished download is found although every header and size is right, because aria2 creates the file at its
    full size, full of holes."""
    file = copied / left
    file.parent.mkdir(parents=True, exist_ok=True)
    file.touch()
    assert said(copied)[0].startswith(f"unfinished download: {left} is what a download keeps until it is done")


def test_the_hubs_locks_stay_behind_whole_files(copied: Path) -> None:
    lock = copied / ".cache/huggingface/download" / f"{FIRST}.lock"
    lock.parent.mkdir(parents=True)
    lock.touch()
    assert said(copied, code=0)[-1].endswith("files are right.")


def test_tensors_of_a_layer_are_one_line_and_files_are_named(copied: Path) -> None:
    """A shard has lost its experts and holds a tensor that is not of this model."""
    index = json.loads((copied / "model.safetensors.index.json").read_text())["weight_map"]
    file = index["language_model.model.layers.1.mlp.experts.3.down_proj.weight_packed"]
    weights = load_file(copied / file)
    lost = [name for name in weights if ".layers.1.mlp.experts." in name]
    extra = {"model.rotary.inv_freq": next(iter(weights.values())).clone()}
    save_file({name: tensor for name, tensor in weights.items() if name not in lost} | extra, copied / file)
    lines = said(copied)
    assert len(lost) > 8
    assert lines[0].startswith(
        f"missing: {len(lost)} tensors of language_model.model.layers.1, such as {min(lost)} should"
    )
    assert lines[1].startswith(f"extra: model.rotary.inv_freq in {file} is not part of this model: remove that file")
    assert len(lines) == 4


@pytest.mark.parametrize("name", ["NVFP4 by modelopt", "an MTP layer", "bf16", "GGUF"])
def test_another_layout_is_no_damage(tiny_folder: Path, tmp_path: Path, name: str) -> None:
    """`k26 check` prints the reasons for another layout that engines are told too, and reports no fault."""
    folder = make(OTHER[name][0], tiny_folder, tmp_path / "other")
    lines = said(folder, code=0)
    reasons = classify_folder(folder).reasons
    assert [line.strip() for line in lines if line.startswith("  ")] == list(reasons)
    assert check(folder).problems == []
