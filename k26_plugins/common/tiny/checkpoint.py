"""Make a small random checkpoint with exactly Kimi-K2.6's structure, for tests and for trying an engine.

It has everything that a reader of the real checkpoint meets: a config.json in the hub's style with the names of both
schemas, sharded safetensors with an index, INT4 experts, the vision tower and projector, `tiktoken.model` with the
special tokens at their offsets, a chat template and preprocessor_config.json. Only the sizes and the values are
invented.
"""

from __future__ import annotations

import base64
import itertools
import json
import math
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import torch

from k26_plugins.common.checkpoint.dtypes import TORCH_DTYPES
from k26_plugins.common.checkpoint.header import INDEX_FILE
from k26_plugins.common.checkpoint.table import TensorSpec, expert_name, tensor_table
from k26_plugins.common.checkpoint.tensor_file import save_tensors
from k26_plugins.common.model.config import ARCHITECTURE, K26Config
from k26_plugins.common.model.int4 import PACK_FACTOR, quantize
from k26_plugins.common.prompt.special_tokens import NUM_SPECIAL_TOKENS, special_token_ids


@dataclass(frozen=True, kw_only=True)
class TinySizes:
    """Sizes of a tiny checkpoint.

    The head dimensions are the real model's, because the engines' MLA kernels are written for them.
    """

    layers: int = 3
    hidden_size: int = 128
    intermediate_size: int = 256
    moe_intermediate_size: int = 64
    experts: int = 8
    top_k: int = 2
    heads: int = 4
    q_lora_rank: int = 96
    vocab_size: int = 512
    vision_layers: int = 2
    vision_heads: int = 2
    vision_intermediate_size: int = 192
    shards: int = 3


VISION_HEAD_DIM = 72
# Number of expert weights that are quantized at a time, so few that they stay in a core's cache.
WEIGHTS_AT_ONCE = 2**18


def make_new(folder: Path) -> None:
    """Create a folder to write into. Raises FileExistsError if it already contains something."""
    if folder.exists() and any(folder.iterdir()):
        raise FileExistsError(f"{folder} is not empty: give a new folder.")
    folder.mkdir(parents=True, exist_ok=True)


def make_tiny(folder: str | Path, sizes: TinySizes | None = None, *, seed: int = 0) -> K26Config:
    """Write a tiny checkpoint into `folder`, which is created, and return its configuration.

    The same sizes and seed give the same bytes. Raises ConfigError for sizes that the model cannot have, ValueError for
    a vocabulary that is too small, and FileExistsError if the folder already contains something.

    Examples:
        >>> from tempfile import TemporaryDirectory
        >>> with TemporaryDirectory() as folder:
        ...     config = make_tiny(folder, TinySizes(layers=2, shards=2))
        ...     sorted(file.name for file in Path(folder).glob("*.safetensors"))
        ['model-00001-of-000002.safetensors', 'model-00002-of-000002.safetensors']
        >>> config.text.num_hidden_layers, config.text.vocab_size
        (2, 512)
    """
    folder = Path(folder)
    sizes = sizes or TinySizes()
    if sizes.vocab_size <= NUM_SPECIAL_TOKENS + 255:
        raise ValueError(f"vocab_size is {sizes.vocab_size}, expected at least 512: 256 bytes and 256 special tokens.")
    config_json = _config_json(sizes)
    config = K26Config.from_dict(config_json)
    make_new(folder)
    files: dict[str, Any] = {
        "config.json": config_json,
        "generation_config.json": {"max_length": 262144, "eos_token_id": config.eos_token_id},
        "preprocessor_config.json": _preprocessor_config(),
        "tokenizer_config.json": _tokenizer_config(sizes.vocab_size),
    }
    for name, content in files.items():
        (folder / name).write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    template = resources.files("k26_plugins.common.prompt").joinpath("chat_template.jinja").read_text(encoding="utf-8")
    (folder / "chat_template.jinja").write_text(template, encoding="utf-8")
    _write_ranks(folder / "tiktoken.model", sizes.vocab_size - NUM_SPECIAL_TOKENS)
    with _one_thread():
        _write_weights(folder, config, sizes.shards, seed)
    return config


