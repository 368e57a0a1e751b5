"""MoonViT-3d and its projector in plain PyTorch (docs/model.md, 4.2).

Parameters have the checkpoint's names. A medium is an image (t = 1) or a chunk of at most four video frames. In the
shapes, `P` is the number of patches of all media and `D` the tower's width; patches are ordered by frame, row, column.
Activations have the dtype of the parameters. Everything is computed on the CPU.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from k26_plugins.common.model.config import VisionConfig
from k26_plugins.common.model.linear import Linear

ROPE_THETA = 10000.0


def time_table(num_frames: int, dim: int) -> torch.Tensor:
    """Return the sinusoidal position embedding of the frames in a chunk, float32 `[num_frames, dim]`.

    The checkpoint does not store it.
    """
    omega = ROPE_THETA ** (-torch.arange(dim // 2, dtype=torch.float32) / (dim // 2))
    angles = torch.arange(num_frames, dtype=torch.float32).unsqueeze(-1) * omega
    return torch.cat((angles.sin(), angles.cos()), dim=-1)


def rope_angles(t: int, h: int, w: int, head_dim: int) -> torch.Tensor:
    """Return the rotary angles of a medium's patches, float32 `[t · h · w, head_dim / 2]`, the same in each frame.

    Pair 2j rotates by the column, pair 2j + 1 by the row.
    """
    freq = ROPE_THETA ** (-torch.arange(0, head_dim, 4, dtype=torch.float32) / head_dim)
    rows = torch.arange(h, dtype=torch.float32).repeat_interleave(w)
    columns = torch.arange(w, dtype=torch.float32).repeat(h)
    angles = torch.stack((columns.unsqueeze(-1) * freq, rows.unsqueeze(-1) * freq), dim=-1)
    return angles.flatten(-2).repeat(t, 1)


def rotate_pairs(x: torch.Tensor, angles: torch.Tensor) -> torch.Tensor:
    """Rotate adjacent pairs of x `[P, heads, head_dim]` by `angles`, float32 `[P, head_dim / 2]`, in float32.

    A float64 `x` is rotated in float64. The result has the shape and dtype of `x`.
    """
    compute = torch.float64 if x.dtype == torch.float64 else torch.float32
    cos, sin = angles.cos().unsqueeze(1), angles.sin().unsqueeze(1)
    even, odd = x.to(compute).unflatten(-1, (-1, 2)).unbind(-1)
    return torch.stack((even * cos - odd * sin, even * sin + odd * cos), -1).flatten(-2).to(x.dtype)


class PositionEmbedding(nn.Module):
    """The position embedding of patches.

    A learned grid is resampled to the medium's size; for several frames, a fixed sinusoid over the frames of a chunk is
    added.
    """

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.max_frames = config.pos_emb_time
        self.weight = nn.Parameter(torch.empty(config.pos_emb_height, config.pos_emb_width, config.hidden_size))

    def forward(self, t: int, h: int, w: int) -> torch.Tensor:
        """Return position embeddings `[t · h · w, D]` for t frames of h rows and w columns of patches.

        Their dtype is that of the parameters. Raises ValueError for more frames than a chunk may have.
        """
        if not 1 <= t <= self.max_frames:
            raise ValueError(f"a medium has {t} frames, expected 1 to {self.max_frames}: split the video into chunks.")
        grid: torch.Tensor = self.weight
        if (h, w) != tuple(grid.shape[:2]):
            resampled = F.interpolate(
                grid.permute(2, 0, 1).unsqueeze(0), size=(h, w), mode="bicubic", align_corners=False
            )
            grid = resampled.squeeze(0).permute(1, 2, 0)
        spatial = grid.flatten(0, 1)
        if t == 1:
            return spatial
        # The table is computed in float32, whatever the model's dtype is.
        time = time_table(t, spatial.shape[-1]).to(spatial)
        return (spatial.unsqueeze(0) + time.unsqueeze(1)).flatten(0, 1)


class PatchEmbed(nn.Module):
    """The embedding of patches with their positions."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.proj = nn.Conv2d(3, config.hidden_size, config.patch_size, config.patch_size)
        self.pos_emb = PositionEmbedding(config)

    def forward(self, pixel_values: torch.Tensor, grids: list[tuple[int, int, int]]) -> torch.Tensor:
        """Return `[P, D]` for the patches `[P, 3, patch_size, patch_size]` of all media, one after the other.

        Both are in the parameters' dtype. grids: (frames, rows, columns) of each medium.
        """
        x: torch.Tensor = self.proj(pixel_values).flatten(1)
        return x + torch.cat([self.pos_emb(*grid) for grid in grids])


class Mlp(nn.Module):
    """Two linear layers with a GELU, in its tanh form, between them."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.fc0 = Linear(config.hidden_size, config.intermediate_size)
        self.fc1 = Linear(config.intermediate_size, config.hidden_size)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return the output for x `[P, D]`, in the shape and dtype of `x`, which is the parameters' dtype."""
        out: torch.Tensor = self.fc1(F.gelu(self.fc0(x), approximate="tanh"))
        return out


