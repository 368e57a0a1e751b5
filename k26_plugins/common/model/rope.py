"""Rotary embedding with YaRN scaling on interleaved pairs (docs/model.md, 3.2)."""

from __future__ import annotations

import math

import torch

from k26_plugins.common.model.config import TextConfig


def yarn_inv_freq(config: TextConfig) -> torch.Tensor:
    """Return the inverse frequencies, float32 `[qk_rope_head_dim / 2]`, with long wavelengths stretched.

    By the "NTK by parts" method of Peng et al. 2023, dimension j has the frequency θ_j = rope_theta^(−2j/d) below the
    bound of beta_fast, θ_j / factor above the bound of beta_slow, and a linear mix of the two between the bounds.
    """
    yarn, dim = config.rope_scaling, config.qk_rope_head_dim
    theta = config.rope_theta ** (-torch.arange(0, dim, 2, dtype=torch.float64) / dim)

    def dimension_with(rotations: float) -> float:
        """Return the (fractional) dimension that makes `rotations` full turns over the original context."""
        wavelength = yarn.original_max_position_embeddings / (rotations * 2 * math.pi)
        return dim * math.log(wavelength) / (2 * math.log(config.rope_theta))

    low = max(math.floor(dimension_with(yarn.beta_fast)), 0)
    high = min(math.ceil(dimension_with(yarn.beta_slow)), dim - 1)
    ramp = ((torch.arange(dim // 2, dtype=torch.float64) - low) / max(high - low, 1e-3)).clamp(0, 1)
    return (theta / yarn.factor * ramp + theta * (1 - ramp)).float()


def apply_rope(
    x: torch.Tensor, positions: torch.Tensor, inv_freq: torch.Tensor, magnitude: float = 1.0
) -> torch.Tensor:
    """Rotate each pair (x_2j, x_2j+1) of `[num_tokens, ..., dim]` by the angle position · inv_freq_j, in float32.

    positions: `[num_tokens]`. magnitude: YaRN's factor on cosine and sine, 1 for the published model. A float64 `x` is
    rotated in float64. The result has the shape and dtype of `x`.
    """
    angles = positions.float().unsqueeze(-1) * inv_freq.to(x.device)
    angles = angles.view(len(positions), *(1,) * (x.dim() - 2), -1)
    cos, sin = angles.cos() * magnitude, angles.sin() * magnitude
    compute = torch.float64 if x.dtype == torch.float64 else torch.float32
    even, odd = x.to(compute).unflatten(-1, (-1, 2)).unbind(-1)
    return torch.stack((even * cos - odd * sin, even * sin + odd * cos), -1).flatten(-2).to(x.dtype)
