"""The table of every tensor in a Kimi-K2.6 checkpoint: name, shape, dtype and how tensor parallelism shards it.

Names and shapes follow from the configuration alone. For the published configuration, the table holds 208,550 tensors
and 595,148,192,736 bytes.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from itertools import chain
from typing import TYPE_CHECKING, NamedTuple

from k26_plugins.common.host.collector import paused
from k26_plugins.common.model.config import PACK_FACTOR, K26Config, TextConfig, VisionConfig

if TYPE_CHECKING:
    import torch

LANGUAGE_MODEL = "language_model."
# Bytes of an element by safetensors' name of its dtype.
ITEM_BYTES = {"BF16": 2, "F32": 4, "I32": 4, "I64": 8}


class TensorSpec(NamedTuple):
    """A tensor of the checkpoint as it is stored; a matrix has the shape `[out_features, in_features]`."""

    name: str
    shape: tuple[int, ...]
    dtype: str = "BF16"
    shard_dim: int | None = None
    """Dimension along which tensor parallelism shards the tensor; None if every rank holds the whole tensor."""
    shard_blocks: int = 1
    """Equal blocks along `shard_dim`, each of which is sharded by itself (3 for a fused query, key, value)."""
    layer: int | None = None
    """Decoder layer, for pipeline parallelism; None outside the decoder layers."""
    expert: int | None = None
    """Routed expert, for expert parallelism; None outside the routed experts."""

    @property
    def stored_dtypes(self) -> tuple[str, ...]:
        """The dtypes that a file may store the tensor in, as safetensors names them.

        compressed-tensors writes a `weight_shape`, two small numbers, in int64 too.
        """
        return (self.dtype, "I64") if self.dtype == "I32" and self.shape == (2,) else (self.dtype,)

    @property
    def num_bytes(self) -> int:
        """Bytes of the tensor as it is published."""
        return math.prod(self.shape) * ITEM_BYTES[self.dtype]


class ShardError(ValueError):
    """A tensor-parallel size that does not divide a tensor."""


def shard(tensor: torch.Tensor, spec: TensorSpec, rank: int, size: int) -> torch.Tensor:
    """Return the part of the whole `tensor` that tensor-parallel `rank` of `size` ranks holds.

    tensor: in the shape of `spec`, of any dtype and on any device. The part has the same dtype and device; its length
    along `spec.shard_dim` is divided by `size`. The part is a view if the tensor has one block (`shard_blocks` 1). A
    row-parallel matrix (`shard_dim` 1) gives partial sums, which the ranks add up; its bias is not sharded and is added
    once. Raises ShardError if `size` does not divide the dimension.
    """
    if spec.shard_dim is None or size == 1:
        return tensor
    length = spec.shape[spec.shard_dim] // spec.shard_blocks
    if length % size:
        raise ShardError(
            f"tensor parallel size {size} does not divide {spec.name}: {length} along dimension {spec.shard_dim}. "
            f"Choose a size that divides it."
        )
    blocks = tensor.unflatten(spec.shard_dim, (spec.shard_blocks, length))
    part = blocks.narrow(spec.shard_dim + 1, rank * (length // size), length // size)
    flat: torch.Tensor = part.flatten(spec.shard_dim, spec.shard_dim + 1)
    return flat


def tensor_table(config: K26Config, *, experts: int | None = None) -> dict[str, TensorSpec]:
    """Return every tensor of a checkpoint with this configuration, by name.

    experts: how many routed experts of each layer are listed, by default all. The experts of a layer are alike, and
    their tensors are 99 of 100 tensors of a checkpoint.

    Examples:
        The default configuration is the published model's:

        >>> table = tensor_table(K26Config())
        >>> len(table), sum(spec.num_bytes for spec in table.values())
        (208550, 595148192736)
        >>> table["language_model.lm_head.weight"].shape
        (163840, 7168)
    """
    experts = config.text.n_routed_experts if experts is None else experts
    with paused():
        specs = (_text(config.text, experts), _vision_tower(config.vision), _projector(config.vision))
        return {spec.name: spec for spec in chain(*specs)}


def expert_name(layer: int, expert: int, projection: str, part: str) -> str:
    """Return the name of a routed expert's tensor. projection: gate, up or down. part: packed, scale or shape."""
    return f"{LANGUAGE_MODEL}model.layers.{layer}.mlp.experts.{expert}.{projection}_proj.weight_{part}"


def expert_bytes(text: TextConfig) -> int:
    """Return the bytes of one routed expert of one layer as stored, 24,772,632 for the published model."""
    return sum(math.prod(shape) * ITEM_BYTES[dtype] for _, _, shape, dtype, _ in _expert_parts(text))


def _text(text: TextConfig, experts: int) -> Iterator[TensorSpec]:
    yield TensorSpec(f"{LANGUAGE_MODEL}model.embed_tokens.weight", (text.vocab_size, text.hidden_size), shard_dim=0)
    for layer in range(text.num_hidden_layers):
        yield from _attention(text, layer)
        if text.is_moe_layer(layer):
            yield from _moe(text, layer, experts)
        else:
            yield from _swiglu(f"{_prefix(layer)}.mlp", text.hidden_size, text.intermediate_size, layer)
    yield TensorSpec(f"{LANGUAGE_MODEL}model.norm.weight", (text.hidden_size,))
    yield TensorSpec(f"{LANGUAGE_MODEL}lm_head.weight", (text.vocab_size, text.hidden_size), shard_dim=0)


def _prefix(layer: int) -> str:
    return f"{LANGUAGE_MODEL}model.layers.{layer}"


