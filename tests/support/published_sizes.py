"""Writes a checkpoint of two layers with the published model's sizes, whose weights take no space on the disk."""

from __future__ import annotations

import json
import os
from pathlib import Path
from unittest import mock

from k26_plugins.common.checkpoint.table import tensor_table
from k26_plugins.common.model.config import K26Config
from k26_plugins.common.tiny import checkpoint as tiny

SIZES = tiny.TinySizes(
    layers=2, hidden_size=7168, intermediate_size=18432, moe_intermediate_size=2048, experts=384, top_k=8, heads=64,
    q_lora_rank=1536, vision_layers=1, vision_heads=16, vision_intermediate_size=4304,
)  # fmt: skip
"""A dense layer and an MoE layer; the vocabulary is the tiny checkpoint's."""


def make_published_sizes(folder: Path) -> None:
    """Write the checkpoint's small files, and a safetensors file that has its header and, for the weights, a hole."""
    with mock.patch.object(tiny, "_write_weights", _write_header):
        tiny.make_tiny(folder, SIZES)


def _write_header(folder: Path, config: K26Config, shards: int, seed: int) -> None:
    header, end = {}, 0
    for spec in tensor_table(config).values():
        begin, end = end, end + spec.num_bytes
        header[spec.name] = {"dtype": spec.dtype, "shape": spec.shape, "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    file = folder / "model.safetensors"
    file.write_bytes(len(text).to_bytes(8, "little") + text)
    os.truncate(file, 8 + len(text) + end)


def make_eagle3_draft(folder: Path) -> None:
    """Write the configuration of an Eagle3 draft model for this checkpoint into `folder`, which must not exist."""
    folder.mkdir()
    config = {
        "architectures": ["LlamaForCausalLMEagle3"],
        "model_type": "llama",
        "hidden_size": SIZES.hidden_size,
        "intermediate_size": SIZES.intermediate_size,
        "num_hidden_layers": 1,
        "num_attention_heads": SIZES.heads,
        "num_key_value_heads": SIZES.heads,
        "head_dim": 128,
        "vocab_size": SIZES.vocab_size,
        "draft_vocab_size": SIZES.vocab_size,
        "max_position_embeddings": 4096,
        "torch_dtype": "bfloat16",
    }
    (folder / "config.json").write_text(json.dumps(config))
