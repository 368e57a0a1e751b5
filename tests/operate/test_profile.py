"""Tests that `k26 profile` counts every use of an expert, and that the router chose it."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from click.testing import CliRunner

from k26_plugins.cli import app
from k26_plugins.common.experts.placement import Profile
from k26_plugins.common.model.config import K26Config


def test_every_token_chooses_its_experts_in_every_layer(tiny_folder: Path, prompts_file: Path, tmp_path: Path) -> None:
    target = tmp_path / "profile.json"
    command = ["profile", str(tiny_folder), "--prompts", str(prompts_file), "--save", str(target)]
    result = CliRunner().invoke(app, [*command, "--ram-bandwidth", "300"])
    assert result.exit_code == 0, result.output
    config = K26Config.from_path(tiny_folder)
    profile = Profile.load(target, config)
    assert f"{profile.num_tokens:,} tokens" in result.output
    uses = [sum(layer) for layer in profile.counts]
    # The first layer is dense.
    assert uses == [0, *[profile.num_tokens * config.text.num_experts_per_tok] * 2]


def test_the_counts_are_the_router_s(tiny_folder: Path, tmp_path: Path) -> None:
    """The experts of one token in the second layer are computed by hand, in float64, from what enters that layer's
    router."""
    from k26_plugins.common.checkpoint import Checkpoint
    from k26_plugins.common.reference.decoder import KVCache, rms_norm
    from k26_plugins.common.reference.kimi_k26 import KimiK26

    prompts, target = tmp_path / "prompts.jsonl", tmp_path / "profile.json"
    prompts.write_text(json.dumps({"id": "one", "text": "A"}) + "\n")
    command = ["profile", str(tiny_folder), "--prompts", str(prompts), "--save", str(target)]
    assert CliRunner().invoke(app, command).exit_code == 0
    checkpoint = Checkpoint(tiny_folder)
    text = KimiK26(checkpoint, torch.float64).text
    cache = KVCache(checkpoint.config.text, 1, torch.float64)
    x = text.layers[0].forward(text.embed(torch.tensor([ord("A")])), cache, absorbed=False)
    block = text.layers[1]
    x = x + block.self_attn.forward(rms_norm(x, block.input_layernorm, block.eps), cache, absorbed=False)
    x = rms_norm(x, block.post_attention_layernorm, block.eps)
    prefix = "language_model.model.layers.1.mlp.gate"
    scores = (x @ checkpoint.tensor(f"{prefix}.weight").double().T).sigmoid()
    chosen = (scores + checkpoint.tensor(f"{prefix}.e_score_correction_bias").double()).topk(2).indices.flatten()
    counts = json.loads(target.read_text())["counts"][1]
    assert [index for index, count in enumerate(counts) if count] == sorted(chosen.tolist())
