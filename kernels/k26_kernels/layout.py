"""Rearrange INT4 weights into the order in which a matrix instruction takes them, 16 bytes to a thread.

A thread loads chunks of four words (16 bytes). The eight weights of a word share a scale, and a chunk holds just what
its thread feeds to the matrix instruction, so neither the words nor the unpacked weights move between threads. A
program that streams 64 rows reads one contiguous range. The instruction alone decides which input lies in which word:
see `FRAGMENTS`.

Tensors keep the shapes of the checkpoint, `packed` int32 `[E, N, K / 8]` and `scale` bfloat16 `[E, N, K / 32]`, and an
expert's weights and scales stay in its own part of them. N must be a multiple of 64, K of 128.

In w13 (`gated`) rows are interleaved: eight of the gate projection, then the eight of the up projection that belong to
them, so that both halves of a SwiGLU end in the same thread.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

GROUP_SIZE = 32
PACK_FACTOR = 8
ROWS = 64  # rows that are stored together
K_MULTIPLE = 128
# Weights that are rearranged at a time: this takes a few small launches for an expert, and less scratch memory than one
# expert of the real size.
SLAB = 2**23

# A letter is an axis, given here with its size. A fragment's axes of rows are n and those of r a g l R that it has; its
# axes of inputs are q and the others. A weight is nibble i + 2 j + 4 h of its word.
_SIZES = {"R": 64, "r": 4, "a": 2, "g": 8, "l": 16, "c": 2, "w": 4, "j": 2, "i": 2, "h": 2, "t": 4, "k": 4}


@dataclass(frozen=True, slots=True)
class Fragment:
    """The order in which a matrix instruction takes the weights and scales of a step along K.

    `matrix` names the weights' axes in the checkpoint's order (outer to inner), `stored` in the kernels' order;
    `scale_matrix` and `scale_stored` do so for the scales. `step` is the number of inputs that `matrix` covers after
    its axis q.
    """

    step: int
    matrix: str
    stored: str
    scale_matrix: str
    scale_stored: str


FRAGMENTS = {
    # wgmma: lane 4 g + t holds inputs 2 t + h.
    "wgmma": Fragment(64, "nragqcjith", "nqrgtachji", "nragqc", "nqrgac"),
    # mma.sync as Triton feeds it with narrow weights: lane 4 g + t holds inputs 4 t + 2 i + h.
    "mma": Fragment(64, "nragqcjtih", "nqrgtachji", "nragqc", "nqrgac"),
    # tcgen05 through tensor memory, 128 rows: a lane holds a row, and a chunk 32 inputs of it.
    "tmem": Fragment(128, "nRqkwjih", "nqkRwhji", "nRqk", "nqRk"),
    # MFMA 16 × 16 × 16: lane 16 k + l holds inputs 4 k + 2 i + h of row l.
    "mfma": Fragment(128, "nrlqwjkih", "nqrklwhji", "nrlqw", "nqrlw"),
    # MFMA 16 × 16 × 32: lane 16 k + l holds inputs 8 k + 4 j + 2 i + h of row l.
    "mfma32": Fragment(128, "nrlqwkjih", "nqrklwhji", "nrlqw", "nqrlw"),
}


def check_sizes(out_features: int, in_features: int) -> None:
    """Raise ValueError for a matrix that the layout cannot hold."""
    if out_features % ROWS or in_features % K_MULTIPLE:
        raise ValueError(
            f"the kernels' layout holds matrices with a multiple of {ROWS} rows and of {K_MULTIPLE} inputs, "
            f"this one is {out_features} × {in_features}."
        )


def row_order(out_features: int, gated: bool, device: torch.device) -> torch.Tensor:
    """Return int64 `[out_features]`: for each stored row the number of the row in the checkpoint's matrix."""
    order = torch.arange(out_features, device=device)
    return order.unflatten(0, (2, -1, 8)).transpose(0, 1).flatten() if gated else order


def repack(packed: torch.Tensor, scale: torch.Tensor, fragment: str, *, gated: bool) -> None:
    """Rearrange the checkpoint's `packed` and `scale` in place, with a copy of one expert's matrix as scratch memory.

    packed: int32 `[E, N, K / 8]`. scale: bfloat16 `[E, N, K / 32]`. Both are on one device, a GPU or a CPU. fragment: a
    name in FRAGMENTS. gated: whether the matrix is w13. Raises ValueError unless N is a multiple of 64 and K of 128.
    """
    _rearrange(packed, scale, FRAGMENTS[fragment], gated, inverse=False)


def restore(packed: torch.Tensor, scale: torch.Tensor, fragment: str, *, gated: bool) -> None:
    """Undo `repack`, in place: `packed` and `scale` keep their shapes and dtypes. Arguments and errors are as there."""
    _rearrange(packed, scale, FRAGMENTS[fragment], gated, inverse=True)


def _rearrange(packed: torch.Tensor, scale: torch.Tensor, fragment: Fragment, gated: bool, *, inverse: bool) -> None:
    num_experts, out_features, words = packed.shape
    in_features = words * PACK_FACTOR
    check_sizes(out_features, in_features)
    order = row_order(out_features, gated, packed.device)
    slab = max(ROWS, SLAB // in_features // ROWS * ROWS)
    for expert in range(num_experts):
        source, target = packed[expert].clone(), packed[expert]
        source_scale, target_scale = scale[expert].clone(), scale[expert]
        for start in range(0, out_features, slab):
            here = slice(start, start + slab)
            if inverse:
                nibbles = _permuted(_unpack(source[here]), fragment.stored, fragment.matrix, in_features)
                target[order[here]] = _pack(nibbles)
                target_scale[order[here]] = _permuted(
                    source_scale[here], fragment.scale_stored, fragment.scale_matrix, in_features // GROUP_SIZE
                )
            else:
                nibbles = _permuted(_unpack(source[order[here]]), fragment.matrix, fragment.stored, in_features)
                target[here] = _pack(nibbles)
                target_scale[here] = _permuted(
                    source_scale[order[here]], fragment.scale_matrix, fragment.scale_stored, in_features // GROUP_SIZE
                )


def _permuted(tensor: torch.Tensor, source: str, target: str, columns: int) -> torch.Tensor:
    """Return `[rows, columns]` with the elements of `tensor` brought from the order of axes `source` to `target`."""
    steps = columns
    for axis in source:
        if axis in _SIZES and axis not in "Rragl":
            steps //= _SIZES[axis]
    sizes = {**_SIZES, "q": steps, "n": tensor.numel() // columns // ROWS}
    axes = tensor.reshape([sizes[axis] for axis in source])
    return axes.permute([source.index(axis) for axis in target]).reshape(-1, columns)


def _unpack(packed: torch.Tensor) -> torch.Tensor:
    """Return uint8 `[rows, K]`, one nibble in each byte, for int32 `[rows, K / 8]`."""
    low_high = packed.contiguous().view(torch.uint8)
    return torch.stack((low_high & 0xF, low_high >> 4), dim=-1).flatten(-2)


def _pack(nibbles: torch.Tensor) -> torch.Tensor:
    """Return int32 `[rows, K / 8]` for nibbles, as the inverse of `_unpack`."""
    pairs = nibbles.unflatten(-1, (-1, 2))
    packed: torch.Tensor = (pairs[..., 0] | (pairs[..., 1] << 4)).contiguous().view(torch.int32)
    return packed