@contextmanager
def _one_thread() -> Iterator[None]:
    """Limit torch to one thread within the block, for operators that are too short to be shared by threads.

    Threads that wait for each other spin. While other processes used the cores, 23,040 experts took four times as long
    with two threads (2 cores of an Intel Emerald Rapids).
    """
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _config_json(sizes: TinySizes) -> dict[str, Any]:
    ids = special_token_ids(sizes.vocab_size - NUM_SPECIAL_TOKENS)
    common_ids = {"bos_token_id": ids["[BOS]"], "eos_token_id": ids["<|im_end|>"], "pad_token_id": ids["[PAD]"]}
    vision_hidden = sizes.vision_heads * VISION_HEAD_DIM
    text = {
        "architectures": ["DeepseekV3ForCausalLM"],
        "model_type": "kimi_k2",
        "dtype": "bfloat16",
        **common_ids,
        "vocab_size": sizes.vocab_size,
        "hidden_size": sizes.hidden_size,
        "intermediate_size": sizes.intermediate_size,
        "moe_intermediate_size": sizes.moe_intermediate_size,
        "num_hidden_layers": sizes.layers,
        "first_k_dense_replace": 1,
        "moe_layer_freq": 1,
        "n_routed_experts": sizes.experts,
        "num_experts_per_tok": sizes.top_k,
        "n_shared_experts": 1,
        "routed_scaling_factor": 2.827,
        "scoring_func": "sigmoid",
        "topk_method": "noaux_tc",
        "n_group": 1,
        "topk_group": 1,
        "norm_topk_prob": True,
        "num_attention_heads": sizes.heads,
        "num_key_value_heads": sizes.heads,
        "attention_bias": False,
        "attention_dropout": 0.0,
        "q_lora_rank": sizes.q_lora_rank,
        "kv_lora_rank": 512,
        "qk_nope_head_dim": 128,
        "qk_rope_head_dim": 64,
        "v_head_dim": 128,
        "rope_theta": 50000.0,
        "rope_scaling": {
            "type": "yarn",
            "factor": 64.0,
            "original_max_position_embeddings": 4096,
            "beta_fast": 32.0,
            "beta_slow": 1.0,
            "mscale": 1.0,
            "mscale_all_dim": 1.0,
        },
        "max_position_embeddings": 262144,
        "rms_norm_eps": 1e-5,
        "hidden_act": "silu",
        "tie_word_embeddings": False,
        "num_nextn_predict_layers": 0,
        "initializer_range": 0.02,
        "use_cache": True,
        "quantization_config": _quantization_config(),
    }
    vision = {
        "patch_size": 14,
        "vt_hidden_size": vision_hidden,
        "vt_num_hidden_layers": sizes.vision_layers,
        "vt_num_attention_heads": sizes.vision_heads,
        "vt_intermediate_size": sizes.vision_intermediate_size,
        "init_pos_emb_height": 64,
        "init_pos_emb_width": 64,
        "init_pos_emb_time": 4,
        "pos_emb_type": "divided_fixed",
        "merge_kernel_size": [2, 2],
        "merge_type": "sd2_tpool",
        "video_attn_type": "spatial_temporal",
        "mm_projector_type": "patchmerger",
        "mm_hidden_size": vision_hidden,
        "projector_hidden_act": "gelu",
        "projector_ln_eps": 1e-5,
        "text_hidden_size": sizes.hidden_size,
        # transformers' names of the same sizes: an engine that reads only these would otherwise use the real model's.
        "hidden_size": vision_hidden,
        "num_hidden_layers": sizes.vision_layers,
        "num_attention_heads": sizes.vision_heads,
        "intermediate_size": sizes.vision_intermediate_size,
        "pos_emb_height": 64,
        "pos_emb_width": 64,
        "pos_emb_time": 4,
    }
    return {
        "architectures": [ARCHITECTURE],
        "auto_map": {
            "AutoConfig": "configuration_kimi_k25.KimiK25Config",
            "AutoModel": "modeling_kimi_k25.KimiK25ForConditionalGeneration",
            "AutoModelForCausalLM": "modeling_kimi_k25.KimiK25ForConditionalGeneration",
        },
        "model_type": "kimi_k25",
        "dtype": "bfloat16",
        **common_ids,
        "ignore_index": -100,
        "media_placeholder_token_id": ids["<|media_pad|>"],
        "image_token_id": ids["<|media_pad|>"],
        "video_token_id": sizes.vocab_size,
        "vision_start_token_id": ids["<|media_begin|>"],
        "vision_end_token_id": ids["<|media_end|>"],
        "projection_hidden_size": vision_hidden,
        "projection_layer_norm_eps": 1e-5,
        "tie_word_embeddings": False,
        "use_unified_vision_chunk": True,
        "video_placeholder": "<|kimi_k25_video_placeholder|>",
        "text_config": text,
        "vision_config": vision,
    }