class EncoderBlock(nn.Module):
    """A transformer block, pre-norm: attention and MLP."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.num_heads = config.num_attention_heads
        self.norm0 = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.norm1 = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.wqkv = Linear(config.hidden_size, 3 * config.hidden_size)
        self.wo = Linear(config.hidden_size, config.hidden_size)
        self.mlp = Mlp(config)

    def forward(self, x: torch.Tensor, angles: torch.Tensor, lengths: list[int]) -> torch.Tensor:
        """Return the output for x `[P, D]`, in the shape and dtype of `x`, which is the parameters' dtype.

        angles: the rotary angles, float32 `[P, head_dim / 2]`, as `rope_angles` returns them. lengths: number of
        patches of each medium; only patches of the same medium attend to each other.
        """
        x = x + self.wo(self._attention(self.wqkv(self.norm0(x)), angles, lengths))
        out: torch.Tensor = x + self.mlp(self.norm1(x))
        return out

    def _attention(self, qkv: torch.Tensor, angles: torch.Tensor, lengths: list[int]) -> torch.Tensor:
        query, key, value = qkv.unflatten(-1, (3, self.num_heads, -1)).unbind(1)
        query, key = rotate_pairs(query, angles), rotate_pairs(key, angles)
        # Patches attend only to patches of the same medium, but to those of all frames of their chunk.
        segments = zip(*(tensor.transpose(0, 1).split(lengths, dim=1) for tensor in (query, key, value)), strict=True)
        outs = [F.scaled_dot_product_attention(q, k, v) for q, k, v in segments]
        return torch.cat(outs, dim=1).transpose(0, 1).flatten(1)


class Encoder(nn.Module):
    """The transformer blocks and the final norm."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.head_dim = config.head_dim
        self.blocks = nn.ModuleList(EncoderBlock(config) for _ in range(config.num_hidden_layers))
        self.final_layernorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)

    def forward(self, x: torch.Tensor, grids: list[tuple[int, int, int]]) -> torch.Tensor:
        """Return the output for x `[P, D]`, the patches of all media, in the shape and dtype of `x`.

        x is in the parameters' dtype. grids: (frames, rows, columns) of each medium.
        """
        angles = torch.cat([rope_angles(*grid, self.head_dim) for grid in grids])
        lengths = [t * h * w for t, h, w in grids]
        for block in self.blocks:
            x = block(x, angles, lengths)
        out: torch.Tensor = self.final_layernorm(x)
        return out


class VisionTower(nn.Module):
    """MoonViT without the projector."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.merge = config.merge_kernel_size
        self.patch_embed = PatchEmbed(config)
        self.encoder = Encoder(config)

    def forward(self, pixel_values: torch.Tensor, grids: list[tuple[int, int, int]]) -> list[torch.Tensor]:
        """Return `[tokens, 4, D]` for each medium: the mean over its frames, with 2 × 2 patches for each token.

        pixel_values: `[P, 3, patch_size, patch_size]`, normalized, in the parameters' dtype, as the results are. grids:
        (frames, rows, columns) of each medium.
        """
        x = self.encoder(self.patch_embed(pixel_values, grids), grids)
        rows, columns = self.merge
        merged = []
        for part, (t, h, w) in zip(x.split([t * h * w for t, h, w in grids]), grids, strict=True):
            blocks = part.view(t, h // rows, rows, w // columns, columns, -1).mean(0)
            merged.append(blocks.transpose(1, 2).reshape(-1, rows * columns, part.shape[-1]))
        return merged


class Projector(nn.Module):
    """The projector from the tower to the text model.

    A norm is applied to each patch, and two linear layers to 2 × 2 patches at a time.
    """

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.pre_norm = nn.LayerNorm(config.hidden_size, eps=config.projector_ln_eps)
        self.proj = nn.Sequential(
            Linear(config.merged_size, config.merged_size),
            nn.GELU(),  # the exact form, while the tower uses the tanh form
            Linear(config.merged_size, config.text_hidden_size),
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return `[tokens, text_hidden_size]` for x `[tokens, 4, D]`, 2 × 2 patches for each token.

        Both are in the parameters' dtype.
        """
        out: torch.Tensor = self.proj(self.pre_norm(x).flatten(1))
        return out


class MoonViT(nn.Module):
    """The vision tower with its projector. `load_state_dict` takes the checkpoint's names."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.vision_tower = VisionTower(config)
        self.mm_projector = Projector(config)

    def forward(self, pixel_values: torch.Tensor, grid_thw: torch.Tensor) -> list[torch.Tensor]:
        """Return the embeddings `[tokens, text_hidden_size]` of each medium, in the parameters' dtype.

        pixel_values: `[P, 3, patch_size, patch_size]`, normalized, of any floating dtype. grid_thw: integers
        `[num_media, 3]`, frames, rows and columns of patches.
        """
        grids = [(t, h, w) for t, h, w in grid_thw.tolist()]
        dtype = self.vision_tower.patch_embed.proj.weight.dtype
        return [self.mm_projector(merged) for merged in self.vision_tower(pixel_values.to(dtype), grids)]
