"""A small Eagle3 draft for a small checkpoint, in the layout of the drafts that are published for this model.

Li et al., "EAGLE-3: Scaling up Inference Acceleration of Large Language Models via Training-Time Test". The published drafts
with this model's attention are one decoder layer of `Eagle3DeepseekV2ForCausalLM`: dense, its attention's input the last
token's embedding beside the target's hidden states in front of three layers, which `fc` makes one of.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import torch

from k26_plugins.common.checkpoint.reader import Checkpoint
from k26_plugins.common.checkpoint.table import LANGUAGE_MODEL
from k26_plugins.common.checkpoint.tensor_file import save_tensors
from k26_plugins.common.model.config import TextConfig
from k26_plugins.common.tiny.checkpoint import make_new

WEIGHTS_FILE = "model.safetensors"
# The scale of drawn matrices: how much the guess takes from the target's hidden states, beside what it takes from the token.
NOISE = 0.1


def make_eagle3(target: str | Path, folder: str | Path, *, seed: int = 0) -> tuple[int, ...]:
    """Write a draft for the checkpoint in `target` into `folder`, which is made; returns the layers whose inputs it reads.

    It guesses from the last token, which a tiny model goes by most of all: its attention finds the tokens that are the same,
    and their embedding goes to the target's own `lm_head`. So guesses are taken and refused alike. Raises ValueError for a
    target of fewer than five layers, and FileExistsError where the folder already holds something.
    """
    target, folder = Path(target), Path(folder)
    checkpoint = Checkpoint(target)
    layers = layers_read(checkpoint.config.text.num_hidden_layers)
    make_new(folder)
    target_config = json.loads((target / "config.json").read_text(encoding="utf-8"))
    config = _config_json(target_config["text_config"], layers)
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    save_tensors(_weights(checkpoint, len(layers), seed), folder / WEIGHTS_FILE, {"format": "pt"})
    return layers


def layers_read(num_layers: int) -> tuple[int, ...]:
    """The third layer, the middle one and the third from the end, as published; in a small model those that follow."""
    if num_layers < 5:
        raise ValueError(
            f"an Eagle3 draft reads what goes into three layers from the third on, and the checkpoint has {num_layers}: "
            f"make it with --layers 5 or more."
        )
    return (2, max(3, num_layers // 2), max(4, num_layers - 3))


def _config_json(text: dict[str, Any], layers: tuple[int, ...]) -> dict[str, Any]:
    without = ("quantization_config", "n_shared_experts", "num_nextn_predict_layers", "auto_map")
    # Both engines read this type without remote code. A draft of type deepseek_v3 vLLM takes for DeepSeek's own, which is of
    # another layout.
    return {
        **{name: value for name, value in text.items() if name not in without},
        "architectures": ["Eagle3DeepseekV2ForCausalLM"],
        "model_type": "deepseek_v2",
        "num_hidden_layers": 1,
        "first_k_dense_replace": 1,
        "draft_vocab_size": text["vocab_size"],
        "tie_word_embeddings": False,
        "eagle_config": {"eagle_aux_hidden_state_layer_ids": list(layers), "use_aux_hidden_state": True},
    }


def _weights(checkpoint: Checkpoint, num_read: int, seed: int) -> dict[str, torch.Tensor]:
    text = checkpoint.config.text
    generator = torch.Generator().manual_seed(seed)
    hidden, width = text.hidden_size, text.intermediate_size

    def drawn(rows: int, columns: int) -> torch.Tensor:
        return torch.randn(rows, columns, generator=generator) * (NOISE / math.sqrt(columns))

    tensors = {
        "fc.weight": drawn(hidden, num_read * hidden),
        "embed_tokens.weight": checkpoint.tensor(f"{LANGUAGE_MODEL}model.embed_tokens.weight"),
        "lm_head.weight": checkpoint.tensor(f"{LANGUAGE_MODEL}lm_head.weight"),
        "norm.weight": torch.ones(hidden),
        "midlayer.mlp.gate_proj.weight": drawn(width, hidden),
        "midlayer.mlp.up_proj.weight": drawn(width, hidden),
        "midlayer.mlp.down_proj.weight": drawn(hidden, width),
        **{f"midlayer.self_attn.{name}.weight": tensor for name, tensor in _attention(text).items()},
    }
    for name in ("input_layernorm", "hidden_norm", "post_attention_layernorm"):
        tensors[f"midlayer.{name}.weight"] = torch.ones(hidden)
    return {name: tensor.to(torch.bfloat16).contiguous() for name, tensor in tensors.items()}


def _attention(text: TextConfig) -> dict[str, torch.Tensor]:
    """Queries and keys are the token's embedding, so that equal tokens find each other, and so are values. No rotation."""
    hidden, heads, rope = text.hidden_size, text.num_attention_heads, text.qk_rope_head_dim
    nope, value, latent = text.qk_nope_head_dim, text.v_head_dim, text.kv_lora_rank
    # The input is the embedding, and behind it what `fc` gives.
    query_head = torch.cat([torch.eye(nope, text.q_lora_rank), torch.zeros(rope, text.q_lora_rank)])
    key_and_value = torch.cat([torch.eye(nope, latent), torch.eye(value, latent)])
    output = torch.zeros(hidden, heads * value)
    output[:, :value] = torch.eye(hidden, value)
    return {
        "q_a_proj": torch.eye(text.q_lora_rank, 2 * hidden),
        "q_a_layernorm": torch.ones(text.q_lora_rank),
        "q_b_proj": query_head.repeat(heads, 1),
        "kv_a_proj_with_mqa": torch.cat([torch.eye(latent, 2 * hidden), torch.zeros(rope, 2 * hidden)]),
        "kv_a_layernorm": torch.ones(latent),
        "kv_b_proj": key_and_value.repeat(heads, 1),
        "o_proj": output,
    }