def _attention(text: TextConfig, layer: int) -> Iterator[TensorSpec]:
    heads, hidden = text.num_attention_heads, text.hidden_size
    matrices: dict[str, tuple[tuple[int, ...], int | None]] = {
        "q_a_proj": ((text.q_lora_rank, hidden), None),
        "q_a_layernorm": ((text.q_lora_rank,), None),
        "q_b_proj": ((heads * text.qk_head_dim, text.q_lora_rank), 0),
        "kv_a_proj_with_mqa": ((text.kv_lora_rank + text.qk_rope_head_dim, hidden), None),
        "kv_a_layernorm": ((text.kv_lora_rank,), None),
        "kv_b_proj": ((heads * (text.qk_nope_head_dim + text.v_head_dim), text.kv_lora_rank), 0),
        "o_proj": ((hidden, heads * text.v_head_dim), 1),
    }
    for name in ("input_layernorm", "post_attention_layernorm"):
        yield TensorSpec(f"{_prefix(layer)}.{name}.weight", (hidden,), layer=layer)
    for name, (shape, shard_dim) in matrices.items():
        yield TensorSpec(f"{_prefix(layer)}.self_attn.{name}.weight", shape, shard_dim=shard_dim, layer=layer)


def _swiglu(prefix: str, hidden_size: int, intermediate_size: int, layer: int) -> Iterator[TensorSpec]:
    for name in ("gate_proj", "up_proj"):
        yield TensorSpec(f"{prefix}.{name}.weight", (intermediate_size, hidden_size), shard_dim=0, layer=layer)
    yield TensorSpec(f"{prefix}.down_proj.weight", (hidden_size, intermediate_size), shard_dim=1, layer=layer)


def _moe(text: TextConfig, layer: int, experts: int) -> Iterator[TensorSpec]:
    prefix = f"{_prefix(layer)}.mlp"
    routes = text.n_routed_experts
    yield TensorSpec(f"{prefix}.gate.weight", (routes, text.hidden_size), layer=layer)
    yield TensorSpec(f"{prefix}.gate.e_score_correction_bias", (routes,), "F32", layer=layer)
    shared_size = text.moe_intermediate_size * text.n_shared_experts
    yield from _swiglu(f"{prefix}.shared_experts", text.hidden_size, shared_size, layer)
    parts = list(_expert_parts(text))
    for expert in range(experts):
        for projection, part, shape, dtype, dim in parts:
            yield TensorSpec(expert_name(layer, expert, projection, part), shape, dtype, dim, 1, layer, expert)


def _expert_parts(text: TextConfig) -> Iterator[tuple[str, str, tuple[int, ...], str, int | None]]:
    """Yield projection, part, shape, dtype and sharded dimension of each tensor of an expert."""
    wide = (text.moe_intermediate_size, text.hidden_size)
    group = text.quantization.group_size
    for projection, (n, k), shard_dim in (("gate", wide, 0), ("up", wide, 0), ("down", wide[::-1], 1)):
        parts: dict[str, tuple[tuple[int, ...], str, int | None]] = {
            "packed": ((n, k // PACK_FACTOR), "I32", shard_dim),
            "scale": ((n, k // group), "BF16", shard_dim),
            "shape": ((2,), "I32", None),
        }
        for part, (shape, dtype, dim) in parts.items():
            yield projection, part, shape, dtype, dim


def _vision_tower(vision: VisionConfig) -> Iterator[TensorSpec]:
    hidden, mlp = vision.hidden_size, vision.intermediate_size
    prefix = "vision_tower"
    yield TensorSpec(f"{prefix}.patch_embed.proj.weight", (hidden, 3, vision.patch_size, vision.patch_size))
    yield TensorSpec(f"{prefix}.patch_embed.proj.bias", (hidden,))
    yield TensorSpec(f"{prefix}.patch_embed.pos_emb.weight", (vision.pos_emb_height, vision.pos_emb_width, hidden))
    for index in range(vision.num_hidden_layers):
        block = f"{prefix}.encoder.blocks.{index}"
        for name in ("norm0", "norm1"):
            yield from _affine(f"{block}.{name}", (hidden,))
        yield from _affine(f"{block}.wqkv", (3 * hidden, hidden), shard_dim=0, shard_blocks=3)
        yield from _affine(f"{block}.wo", (hidden, hidden), shard_dim=1)
        yield from _affine(f"{block}.mlp.fc0", (mlp, hidden), shard_dim=0)
        yield from _affine(f"{block}.mlp.fc1", (hidden, mlp), shard_dim=1)
    yield from _affine(f"{prefix}.encoder.final_layernorm", (hidden,))


def _projector(vision: VisionConfig) -> Iterator[TensorSpec]:
    """Yield the projector's tensors, which every rank holds whole in both engines."""
    merged = vision.merged_size
    yield from _affine("mm_projector.pre_norm", (vision.hidden_size,))
    yield from _affine("mm_projector.proj.0", (merged, merged))
    yield from _affine("mm_projector.proj.2", (vision.text_hidden_size, merged))


def _affine(
    prefix: str, shape: tuple[int, ...], *, shard_dim: int | None = None, shard_blocks: int = 1
) -> Iterator[TensorSpec]:
    yield TensorSpec(f"{prefix}.weight", shape, shard_dim=shard_dim, shard_blocks=shard_blocks)
    # Sharding along the outputs shards the bias too; sharding along the inputs leaves it whole.
    yield TensorSpec(f"{prefix}.bias", shape[:1], shard_dim=0 if shard_dim == 0 else None, shard_blocks=shard_blocks)
