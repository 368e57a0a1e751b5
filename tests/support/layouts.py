"""Rewrites the tiny checkpoint in the layouts in which checkpoints of this architecture are published.

Names, dtypes and shapes are those of each layout. Values are made up where a format cannot hold the tiny checkpoint's,
because the tests judge headers only.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

INDEX = "model.safetensors.index.json"
EXPERT = "language_model.model.layers.2.mlp.experts.5.down_proj"
Tensors = dict[str, torch.Tensor]
Config = dict[str, Any]
# The files that a layout replaces. All others stay: tokenizer, chat template, preprocessing.
WEIGHTS = ("*.safetensors", INDEX)


Change = Callable[["Draft"], object]


@cache
def _load(folder: Path) -> Tensors:
    tensors: Tensors = {}
    for file in sorted(folder.glob("model-*.safetensors")):
        tensors |= load_file(file)
    return tensors


class Draft:
    """A checkpoint in memory that a layout changes before it is written: configuration, tensors, and further files.

    `files` holds, by a file's name, the function that writes it, which is called after the tensors were saved.
    """

    def __init__(self, source: Path) -> None:
        self.source = source
        self.config: Config = json.loads((source / "config.json").read_text())
        self.tensors = dict(_load(source))
        self.files: dict[str, Callable[[Path], object]] = {}

    @property
    def text(self) -> Config:
        """The language model's part of the configuration."""
        found: Config = self.config["text_config"]
        return found

    @property
    def quantization(self) -> Config:
        """The configuration of the experts' quantization."""
        found: Config = self.text["quantization_config"]
        return found

    def linears(self, pattern: str) -> list[str]:
        """Return the names of the linear layers in which the regular expression `pattern` is found, sorted."""
        names = {name.rpartition(".")[0] for name in self.tensors}
        return sorted(name for name in names if re.search(pattern, name) and name.endswith("_proj"))

    def size(self, module: str) -> tuple[int, int]:
        """Return the outputs and inputs of a linear layer, INT4 or not."""
        if f"{module}.weight" in self.tensors:
            rows, inputs = self.tensors[f"{module}.weight"].shape
            return rows, inputs
        rows, words = self.tensors[f"{module}.weight_packed"].shape
        return rows, words * 8

    def store(self, module: str, **parts: torch.Tensor) -> None:
        """Replace all tensors of a module by `parts`."""
        for name in [name for name in self.tensors if name.rpartition(".")[0] == module]:
            del self.tensors[name]
        self.tensors |= {f"{module}.{part}": tensor for part, tensor in parts.items()}

    def write(self, folder: Path) -> Path:
        """Write the checkpoint to `folder`, which must not exist, and return `folder`."""
        shutil.copytree(self.source, folder, ignore=shutil.ignore_patterns(*WEIGHTS))
        (folder / "config.json").write_text(json.dumps(self.config))
        save_file(self.tensors, folder / "model.safetensors")
        for name, write in self.files.items():
            write(folder / name)
        return folder


