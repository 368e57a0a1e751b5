"""Writes a checkpoint of some size in little time, by drawing the experts' packed bits instead of quantizing."""

from __future__ import annotations

import zlib
from pathlib import Path

import pytest
import torch

from k26_plugins.common.checkpoint.dtypes import TORCH_DTYPES
from k26_plugins.common.checkpoint.table import TensorSpec, expert_name
from k26_plugins.common.tiny import checkpoint as tiny


def make_quick(folder: Path, sizes: tiny.TinySizes) -> None:
    """Write a checkpoint of these sizes to `folder`; each tensor's values depend on its name alone."""

    def draw(spec: TensorSpec, *_: object) -> torch.Tensor:
        generator = torch.Generator().manual_seed(zlib.crc32(spec.name.encode()))
        if spec.dtype == "I32":
            return torch.randint(-(2**31), 2**31, spec.shape, generator=generator, dtype=torch.int32)
        if spec.name.endswith("weight_scale"):
            return torch.full(spec.shape, 0.005, dtype=torch.bfloat16)
        values = torch.randn(spec.shape, generator=generator) * (
            0.1 if len(spec.shape) == 1 else spec.shape[-1] ** -0.5
        )
        return (values + (len(spec.shape) == 1 and "norm" in spec.name)).to(TORCH_DTYPES[spec.dtype])

    def draw_expert(first: TensorSpec, table: dict[str, TensorSpec], _: int) -> dict[str, torch.Tensor]:
        assert first.layer is not None, "experts are part of a layer"
        assert first.expert is not None, "the caller asks for an expert"
        names = [
            expert_name(first.layer, first.expert, projection, part)
            for projection in ("gate", "up", "down")
            for part in ("packed", "scale", "shape")
        ]
        return {name: draw(table[name]) for name in names}

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tiny, "_make_tensor", draw)
        patch.setattr(tiny, "_make_experts", draw_expert)
        tiny.make_tiny(folder, sizes)
