"""Tests of the weights that vLLM's loader hands to a layer's experts and to the model."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from k26_plugins.common.checkpoint import Checkpoint, CheckpointError, expert_name, shard
from k26_plugins.vllm import compat, names
from k26_plugins.vllm.experts import K26ExpertsMethod


def test_the_methods_weights_are_the_checkpoints(tiny_folder: Path) -> None:
    """One layer's experts, made and loaded by hand, give the same result as a whole and as the sum of two
    tensor-parallel ranks."""
    checkpoint = Checkpoint(tiny_folder)
    text = checkpoint.config.text
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(9, text.hidden_size, generator=generator).to(torch.bfloat16)
    ids = torch.randint(0, text.n_routed_experts, (9, 2), generator=generator, dtype=torch.int32)
    weights = torch.rand(9, 2, generator=generator)

    def run(rank: int, size: int) -> torch.Tensor:
        layer = torch.nn.Module()
        inner = text.moe_intermediate_size // size
        method = K26ExpertsMethod.__new__(K26ExpertsMethod)
        method.backend_name = "auto"
        method.create_weights(layer, text.n_routed_experts, text.hidden_size, inner, torch.bfloat16)
        for expert in range(text.n_routed_experts):
            for part in ("packed", "scale"):
                cut = {
                    projection: shard(checkpoint.tensor(name), checkpoint.table[name], rank, size)
                    for projection in ("gate", "up", "down")
                    for name in [expert_name(1, expert, projection, part)]
                }
                getattr(layer, f"w13_weight_{part}").data[expert] = torch.cat((cut["gate"], cut["up"]))
                getattr(layer, f"w2_weight_{part}").data[expert] = cut["down"]
        method.experts.close()
        out = torch.empty_like(x)
        method.experts.apply(out, x, weights, ids)
        return out.float()

    whole = run(0, 1)
    assert ((run(0, 2) + run(1, 2) - whole).norm() / whole.norm()).item() < 6e-3


def test_what_must_be_loaded_is_what_vllms_loader_promises(tiny_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every tensor of the checkpoint must be loaded except those that the loader's own filters leave out: the experts
    of other ranks, or the language model in a server of the encoder."""
    from vllm.config.load import LoadConfig
    from vllm.model_executor.model_loader.default_loader import DefaultModelLoader

    from k26_plugins.vllm.model import KimiK25ForConditionalGeneration, whole_checkpoint

    checkpoint = Checkpoint(tiny_folder)
    read = list(checkpoint.table)
    monkeypatch.setattr(DefaultModelLoader, "get_all_weights", DefaultModelLoader.get_all_weights)
    compat.ENGINE.hook(whole_checkpoint, names.GET_ALL_WEIGHTS)
    monkeypatch.setattr(
        DefaultModelLoader, "_get_weights_iterator", lambda self, source: ((n, checkpoint.tensor(n)) for n in read)
    )
    model = KimiK25ForConditionalGeneration.__new__(KimiK25ForConditionalGeneration)
    torch.nn.Module.__init__(model)
    model.core_config = checkpoint.config
    loader = DefaultModelLoader(LoadConfig())

    class ModelConfig:
        model, revision = str(tiny_folder), None

    def loaded() -> list[str]:
        return [name for name, _ in loader.get_all_weights(ModelConfig, model)]

    assert loaded() == read
    read = [name for name, spec in checkpoint.table.items() if spec.expert in (None, 0, 1)]
    with pytest.raises(CheckpointError, match=r"missing from the checkpoint: .*experts\.2\."):
        loaded()
    loader.local_expert_ids = {0, 1}
    assert loaded() == read
    read = [name for name in read if not name.startswith("language_model.")]
    with pytest.raises(CheckpointError, match=r"missing from the checkpoint: language_model\."):
        loaded()
    loader._encoder_only_lm_prefixes = ("language_model.",)
    assert loaded() == read
