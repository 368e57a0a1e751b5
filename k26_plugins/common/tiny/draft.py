"""Make a small Eagle3 draft model for a small checkpoint, in the layout of published drafts.

Eagle3 is from Li et al., "EAGLE-3: Scaling up Inference Acceleration of Large Language Models via Training-Time Test".
The drafts that are published for this model and use its attention have one dense decoder layer of
`Eagle3DeepseekV2ForCausalLM`. The input of its attention is the last token's embedding, concatenated with a projection
(`fc`) of the target's hidden states before three layers.
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
# The scale of random matrices: how much a guess depends on the target's hidden states, compared with the token.
NOISE = 0.1


def make_eagle3(target: str | Path, folder: str | Path, *, seed: int = 0) -> tuple[int, ...]:
    """Write a draft for the checkpoint in `target` into `folder`, which is created.

    Returns the indices of the target's layers whose inputs the draft reads. The draft guesses from the last token, on
    which a tiny model's answer depends most: its attention finds equal tokens, and passes their embedding to the
    target's own `lm_head`. So some guesses are accepted and some are rejected. Raises ValueError for a target of fewer
    than five layers, and FileExistsError if the folder already contains something.
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
    """Return the indices of the target's layers whose inputs the draft reads.

    They are the third, the middle one and the third from the end, as published. In a small model, the second and third
    index are raised so that all three differ. Raises ValueError for fewer than five layers.
    """
    if num_layers < 5:
        raise ValueError(
            f"an Eagle3 draft reads what goes into three layers from the third on, and the checkpoint has {num_layers}: "
            f"make it with --layers 5 or more."
        )
    return (2, max(3, num_layers // 2), max(4, num_layers - 3))


def _config_json(text: dict[str, Any], layers: tuple[int, ...]) -> dict[str, Any]:
    without = ("quantization_config", "n_shared_experts", "num_nextn_predict_layers", "auto_map")
    # Both engines read this type without remote code. vLLM takes a draft of type deepseek_v3 for DeepSeek's own, whose
    # layout differs.
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
    """Return attention weights by which queries, keys and values are the token's embedding, without rotation.

    Equal tokens thus find each other.
    """
    hidden, heads, rope = text.hidden_size, text.num_attention_heads, text.qk_rope_head_dim
    nope, value, latent = text.qk_nope_head_dim, text.v_head_dim, text.kv_lora_rank
    # The input is the embedding, followed by the output of `fc`.
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