def _quantization_config() -> dict[str, Any]:
    weights = {
        "num_bits": 4,
        "type": "int",
        "symmetric": True,
        "strategy": "group",
        "group_size": 32,
        "dynamic": False,
        "actorder": None,
        "block_structure": None,
        "observer": "minmax",
        "observer_kwargs": {},
    }
    return {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "kv_cache_scheme": None,
        "config_groups": {
            "group_0": {
                "targets": ["Linear"],
                "weights": weights,
                "input_activations": None,
                "output_activations": None,
            }
        },
        # The published list. It does not name the vision tower, which is not quantized either.
        "ignore": [
            "lm_head",
            "re:.*self_attn.*",
            "re:.*shared_experts.*",
            "re:.*mlp\\.(gate|up|gate_up|down)_proj.*",
        ],
    }


def _preprocessor_config() -> dict[str, Any]:
    return {
        "auto_map": {
            "AutoProcessor": "kimi_k25_processor.KimiK25Processor",
            "AutoImageProcessor": "kimi_k25_vision_processing.KimiK25VisionProcessor",
        },
        "media_proc_cfg": {
            "in_patch_limit": 16384,
            "patch_size": 14,
            "image_mean": [0.5, 0.5, 0.5],
            "image_std": [0.5, 0.5, 0.5],
            "merge_kernel_size": 2,
            "fixed_output_tokens": None,
            "patch_limit_on_one_side": 512,
            "in_patch_limit_each_frame": 4096,
            "in_patch_limit_video": None,
            "sample_fps": 2.0,
            "max_num_frames_each_video": None,
            "temporal_merge_kernel_size": 4,
            "timestamp_mode": "hh:mm:ss.fff",
            "config_type": "media_proc.processors.moonvit.MoonViTMediaProcessorConfig",
        },
    }


def _tokenizer_config(vocab_size: int) -> dict[str, Any]:
    named = special_token_ids(vocab_size - NUM_SPECIAL_TOKENS)
    decoder = {
        str(token_id): {
            "content": name,
            "lstrip": False,
            "normalized": False,
            "rstrip": False,
            "single_word": False,
            # The hub's file leaves the markers of thinking and of tool calls visible in decoded text.
            "special": name not in ("<think>", "</think>") and "tool_call" not in name,
        }
        for name, token_id in sorted(named.items(), key=lambda item: item[1])
    }
    return {
        "added_tokens_decoder": decoder,
        "auto_map": {"AutoTokenizer": ["tokenization_kimi.TikTokenTokenizer", None]},
        "tokenizer_class": "TikTokenTokenizer",
        "bos_token": "[BOS]",
        "eos_token": "[EOS]",
        "unk_token": "[UNK]",
        "pad_token": "[PAD]",
        "clean_up_tokenization_spaces": False,
        "model_max_length": 1000000000000000019884624838656,
    }


def _write_ranks(file: Path, count: int) -> None:
    """Write `count` ranks: the 256 bytes, then pairs and triples of bytes, in order."""
    sequences: Iterator[tuple[int, ...]] = itertools.chain.from_iterable(
        itertools.product(range(256), repeat=length) for length in itertools.count(1)
    )
    lines = (
        f"{base64.b64encode(bytes(sequence)).decode()} {rank}\n"
        for rank, sequence in enumerate(itertools.islice(sequences, count))
    )
    file.write_text("".join(lines), encoding="ascii")


