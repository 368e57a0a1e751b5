"""The weights that one GPU holds, part by part, under tensor, expert and pipeline parallelism."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import NamedTuple

from k26_plugins.common.checkpoint import TensorSpec, tensor_table
from k26_plugins.common.model.config import K26Config, TextConfig

ROUTED = "routed experts"
GPUS_IN_A_NODE = 8
PARTS = (ROUTED, "attention", "shared experts", "dense feed-forward", "router", "embedding and head", "vision", "norms")


class LayoutError(ValueError):
    """A way of cutting that this model does not allow. The message names the size and what divides it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Layout:
    """How the model is cut."""

    tp: int = 1
    pp: int = 1
    expert_parallel: bool = False
    """Whole experts on the tensor-parallel ranks, not a part of each."""
    vision_whole: bool = True
    """The vision tower on every rank, which then takes images of its own (`--mm-encoder-tp-mode data`)."""
    context_parallel: int = 1
    """Ranks over which the KV cache of one request is cut (`--decode-context-parallel-size`)."""
    nodes: int = 1
    """Machines with as many GPUs each."""
    absorbed_copy: bool = False
    """Whether kv_b_proj is held twice, once turned for attention in the compressed space: in SGLang. vLLM turns a view."""


def check_layout(config: K26Config, layout: Layout) -> None:
    """Raise LayoutError where the model cannot be cut so."""
    text = config.text
    if text.num_attention_heads % layout.tp:
        raise LayoutError(f"tensor parallel {layout.tp} does not divide {text.num_attention_heads} attention heads.")
    group = text.quantization.group_size
    if not layout.expert_parallel and text.moe_intermediate_size % (layout.tp * group):
        raise LayoutError(
            f"tensor parallel {layout.tp} cuts experts of {text.moe_intermediate_size} within a group of {group}: use "
            f"expert parallelism or at most {text.moe_intermediate_size // group} ranks."
        )
    if not layout.vision_whole and config.vision.num_attention_heads % layout.tp:
        heads = config.vision.num_attention_heads
        raise LayoutError(
            f"tensor parallel {layout.tp} does not divide the vision tower's {heads} heads: keep it whole."
        )
    if layout.pp > text.num_hidden_layers:
        raise LayoutError(f"pipeline parallel {layout.pp} has more stages than {text.num_hidden_layers} layers.")
    if layout.tp % layout.context_parallel:
        raise LayoutError(
            f"decode-context parallel {layout.context_parallel} does not divide tensor parallel {layout.tp}."
        )


def node_of(count: int) -> int:
    """GPUs in each machine of `count` in all: all up to eight, else the largest number up to eight that divides it."""
    return (
        count if count <= GPUS_IN_A_NODE else next(size for size in range(GPUS_IN_A_NODE, 0, -1) if count % size == 0)
    )


def is_possible(config: K26Config, layout: Layout) -> bool:
    try:
        check_layout(config, layout)
    except LayoutError:
        return False
    return True


def stages(num_layers: int, pp: int) -> list[range]:
    """The layers of each pipeline stage: equal parts, what is left over to the stages before the last, as vLLM has it."""
    sizes = [num_layers // pp] * pp
    for extra in range(num_layers % pp):
        sizes[-(extra + 2) if pp > 1 else 0] += 1
    starts = [sum(sizes[:stage]) for stage in range(pp)]
    return [range(start, start + size) for start, size in zip(starts, sizes, strict=True)]


class _Group(NamedTuple):
    """Tensors that are placed alike."""

    part: str
    layer: int | None
    is_cut: bool
    """Whether tensor parallelism cuts them."""
    at_end: bool
    """Whether they are the last pipeline stage's."""


@cache
def _groups(config: K26Config) -> Mapping[_Group, int]:
    """Bytes of every group."""
    sizes: Counter[_Group] = Counter()
    for spec in tensor_table(config, experts=1).values():
        count = 1 if spec.expert is None else config.text.n_routed_experts
        at_end = spec.name.startswith(("language_model.lm_head.", "language_model.model.norm."))
        sizes[_Group(part_of(spec), spec.layer, spec.shard_dim is not None, at_end)] += count * spec.num_bytes
    return sizes


def part_of(spec: TensorSpec) -> str:
    if spec.expert is not None:
        return ROUTED
    if not spec.name.startswith("language_model."):
        return "vision"
    for mark, part in ((".self_attn.", "attention"), (".shared_experts.", "shared experts"), (".mlp.gate.", "router")):
        if mark in spec.name:
            return part
    if ".mlp." in spec.name:
        return "dense feed-forward"
    return "norms" if "norm" in spec.name else "embedding and head"


def per_gpu(config: K26Config, layout: Layout, stage: int) -> dict[str, int]:
    """Bytes by part on one GPU of a pipeline stage, the fullest rank of it. Raises LayoutError."""
    check_layout(config, layout)
    layers = stages(config.text.num_hidden_layers, layout.pp)[stage]
    held: Counter[str] = Counter(dict.fromkeys(PARTS, 0))
    experts = config.text.n_routed_experts
    for group, size in _groups(config).items():
        if not _on_stage(group, layers, stage, layout.pp):
            continue
        if group.part == ROUTED and layout.expert_parallel:
            # Rank 0 has as many whole experts as any other.
            held[group.part] += size // experts * -(-experts // layout.tp)
        elif not group.is_cut or (group.part == "vision" and layout.vision_whole):
            held[group.part] += size
        else:
            held[group.part] += size // layout.tp
    if layout.absorbed_copy:
        held["attention"] += absorbed_bytes(config.text, len(layers), layout.tp)
    return dict(held)


def absorbed_bytes(text: TextConfig, num_layers: int, tp: int) -> int:
    """kv_b_proj of one rank."""
    rows = text.num_attention_heads // tp * (text.qk_nope_head_dim + text.v_head_dim)
    return num_layers * rows * text.kv_lora_rank * 2


def _on_stage(group: _Group, layers: range, stage: int, pp: int) -> bool:
    if group.layer is not None:
        return group.layer in layers
    return stage == (pp - 1 if group.at_end else 0)
