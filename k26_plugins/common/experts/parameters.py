"""The experts of a layer as parameters of an engine's module: created as the checkpoint packs them, taken after loading."""

from __future__ import annotations

from collections.abc import Callable

import torch

from k26_plugins.common.experts.base import ExpertsError, ExpertWeights
from k26_plugins.common.int4 import GROUP_SIZE, PACK_FACTOR


def create_packed_parameters(
    layer: torch.nn.Module,
    num_experts: int,
    hidden_size: int,
    intermediate_size: int,
    on_parameter: Callable[[torch.nn.Parameter], None],
    *,
    device: torch.device | None = None,
) -> None:
    """Register `w13_weight_packed`, `w2_weight_packed`, their `_scale` and `_shape`, N first, `[E, …]`.

    intermediate_size: this rank's part. `on_parameter` gives each what the engine's loader reads from it. device: where they
    are created, the default device if not given. The `_shape` tensors of the checkpoint say nothing that the configuration
    does not; they exist so that the loader finds a place. Raises ExpertsError where tensor parallelism cuts through an
    INT4 group.
    """
    inner = intermediate_size
    if inner % GROUP_SIZE:
        raise ExpertsError(
            f"tensor parallelism leaves {inner} of moe_intermediate_size on a rank, which is no multiple of the INT4 "
            f"group of {GROUP_SIZE}: choose a smaller tensor parallel size, or add expert parallelism."
        )
    shapes: dict[str, tuple[tuple[int, ...], torch.dtype]] = {
        "w13_weight_packed": ((num_experts, 2 * inner, hidden_size // PACK_FACTOR), torch.int32),
        "w13_weight_scale": ((num_experts, 2 * inner, hidden_size // GROUP_SIZE), torch.bfloat16),
        "w13_weight_shape": ((num_experts, 2), torch.int32),
        "w2_weight_packed": ((num_experts, hidden_size, inner // PACK_FACTOR), torch.int32),
        "w2_weight_scale": ((num_experts, hidden_size, inner // GROUP_SIZE), torch.bfloat16),
        "w2_weight_shape": ((num_experts, 2), torch.int32),
    }
    for name, (shape, dtype) in shapes.items():
        parameter = torch.nn.Parameter(torch.empty(shape, dtype=dtype, device=device), requires_grad=False)
        layer.register_parameter(name, parameter)
        on_parameter(parameter)


def take_packed_parameters(layer: torch.nn.Module) -> ExpertWeights:
    """The loaded experts, removed from the layer: whoever takes them may repack their storage."""
    weights = ExpertWeights(
        *(
            layer.get_parameter(name).data
            for name in ("w13_weight_packed", "w13_weight_scale", "w2_weight_packed", "w2_weight_scale")
        )
    )
    for name in [name for name, _ in layer.named_parameters(recurse=False) if name.startswith(("w13_w", "w2_w"))]:
        delattr(layer, name)
    return weights