def _write_weights(folder: Path, config: K26Config, shards: int, seed: int) -> None:
    table = tensor_table(config)
    total = sum(spec.num_bytes for spec in table.values())
    weight_map: dict[str, str] = {}
    pending: dict[str, torch.Tensor] = {}
    experts: dict[str, torch.Tensor] = {}
    written, shard_number = 0, 1

    def flush() -> None:
        name = f"model-{shard_number:05d}-of-{shards:06d}.safetensors"
        save_tensors(pending, folder / name, {"format": "pt"})
        weight_map.update(dict.fromkeys(pending, name))
        pending.clear()

    for spec in table.values():
        if spec.expert is not None and spec.name not in experts:
            experts = _make_experts(spec, table, seed)
        pending[spec.name] = experts[spec.name] if spec.expert is not None else _make_tensor(spec, seed)
        written += spec.num_bytes
        if written >= total * shard_number / shards and shard_number < shards:
            flush()
            shard_number += 1
    flush()
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / INDEX_FILE).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def _random(spec: TensorSpec, shape: tuple[int, ...], seed: int) -> torch.Tensor:
    # Each name has its own seed, so that the values do not depend on the order of the tensors. torch uses only the low
    # 32 bits of a seed.
    generator = torch.Generator().manual_seed(zlib.crc32(f"{seed} {spec.name}".encode()))
    return torch.randn(shape, generator=generator)


def _make_tensor(spec: TensorSpec, seed: int) -> torch.Tensor:
    return (_random(spec, spec.shape, seed) * _spread(spec) + _centre(spec)).to(TORCH_DTYPES[spec.dtype])


def _make_experts(first: TensorSpec, table: dict[str, TensorSpec], seed: int) -> dict[str, torch.Tensor]:
    """Make all tensors of a group of experts of one layer, which begins with the expert of `first`.

    The experts are quantized together, because one by one takes far longer.
    """
    assert first.layer is not None, "experts are part of a layer"
    assert first.expert is not None, "the caller asks for an expert"
    found: dict[str, torch.Tensor] = {}
    for projection in ("gate", "up", "down"):
        packed_spec = table[expert_name(first.layer, first.expert, projection, "packed")]
        rows, inputs = packed_spec.shape[0], packed_spec.shape[1] * PACK_FACTOR
        experts = range(first.expert, first.expert + max(1, WEIGHTS_AT_ONCE // (rows * inputs)))
        specs = [
            spec
            for expert in experts
            if (spec := table.get(expert_name(first.layer, expert, projection, "packed"))) is not None
        ]
        values = torch.stack([_random(spec, (rows, inputs), seed) for spec in specs])
        packed, scale = quantize(values * (_update_gain(packed_spec) / math.sqrt(inputs)))
        shape = torch.tensor([rows, inputs], dtype=torch.int32)
        for index, spec in enumerate(specs):
            owner = spec.name.removesuffix("_packed")
            found |= {
                spec.name: packed[index], f"{owner}_scale": scale[index], f"{owner}_shape": shape,
            }  # fmt: skip
    return found


def _centre(spec: TensorSpec) -> float:
    is_norm = len(spec.shape) == 1 and "norm" in spec.name and spec.name.endswith(".weight")
    return 1.0 if is_norm else 0.0


def _spread(spec: TensorSpec) -> float:
    """Return the standard deviation of a tensor's values.

    It keeps activations near 1, and keeps a layer's update small compared with the residual that it is added to. The
    latter is as in trained models, and it matters: if updates were as large as the residual, a single token that
    bfloat16 rounding routes to another expert (which happens near ties) would change every later token's distribution
    beyond comparison.
    """
    if spec.name.endswith("e_score_correction_bias"):
        return 0.02
    if spec.name.endswith("embed_tokens.weight"):
        return 1.0
    if len(spec.shape) != 2 and "proj.weight" not in spec.name:
        return 0.1
    return _update_gain(spec) / math.sqrt(math.prod(spec.shape[1:]))


def _update_gain(spec: TensorSpec) -> float:
    if spec.expert is not None:
        return 0.3 if "down_proj" in spec.name else 1.0
    return 0.5 if spec.name.endswith(("o_proj.weight", "down_proj.weight")) else 1.0
