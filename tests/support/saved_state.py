"""Saves a model as an engine does for `--load-format sharded_state`, and loads it again, each in a separate process.

The engine's own functions save and load:

    python -m support.saved_state save FOLDER SAVED
    python -m support.saved_state load FOLDER SAVED

Each command prints one line of JSON: the layers' backends of experts, their outputs, and a hash of each parameter.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from support.experts import inputs, route
from support.quick import make_quick
from support.server import python_path
from support.whole_load import start_sglang, start_vllm

from k26_plugins.common.experts.loading import ExpertsOfLayer
from k26_plugins.common.experts.saving import in_checkpoint_form
from k26_plugins.common.model.config import K26Config
from k26_plugins.common.tiny.checkpoint import TinySizes

PART_BYTES = 500_000
"""The largest size of a saved file in bytes, so small that a rank's state takes several files."""


def run(step: str, folder: Path, saved: Path, **environment: str) -> dict[str, Any]:
    """Run `main` in a separate process with these environment variables, and return its report.

    step: `save` or `load`. Raises AssertionError with the end of the error output if the process fails.
    """
    command = [sys.executable, "-m", "support.saved_state", step, str(folder), str(saved)]
    settings = {**os.environ, "PYTHONPATH": python_path(), **environment}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=settings, timeout=500)
    assert done.returncode == 0, f"exit status {done.returncode}\n{done.stderr[-3000:]}"
    report: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return report


class SavedStateTests:
    """Tests that each engine's tests derive, and run with that engine."""

    @pytest.mark.parametrize("small_files", ["all", "without the index"])
    def test_a_saved_state_is_the_checkpoint_again(self, tmp_path: Path, small_files: str) -> None:
        """A saved state holds the checkpoint's weights: another backend of experts loads it and computes the same.
        Users who copy all small files of the checkpoint beside it, as the engines' examples do, copy the checkpoint's
        index too."""
        folder, saved = tmp_path / "checkpoint", tmp_path / "saved"
        make_quick(folder, TinySizes())
        saved.mkdir()
        before = run("save", folder, saved)
        assert len(list(saved.glob("model-rank-0-part-*.safetensors"))) > 2
        for file in folder.iterdir():
            if file.suffix != ".safetensors" and (small_files == "all" or file.name != "model.safetensors.index.json"):
                shutil.copy(file, saved)
        after = run("load", folder, saved, K26_EXPERTS="reference")
        assert before.pop("backends") != after.pop("backends") == ["reference"]
        outputs, expected = (torch.tensor(one.pop("outputs")) for one in (after, before))
        assert ((outputs - expected).norm() / expected.norm()).item() < 6e-3
        assert before["parameters"] == after["parameters"]
        assert any("experts" in name and "w13_weight_packed" in name for name in after["parameters"])
        with pytest.raises(
            AssertionError, match=r"an engine saved, not a checkpoint: give --load-format sharded_state"
        ):
            run("save", saved, tmp_path)


def main(step: str, folder: str, saved: str) -> None:
    """Load the checkpoint in `folder` and save its state to `saved`, or load that state, and print the report.

    step: `save` or `load`.
    """
    load = load_by_sglang if find_spec("sglang.srt") else load_by_vllm
    model, save, layers = load(folder) if step == "save" else load(saved, load_format="sharded_state")
    if step == "save":
        save(model, saved, max_size=PART_BYTES)
    config = K26Config.from_path(folder)
    text = config.text
    x, (ids, weights) = inputs(20, text.hidden_size), route(20, text.num_experts_per_tok, text.n_routed_experts)
    report: dict[str, Any] = {"backends": sorted({layer.experts.backend_name for layer in layers}), "outputs": []}
    for layer in layers:
        out = torch.empty_like(x)
        layer.experts.apply(out, x, weights, ids)
        report["outputs"].append(out.float().flatten().tolist())
    with in_checkpoint_form(layers):
        report["parameters"] = {name: _digest(tensor) for name, tensor in model.state_dict().items()}
    print(json.dumps(report))


def _digest(tensor: torch.Tensor) -> str:
    held = tensor.detach().contiguous().flatten().view(torch.uint8)
    return hashlib.sha256(held.numpy().tobytes()).hexdigest()


Loaded = tuple[torch.nn.Module, Callable[..., None], list[ExpertsOfLayer]]


def load_by_vllm(folder: str, **arguments: Any) -> Loaded:
    """Load a model by vLLM, and return it, vLLM's function that saves its state, and its layers' experts."""
    config = start_vllm(Path(folder), **arguments)
    from vllm.config import set_current_vllm_config
    from vllm.model_executor.layers import utils
    from vllm.model_executor.model_loader import ShardedStateLoader, get_model_loader

    from k26_plugins.vllm.experts import experts_of

    # On a CPU vLLM packs dense weights for AMX or oneDNN and drops the originals, so that it cannot load a state again
    # that it saved there, whatever the model. On a GPU it keeps them.
    torch.cpu._is_amx_tile_supported = lambda: False
    dispatch = utils.dispatch_cpu_unquantized_gemm
    utils.dispatch_cpu_unquantized_gemm = lambda layer, remove_weight: dispatch(layer, remove_weight=False)
    # vLLM's worker on a CPU replaces this function too.
    torch.accelerator.empty_cache = lambda: None
    with set_current_vllm_config(config):
        loader = get_model_loader(config.load_config)
        model = loader.load_model(vllm_config=config, model_config=config.model_config)
    # Since 0.28 the tensors that MLA derives from its weights are parameters too, and vLLM fails to save those.
    for module in model.modules():
        for name in ("W_UV", "W_UK_T"):
            if name in module._parameters:
                derived = module._parameters.pop(name)
                setattr(module, name, derived.data)
    return model, ShardedStateLoader.save_model, list(experts_of(model).values())


def load_by_sglang(folder: str, **arguments: Any) -> Loaded:
    """Load a model by SGLang, and return it, SGLang's function that saves its state, and its layers' experts."""
    config = start_sglang(Path(folder), **arguments)
    from sglang.srt.configs.device_config import DeviceConfig
    from sglang.srt.configs.load_config import LoadConfig
    from sglang.srt.model_loader import get_model_loader
    from sglang.srt.model_loader.loader import ShardedStateLoader

    from k26_plugins.sglang.experts import experts_of

    loader = get_model_loader(LoadConfig(**arguments), config)
    model = loader.load_model(model_config=config, device_config=DeviceConfig("cpu", 0))
    return model, ShardedStateLoader.save_model, list(experts_of(model).values())


if __name__ == "__main__":
    main(*sys.argv[1:])