def _int4(draft: Draft, pattern: str, ignore_entry: str, group: int = 32) -> None:
    draft.quantization["ignore"].remove(ignore_entry)
    for module in draft.linears(pattern):
        rows, inputs = draft.size(module)
        draft.store(
            module,
            weight_packed=torch.zeros(rows, inputs // 8, dtype=torch.int32),
            weight_scale=torch.zeros(rows, inputs // group, dtype=torch.bfloat16),
            weight_shape=torch.tensor([rows, inputs], dtype=torch.int32),
        )


def as_published(draft: Draft) -> None:
    pass


def k25(draft: Draft) -> None:
    draft.config["eos_token_id"] = draft.text["eos_token_id"] = draft.text["eos_token_id"] - 1


def k27_code(draft: Draft) -> None:
    """Spell the configuration's fields as transformers 5 does when it saves this configuration again."""
    text = draft.text
    text["model_type"] = "deepseek_v3"
    scaling = text.pop("rope_scaling")
    text["rope_parameters"] = {**scaling, "rope_type": scaling.pop("type"), "rope_theta": text.pop("rope_theta")}
    draft.config["quantization_config"] = text.pop("quantization_config")


def int64_shapes(draft: Draft) -> None:
    for name in draft.tensors:
        if name.endswith("weight_shape"):
            draft.tensors[name] = draft.tensors[name].long()


def int4_attention(draft: Draft) -> None:
    _int4(draft, "self_attn", "re:.*self_attn.*")


def int4_shared_experts(draft: Draft) -> None:
    _int4(draft, "shared_experts", "re:.*shared_experts.*")


def fp8_kv_scales(draft: Draft) -> None:
    draft.quantization["kv_cache_scheme"] = {"num_bits": 8, "type": "float", "strategy": "tensor", "symmetric": True}
    for layer in range(draft.text["num_hidden_layers"]):
        for part in ("k_scale", "v_scale"):
            draft.tensors[f"language_model.model.layers.{layer}.self_attn.{part}"] = torch.ones(1)


def pruned_experts(draft: Draft) -> None:
    keep = draft.text["n_routed_experts"] - 2
    draft.text["n_routed_experts"] = keep
    for name in list(draft.tensors):
        number = re.search(r"experts\.(\d+)\.", name)
        if number and int(number[1]) >= keep:
            del draft.tensors[name]
        elif ".mlp.gate." in name:
            draft.tensors[name] = draft.tensors[name][:keep].clone()


def group_128(draft: Draft) -> None:
    draft.quantization["config_groups"]["group_0"]["weights"]["group_size"] = 64
    for name in draft.tensors:
        if name.endswith("weight_scale"):
            draft.tensors[name] = draft.tensors[name][:, ::2].clone()


def _experts(draft: Draft, quantization: Config | None, parts: Callable[[int, int], Tensors]) -> None:
    draft.text.pop("quantization_config")
    if quantization is not None:
        draft.config["quantization_config"] = quantization
    for module in draft.linears(r"mlp\.experts\."):
        draft.store(module, **parts(*draft.size(module)))


def awq(draft: Draft) -> None:
    def parts(rows: int, inputs: int) -> Tensors:
        return {
            "qweight": torch.zeros(inputs, rows // 8, dtype=torch.int32),
            "qzeros": torch.zeros(inputs // 32, rows // 8, dtype=torch.int32),
            "scales": torch.zeros(inputs // 32, rows, dtype=torch.float16),
        }

    _experts(draft, {"quant_method": "awq", "bits": 4, "group_size": 32, "zero_point": True}, parts)
    for name, tensor in draft.tensors.items():
        draft.tensors[name] = tensor.half() if tensor.dtype == torch.bfloat16 else tensor


def block_fp8(draft: Draft) -> None:
    def parts(rows: int, inputs: int) -> Tensors:
        scale = torch.ones(-(-rows // 128), -(-inputs // 128))
        return {"weight": torch.zeros(rows, inputs, dtype=torch.float8_e4m3fn), "weight_scale_inv": scale}

    _experts(draft, {"quant_method": "fp8", "weight_block_size": [128, 128], "activation_scheme": "dynamic"}, parts)
    for module in draft.linears("self_attn"):
        draft.store(module, **parts(*draft.size(module)))


def nvfp4(draft: Draft) -> None:
    def parts(rows: int, inputs: int) -> Tensors:
        return {
            "weight": torch.zeros(rows, inputs // 2, dtype=torch.uint8),
            "weight_scale": torch.zeros(rows, inputs // 16, dtype=torch.float8_e4m3fn),
            "weight_scale_2": torch.ones(()),
            "input_scale": torch.ones(()),
        }

    _experts(draft, {"quant_method": "modelopt", "quant_algo": "NVFP4", "ignore": ["lm_head"]}, parts)


def mxfp4(draft: Draft) -> None:
    def parts(rows: int, inputs: int) -> Tensors:
        return {
            "weight": torch.zeros(rows, inputs // 2, dtype=torch.uint8),
            "weight_scale": torch.zeros(rows, inputs // 32, dtype=torch.uint8),
        }

    _experts(draft, {"quant_method": "quark", "global_quant_config": {"weight": {"dtype": "fp4"}}}, parts)


def bf16(draft: Draft) -> None:
    _experts(draft, None, lambda rows, inputs: {"weight": torch.zeros(rows, inputs, dtype=torch.bfloat16)})


def dense(draft: Draft) -> None:
    """Store experts in bfloat16 whose weights are not zero, so that an engine's own code can serve them."""
    generator = torch.Generator().manual_seed(0)

    def drawn(rows: int, inputs: int) -> dict[str, torch.Tensor]:
        return {"weight": (torch.randn(rows, inputs, generator=generator) / inputs**0.5).to(torch.bfloat16)}

    _experts(draft, None, drawn)


def mtp_layer(draft: Draft) -> None:
    last = draft.text["num_hidden_layers"] - 1
    prefix = "language_model.model.layers."
    draft.text["num_nextn_predict_layers"] = 1
    for name, tensor in list(draft.tensors.items()):
        if name.startswith(f"{prefix}{last}."):
            draft.tensors[name.replace(f"{prefix}{last}.", f"{prefix}{last + 1}.")] = tensor.clone()
    hidden = draft.text["hidden_size"]
    draft.tensors[f"{prefix}{last + 1}.eh_proj.weight"] = torch.zeros(hidden, 2 * hidden, dtype=torch.bfloat16)


def beside_the_shards(draft: Draft) -> None:
    """Add safetensors files that the index does not name."""
    index = {"weight_map": dict.fromkeys(draft.tensors, "model.safetensors")}
    draft.files[INDEX] = lambda file: file.write_text(json.dumps(index))
    draft.files["adapter_model.safetensors"] = lambda file: save_file({"lora_A.weight": torch.zeros(2, 2)}, file)
    draft.files["consolidated.safetensors"] = lambda file: save_file({"output.weight": torch.zeros(2, 2)}, file)


def sharded_state(draft: Draft) -> None:
    draft.files["model-rank-0-part-0.safetensors"] = lambda file: file.with_name("model.safetensors").rename(file)


def gguf(draft: Draft) -> None:
    def write(file: Path) -> None:
        file.with_name("model.safetensors").unlink()
        file.write_bytes(b"GGUF")

    draft.files["Kimi-K2.6-Q4_K.gguf"] = write


def without_tiktoken(draft: Draft) -> None:
    draft.files["tiktoken.model"] = Path.unlink


def plain_rope(draft: Draft) -> None:
    draft.text["rope_scaling"] = None


def other_projector(draft: Draft) -> None:
    draft.config["vision_config"]["projector_hidden_act"] = "gelu_pytorch_tanh"


PUBLISHED: dict[str, Change] = {
    "K2.6": as_published,
    "K2.5": k25,
    "K2.7-Code": k27_code,
    "int64 shapes": int64_shapes,
    "pruned experts": pruned_experts,
    "a LoRA adapter and a consolidated file beside the shards": beside_the_shards,
    "no tiktoken.model": without_tiktoken,
}
OTHER: dict[str, tuple[Change, str]] = {
    "INT4 attention": (int4_attention, "leaves out the attention"),
    "INT4 shared experts": (int4_shared_experts, "leaves out the shared experts"),
    "FP8 KV scales": (fp8_kv_scales, "kv_cache_scheme"),
    "another group size": (group_128, "group_size' is 64"),
    "AWQ": (awq, "quant_method' is 'awq'"),
    "block FP8": (block_fp8, "quant_method' is 'fp8'"),
    "NVFP4 by modelopt": (nvfp4, "quant_method' is 'modelopt'"),
    "MXFP4 by Quark": (mxfp4, "quant_method' is 'quark'"),
    "bf16": (bf16, "quantization_config' is None"),
    "an MTP layer": (mtp_layer, "num_nextn_predict_layers' is 1"),
    "sharded_state": (sharded_state, "model-rank-0-part-0.safetensors"),
    "GGUF": (gguf, "Kimi-K2.6-Q4_K.gguf"),
    "no YaRN": (plain_rope, "rope_scaling"),
    "another activation in the projector": (other_projector, "projector_hidden_act"),
}


def make(layout: Change, source: Path, folder: Path) -> Path:
    """Write `source` in this layout to `folder`."""
    draft = Draft(source)
    layout(draft)
    return draft.write(folder)
