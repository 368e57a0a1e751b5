"""Tests of `k26 merge`, whose checkpoint is held against the sum of its parts in float32."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file, save_file
from support.adapters import KV_B, LAYER, MODULES, merged
from support.agreement import divergence

from k26_plugins.cli import app
from k26_plugins.common.checkpoint import Checkpoint, check
from k26_plugins.common.checkpoint.adapter_names import BEGINNINGS
from k26_plugins.common.reference.kimi_k26 import KimiK26
from k26_plugins.common.tiny.adapter import ALPHA, RANK, Adapter, dense_weight

EXPERTS = tuple(f"{LAYER.format(2)}.mlp.experts.{expert}.{name}_proj" for expert in (0, 3) for name in ("gate", "down"))
VISION = "vision_tower.encoder.blocks.1.mlp.fc0"
PROMPT = torch.randint(0, 256, (100,), generator=torch.Generator().manual_seed(3))


def draw(folder: Path, modules: tuple[str, ...], seed: int) -> Adapter:
    return Adapter.draw(Checkpoint(folder), modules, seed)


def run(folder: Path, adapter: Path, out: Path, code: int = 0) -> str:
    result = CliRunner().invoke(app, ["merge", str(folder), str(adapter), str(out)])
    assert result.exit_code == code, result.output
    return result.output


@pytest.mark.parametrize("beginning", BEGINNINGS.values())
def test_a_merged_checkpoint_is_the_sum(tiny_folder: Path, tmp_path: Path, beginning: str) -> None:
    modules = (*MODULES, KV_B, *EXPERTS, VISION)
    adapter = draw(tiny_folder, modules, seed=1)
    output = run(tiny_folder, adapter.write(tmp_path / "adapter", beginning), tmp_path / "out")
    assert f"{len(modules)} linear layers were changed, {len(EXPERTS)} of them INT4." in output
    assert not check(tmp_path / "out").problems
    before, after = Checkpoint(tiny_folder), Checkpoint(tmp_path / "out")
    for module, (a, b) in adapter.weights.items():
        exact = dense_weight(before, module) + ALPHA / RANK * (b @ a)
        if module in EXPERTS:
            scale = after.tensor(f"{module}.weight_scale").float().repeat_interleave(32, dim=1)
            # The bound is half a step, plus bfloat16's rounding of the step for a group's largest, eight steps away.
            assert ((dense_weight(after, module) - exact).abs() <= scale * (0.5 + 8 * 2**-8)).all()
        else:
            assert torch.equal(after.tensor(f"{module}.weight"), exact.to(torch.bfloat16))
    for name in before.table:
        if name.rsplit(".", 1)[0] not in adapter.weights:
            assert torch.equal(before.tensor(name), after.tensor(name)), name
    for file in tiny_folder.iterdir():
        if file.suffix != ".safetensors":
            assert (tmp_path / "out" / file.name).read_bytes() == file.read_bytes()


def test_it_answers_as_the_float32_sum(tiny_folder: Path, tmp_path: Path) -> None:
    adapter = draw(tiny_folder, MODULES, seed=2)
    run(tiny_folder, adapter.write(tmp_path / "adapter", "model."), tmp_path / "out")
    expected = merged(adapter, Checkpoint(tiny_folder)).logprobs(PROMPT)
    found = KimiK26(Checkpoint(tmp_path / "out"), torch.float32).logprobs(PROMPT)
    base = KimiK26(Checkpoint(tiny_folder), torch.float32).logprobs(PROMPT)

    def distance(other: torch.Tensor) -> float:
        return divergence(other, expected).mean().item()

    assert distance(found) < 1e-3 < 0.05 < distance(base)


def test_settings_of_single_modules(tiny_folder: Path, tmp_path: Path) -> None:
    """One module has its own alpha by `alpha_pattern`, and each change is divided by the root of its rank (rsLoRA)."""
    adapter = draw(tiny_folder, MODULES[:2], seed=3)
    folder = adapter.write(tmp_path / "adapter", "model.")
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(
        json.dumps({**config, "use_rslora": True, "alpha_pattern": {"self_attn.q_a_proj": 3}})
    )
    run(tiny_folder, folder, tmp_path / "out")
    before, after = Checkpoint(tiny_folder), Checkpoint(tmp_path / "out")
    for module, alpha in zip(MODULES[:2], (3, ALPHA), strict=True):
        a, b = adapter.weights[module]
        exact = dense_weight(before, module) + alpha / RANK**0.5 * (b @ a)
        assert torch.equal(after.tensor(f"{module}.weight"), exact.to(torch.bfloat16))


def spoil(folder: Path, what: str) -> str:
    """Spoil the adapter, and return what the message must say."""
    file, config = folder / "adapter_model.safetensors", folder / "adapter_config.json"
    tensors = load_file(file)
    first = next(name for name in sorted(tensors) if name.endswith("lora_A.weight"))
    module = first.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
    if what == "no configuration":
        config.unlink()
        return "adapter_config.json"
    if what == "cut off":
        file.write_bytes(file.read_bytes()[:-100])
        return "adapter_model.safetensors cannot be read"
    if what == "DoRA":
        config.write_text(json.dumps({**json.loads(config.read_text()), "use_dora": True}))
        return "another kind of adapter"
    if what == "half":
        del tensors[first]
        said = f"half of the change of {module}"
    elif what == "another model's":
        tensors[first] = tensors[first][:, :-1].contiguous()
        said = f"{module} by"
    elif what == "no such layer":
        tensors = {name.replace("self_attn.", "attention."): tensor for name, tensor in tensors.items()}
        said = "has no such linear layer"
    else:
        tensors["base_model.model.lm_head.weight"] = torch.ones(2, 2)
        said = "base_model.model.lm_head.weight, which is no A or B"
    save_file(tensors, file)
    return said


@pytest.mark.parametrize(
    "what", ["no configuration", "cut off", "DoRA", "half", "another model's", "no such layer", "a whole module"]
)
def test_what_cannot_be_merged_is_named(tiny_folder: Path, tmp_path: Path, what: str) -> None:
    folder = draw(tiny_folder, MODULES[:2], seed=4).write(tmp_path / "adapter", "model.")
    said = spoil(folder, what)
    assert said in run(tiny_folder, folder, tmp_path / "out", code=1)
    assert not (tmp_path / "out").exists()


def test_a_folder_that_is_not_empty_is_left_alone(tiny_folder: Path, tmp_path: Path) -> None:
    folder = draw(tiny_folder, MODULES[:1], seed=5).write(tmp_path / "adapter", "model.")
    shutil.copytree(tiny_folder, tmp_path / "out")
    before = {file.name: file.read_bytes() for file in (tmp_path / "out").iterdir()}
    assert "is not empty" in run(tiny_folder, folder, tmp_path / "out", code=1)
    assert {file.name: file.read_bytes() for file in (tmp_path / "out").iterdir()} == before
