"""Work out the weights that one GPU holds, part by part, under tensor, expert and pipeline parallelism."""

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
    """The error for a layout that this model does not allow. The message says which size the layout does not divide."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Layout:
    """How the model is cut over GPUs."""

    tp: int = 1
    """Tensor-parallel ranks."""
    pp: int = 1
    """Pipeline stages."""
    expert_parallel: bool = False
    """Whether each tensor-parallel rank holds some experts whole, and not a part of every expert."""
    vision_whole: bool = True
    """Whether every rank holds the whole vision tower and computes images of its own (`--mm-encoder-tp-mode data`)."""
    context_parallel: int = 1
    """Ranks over which the KV cache of one request is split (`--decode-context-parallel-size`)."""
    nodes: int = 1
    """Machines, all with the same number of GPUs."""
    absorbed_copy: bool = False
    """Whether kv_b_proj is held twice, the second time transposed for absorbed attention. SGLang holds both; vLLM uses
    a transposed view of one."""


def check_layout(config: K26Config, layout: Layout) -> None:
    """Raise LayoutError if the model cannot be cut as the layout says."""
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
    """Return the number of GPUs in each machine if there are `count` GPUs in all.

    Up to eight GPUs are in one machine; more are spread evenly, as many to a machine as possible up to eight.
    """
    return (
        count if count <= GPUS_IN_A_NODE else next(size for size in range(GPUS_IN_A_NODE, 0, -1) if count % size == 0)
    )


def is_possible(config: K26Config, layout: Layout) -> bool:
    """Return whether the model can be cut as the layout says."""
    try:
        check_layout(config, layout)
    except LayoutError:
        return False
    return True


def stages(num_layers: int, pp: int) -> list[range]:
    """Return the layers of each pipeline stage, divided as vLLM divides them.

    The stages have equal numbers of layers, and each layer that is left over goes to one of the stages before the last.
    """
    sizes = [num_layers // pp] * pp
    for extra in range(num_layers % pp):
        sizes[-(extra + 2) if pp > 1 else 0] += 1
    starts = [sum(sizes[:stage]) for stage in range(pp)]
    return [range(start, start + size) for start, size in zip(starts, sizes, strict=True)]


class _Group(NamedTuple):
    """A group of tensors that every layout places on the same GPUs in the same way."""

    part: str
    layer: int | None
    """None for tensors outside the decoder layers."""
    is_cut: bool
    """Whether tensor parallelism splits these tensors."""
    at_end: bool
    """Whether these tensors belong to the last pipeline stage."""


@cache
def _groups(config: K26Config) -> Mapping[_Group, int]:
    """Return the bytes of every group."""
    sizes: Counter[_Group] = Counter()
    for spec in tensor_table(config, experts=1).values():
        count = 1 if spec.expert is None else config.text.n_routed_experts
        at_end = spec.name.startswith(("language_model.lm_head.", "language_model.model.norm."))
        sizes[_Group(part_of(spec), spec.layer, spec.shard_dim is not None, at_end)] += count * spec.num_bytes
    return sizes


def part_of(spec: TensorSpec) -> str:
    """Return the part of the model, one of PARTS, that the tensor belongs to."""
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
    """Return the bytes by part on the fullest GPU of pipeline stage `stage`. Raises LayoutError."""
    check_layout(config, layout)
    layers = stages(config.text.num_hidden_layers, layout.pp)[stage]
    held: Counter[str] = Counter(dict.fromkeys(PARTS, 0))
    experts = config.text.n_routed_experts
    for group, size in _groups(config).items():
        if not _on_stage(group, layers, stage, layout.pp):
            continue
        if group.part == ROUTED and layout.expert_parallel:
            # If the ranks do not divide the experts evenly, rank 0 is one of those with the most; count its experts.
            held[group.part] += size // experts * -(-experts // layout.tp)
        elif not group.is_cut or (group.part == "vision" and layout.vision_whole):
            held[group.part] += size
        else:
            held[group.part] += size // layout.tp
    if layout.absorbed_copy:
        held["attention"] += absorbed_bytes(config.text, len(layers), layout.tp)
    return dict(held)


def absorbed_bytes(text: TextConfig, num_layers: int, tp: int) -> int:
    """Return the bytes of kv_b_proj in bfloat16 on one of `tp` ranks, over `num_layers` layers."""
    rows = text.num_attention_heads // tp * (text.qk_nope_head_dim + text.v_head_dim)
    return num_layers * rows * text.kv_lora_rank * 2


def _on_stage(group: _Group, layers: range, stage: int, pp: int) -> bool:
    if group.layer is not None:
        return group.layer in layers
    return stage == (pp - 1 if group.at_end else 0)
