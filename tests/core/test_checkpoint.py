"""Tests of the table of tensors, of sharding, and of the check of a checkpoint's folder."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file, save_file

from k26_plugins.cli import app
from k26_plugins.common.checkpoint import (
    Checkpoint,
    CheckpointError,
    Fault,
    ShardError,
    account,
    check,
    shard,
    tensor_table,
)
from k26_plugins.common.model.config import K26Config

GATE = "language_model.model.layers.1.mlp.experts.3.gate_proj.weight_packed"
SCALE = "language_model.model.layers.1.mlp.experts.3.gate_proj.weight_scale"


def test_the_published_model_has_the_specifications_sums() -> None:
    table = tensor_table(K26Config())
    assert len(table) == 208_550
    assert sum(spec.num_bytes for spec in table.values()) == 595_148_192_736
    assert sum(name.startswith("vision_tower.") for name in table) == 329
    assert sum(name.startswith("mm_projector.") for name in table) == 6
    assert table["language_model.model.layers.60.mlp.experts.383.down_proj.weight_packed"].shape == (7168, 256)


@pytest.mark.parametrize("size", [2, 4])
def test_shards_put_together_give_the_whole(tiny_folder: Path, size: int) -> None:
    checkpoint = Checkpoint(tiny_folder)
    cut = 0
    for spec in checkpoint.table.values():
        whole = checkpoint.tensor(spec.name)
        if spec.shard_dim is None:
            assert shard(whole, spec, 1, size) is whole
            continue
        if (spec.shape[spec.shard_dim] // spec.shard_blocks) % size:
            with pytest.raises(ShardError, match="does not divide"):
                shard(whole, spec, 0, size)
            continue
        parts = [shard(whole, spec, rank, size) for rank in range(size)]
        blocks = [part.chunk(spec.shard_blocks, dim=spec.shard_dim) for part in parts]
        again = torch.cat([part for block in zip(*blocks, strict=True) for part in block], dim=spec.shard_dim)
        assert torch.equal(again, whole), spec.name
        cut += 1
    assert cut > 50


def test_tensors_are_views_of_the_mapped_file(tiny_folder: Path) -> None:
    checkpoint = Checkpoint(tiny_folder)
    for name, spec in checkpoint.table.items():
        tensor = checkpoint.tensor(name)
        assert tuple(tensor.shape) == spec.shape
    mapped = Path("/proc/self/maps")
    if mapped.exists():
        assert all(str(file) in mapped.read_text() for file in tiny_folder.glob("*.safetensors"))
    with pytest.raises(CheckpointError, match=r"nothing\.of\.this"):
        checkpoint.tensor("nothing.of.this")


@pytest.fixture
def copied(tiny_folder: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_folder, tmp_path / "copy"))


def _file_of(folder: Path, name: str) -> Path:
    return folder / str(json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"][name])


def test_a_whole_checkpoint_has_no_faults(tiny_folder: Path) -> None:
    report = check(tiny_folder)
    assert report.problems == []
    assert (report.num_files, report.num_tensors) == (3, 222)


def _fault(folder: Path) -> tuple[Fault, str]:
    report = check(folder)
    result = CliRunner().invoke(app, ["check", str(folder)])
    assert result.exit_code == 1
    assert report.problems[0].name in result.output
    return report.problems[0].fault, report.problems[0].name


@pytest.mark.parametrize("damage", ["missing", "extra", "wrong shape", "wrong dtype"])
def test_a_wrong_tensor_is_named(copied: Path, damage: str) -> None:
    file = _file_of(copied, GATE)
    weights = load_file(file)
    name = {"extra": "model.rotary.inv_freq", "wrong dtype": SCALE}.get(damage, GATE)
    if damage == "missing":
        del weights[GATE]
    elif damage == "extra":
        weights[name] = torch.zeros(4)
    elif damage == "wrong shape":
        weights[GATE] = weights[GATE][:-1].clone()
    else:
        weights[SCALE] = weights[SCALE].half()
    save_file(weights, file)
    assert _fault(copied) == (Fault(damage), name)


def test_a_truncated_file_names_the_tensors_that_it_lost(copied: Path) -> None:
    file = _file_of(copied, GATE)
    file.write_bytes(file.read_bytes()[:-100])
    fault, name = _fault(copied)
    assert fault == Fault.TRUNCATED
    assert _file_of(copied, name) == file


@pytest.mark.parametrize(
    "content", [b"", b"\xff" * 20, b"\x02\x00\x00\x00\x00\x00\x00\x00[]", b"\x08" + b"\x00" * 7 + b'{"a":{}}']
)
def test_a_file_without_a_header_is_named(copied: Path, content: bytes) -> None:
    file = _file_of(copied, GATE)
    file.write_bytes(content)
    problem = next(problem for problem in check(copied).problems if problem.fault == Fault.UNREADABLE)
    assert problem.name == file.name


def test_a_tensor_in_two_files_is_named(copied: Path) -> None:
    save_file({GATE: load_file(_file_of(copied, GATE))[GATE]}, copied / "again.safetensors")
    (copied / "model.safetensors.index.json").unlink()
    assert _fault(copied) == (Fault.REPEATED, GATE)


def test_a_folder_without_weights(copied: Path) -> None:
    for file in copied.glob("model*"):
        file.unlink()
    with pytest.raises(CheckpointError, match="no safetensors file"):
        check(copied)


def test_tensors_command_prints_the_sums(tiny_folder: Path) -> None:
    result = CliRunner().invoke(app, ["tensors", str(tiny_folder)])
    assert result.exit_code == 0
    assert "222 tensors, 8,007,392 bytes" in result.output


def test_accounting_of_what_the_loader_delivers(tiny_folder: Path) -> None:
    checkpoint = Checkpoint(tiny_folder)
    weights = [(name, checkpoint.tensor(name)) for name in checkpoint.table]
    passed = list(account(weights, checkpoint.config))
    assert [name for name, _ in passed] == list(checkpoint.table)

    def refused(delivered: list[tuple[str, torch.Tensor]], match: str) -> None:
        with pytest.raises(CheckpointError, match=match):
            list(account(delivered, checkpoint.config))

    scale = "language_model.model.layers.1.mlp.experts.0.gate_proj.weight_scale"
    half = [(name, tensor.half() if name == scale else tensor) for name, tensor in weights]
    refused(half, f"{scale} has dtype F16, expected BF16")
    refused(weights[:-1], f"missing.*{weights[-1][0]}")
    refused([*weights, weights[3]], f"{weights[3][0]} is in the checkpoint twice")
    refused([("other.weight", torch.zeros(1)), *weights], r"other.weight is not part of this model")
    without_expert = [pair for pair in weights if ".experts.7." not in pair[0]]
    refused(without_expert, "missing.*experts.7")
    filtered = account(without_expert, checkpoint.config, lambda spec: spec.expert != 7)
    assert len(list(filtered)) == len(without_expert)
