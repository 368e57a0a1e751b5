"""Restore the checkpoint's layout from that of `weights.hpp`, with torch's operators, on any device."""

from __future__ import annotations

import torch

# Rows of a tile, as in kernel.hpp.
ROWS = 16


def restore_rows(packed: torch.Tensor, scale: torch.Tensor, *, gated: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the checkpoint's int32 `[E, N, K / 8]` and bfloat16 `[E, N, K / 32]` for repacked tensors of these shapes.

    gated: whether pairs of tiles of the gate projection alternate with pairs of tiles of the up projection, as in w13.
    """
    return _rows(_neighbours(packed), gated), _rows(scale, gated)


def _neighbours(packed: torch.Tensor) -> torch.Tensor:
    """Put neighbouring inputs into a byte, as in the checkpoint; repacked, byte j of a word has inputs j and 4 + j."""
    stored = packed.contiguous().view(torch.uint8).unflatten(-1, (-1, 4))
    inputs = torch.cat((stored & 0xF, stored >> 4), dim=-1)
    words: torch.Tensor = (inputs[..., 0::2] | (inputs[..., 1::2] << 4)).flatten(-2).view(torch.int32)
    return words


def _rows(stored: torch.Tensor, gated: bool) -> torch.Tensor:
    """Return `[E, N, columns]` for tiles that hold one column of their rows after another."""
    experts, rows, columns = stored.shape
    tiles = stored.reshape(experts, rows // ROWS, columns, ROWS).transpose(2, 3)
    if gated:
        # Tile 4 p + 2 u + i is tile 2 p + i of gate (u = 0) or up.
        tiles = tiles.unflatten(1, (-1, 2, 2)).transpose(1, 2)
    return tiles.reshape(experts, rows, columns)
