"""Damages copies of the tiny checkpoint, each in one way that an engine must report at its start."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM

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


def doubled_scale(source: Path, folder: Path) -> Path:
    """Copy the checkpoint to `folder` with one expert's output doubled, and return `folder`.

    Every header of the copy is right, so that only the model's answers can show the fault.
    """
    shutil.copytree(source, folder)
    file = _file_of(folder, f"{EXPERT}.weight_scale")
    weights = load_file(file)
    weights[f"{EXPERT}.weight_scale"] *= 2
    save_file(weights, file)
    return folder


def another_model(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    config["text_config"]["n_routed_experts"] = 9
    (folder / "config.json").write_text(json.dumps(config))


DAMAGES: dict[str, tuple[Callable[[Path], None], str]] = {
    "truncated": (truncate, "truncated: "),
    "missing": (drop, f"missing: {EXPERT}.weight_packed should be I32"),
    "float16-scales": (half_scales, f"wrong dtype: {EXPERT}.weight_scale has dtype F16, expected BF16"),
    "another-model": (
        another_model,
        "language_model.model.layers.1.mlp.experts.8.down_proj.weight_packed should be I32",
    ),
}
"""By a damage's name: the function that damages a checkpoint, and the text that each engine's start must then print."""

WRONG_SETTING = "K26_EXPERTS is 'marlin': choose auto, engine, triton, native, cpu or reference"


LLAMA_PROMPT = list(range(50))


def make_llama(folder: Path) -> list[int]:
    """Write a small random Llama without a tokenizer; return the eight tokens with which it answers LLAMA_PROMPT.

    transformers computes the answer, greedily.
    """
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=128, intermediate_size=256, num_hidden_layers=2, num_attention_heads=4, vocab_size=512,
        max_position_embeddings=4096, eos_token_id=511,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    model.save_pretrained(folder)
    prompt = torch.tensor([LLAMA_PROMPT])
    answer = model.generate(prompt, max_new_tokens=8, min_new_tokens=8, do_sample=False)
    found: list[int] = answer[0, len(LLAMA_PROMPT) :].tolist()
    return found
