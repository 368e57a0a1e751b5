"""Unpack stored words and scales to a tile of weights, in the registers from which the matrix instruction takes them.

All functions here are device functions.
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton import knobs

# Whether Triton's interpreter runs the kernels, as in tests without a GPU. The two helpers below correct the
# interpreter's bfloat16; on a GPU they compile to their last lines alone.
INTERPRETED = tl.constexpr(knobs.runtime.interpret)


@triton.jit
def dot_operand(x: tl.tensor) -> tl.tensor:
    """Return x as `tl.dot` takes it: float32 in the interpreter, whose `tl.dot` multiplies the raw bits of bfloat16."""
    if INTERPRETED:
        return x.to(tl.float32)
    else:
        return x


@triton.jit
def rounded(x: tl.tensor, DTYPE: tl.constexpr) -> tl.tensor:
    """Round float32 x to the nearest value of DTYPE.

    The interpreter by itself truncates to bfloat16, which has twice the error, always in the same direction.
    """
    if INTERPRETED and DTYPE == tl.bfloat16:  # noqa: SIM300 - Triton compares from the left
        bits = x.to(tl.int32, bitcast=True)
        return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).to(tl.int16).to(tl.bfloat16, bitcast=True)
    else:
        return x.to(DTYPE)


@triton.jit
def settled(acc: tl.tensor) -> tl.tensor:
    """Return acc once the matrix instructions that compute it have ended: accessing acc makes the compiler wait."""
    return tl.inline_asm_elementwise("mov.f32 $0, $1;", "=f,f", [acc], dtype=tl.float32, is_pure=True, pack=1)


@triton.jit
def load_words(
    packed: tl.tensor, rows_first: tl.tensor, input_first: tl.tensor, K: tl.constexpr,
    BLOCK_SIZE_N: tl.constexpr, BLOCK_SIZE_K: tl.constexpr, FRAGMENT: tl.constexpr, ONCE: tl.constexpr = False,
) -> tl.tensor:  # fmt: skip
    """Load the chunks of a tile, int32 `[BLOCK_SIZE_N · BLOCK_SIZE_K / 32, 4]`. `packed` points at an expert's matrix.

    ONCE: nothing else will read these words, so the cache evicts them first. AMD and sm_80 have no such hint.
    """
    STEP: tl.constexpr = 64 if FRAGMENT == "mma" or FRAGMENT == "wgmma" else 128
    CHUNKS: tl.constexpr = 2 * STEP  # in 64 rows of one step
    SLABS: tl.constexpr = BLOCK_SIZE_N // 64
    chunk = tl.arange(0, BLOCK_SIZE_N * BLOCK_SIZE_K // 32)
    slab = (chunk // CHUNKS) % SLABS
    step = chunk // (CHUNKS * SLABS)
    offsets = slab * (8 * K) + step * (CHUNKS * 4) + (chunk % CHUNKS) * 4
    first = rows_first * (K // 8) + input_first * 8
    places = packed + first + offsets[:, None] + tl.arange(0, 4)[None, :]
    return tl.load(places, eviction_policy="evict_first" if ONCE else "")


@triton.jit
def load_scales(
    scale: tl.tensor, rows_first: tl.tensor, input_first: tl.tensor, K: tl.constexpr,
    BLOCK_SIZE_N: tl.constexpr, BLOCK_SIZE_K: tl.constexpr, FRAGMENT: tl.constexpr,
) -> tl.tensor:  # fmt: skip
    """Load each word's scale, bfloat16 in the shape of `load_words`. Threads of the same rows read the same scales."""
    STEP: tl.constexpr = 64 if FRAGMENT == "mma" or FRAGMENT == "wgmma" else 128
    CHUNKS: tl.constexpr = 2 * STEP
    SLABS: tl.constexpr = BLOCK_SIZE_N // 64
    first = rows_first * (K // 32) + input_first * 2
    if FRAGMENT == "tmem":
        # The scales of four groups of a row lie together, and each of them is the scale of a whole chunk.
        row = tl.arange(0, BLOCK_SIZE_N * BLOCK_SIZE_K // 128)
        places = (row // 64) % SLABS * (2 * K) + row // (64 * SLABS) * 256 + row % 64 * 4
        groups = tl.load(scale + first + places[:, None] + tl.arange(0, 4)[None, :])
        by_step = tl.reshape(groups, [BLOCK_SIZE_K // 128, SLABS, 64, 4])
        each = tl.reshape(tl.permute(by_step, [0, 1, 3, 2]), [BLOCK_SIZE_N * BLOCK_SIZE_K // 32, 1])
        return tl.broadcast_to(each, [BLOCK_SIZE_N * BLOCK_SIZE_K // 32, 4])
    chunk = tl.arange(0, BLOCK_SIZE_N * BLOCK_SIZE_K // 32)
    slab = (chunk // CHUNKS) % SLABS
    step = chunk // (CHUNKS * SLABS)
    owner = chunk % CHUNKS // 64 * 16 + chunk % 16 if STEP == 128 else chunk % CHUNKS // 4
    offsets = slab * (2 * K) + step * CHUNKS + owner * 4
    return tl.load(scale + first + offsets[:, None] + tl.arange(0, 4)[None, :])


@triton.jit
def weights_tile(
    words: tl.tensor, scales: tl.tensor, BLOCK_SIZE_N: tl.constexpr, BLOCK_SIZE_K: tl.constexpr,
    FRAGMENT: tl.constexpr, PACKED_MATH: tl.constexpr, DTYPE: tl.constexpr,
) -> tl.tensor:  # fmt: skip
    """Return the weights (u − 8) · scale, rounded once, as `[BLOCK_SIZE_N, BLOCK_SIZE_K]` of DTYPE.

    PACKED_MATH: compute two weights with each instruction, for bfloat16 on NVIDIA. Both ways give the same bits.
    """
    if PACKED_MATH:
        doubled = scales.to(tl.int16, bitcast=True).to(tl.int32) & 0xFFFF
        # 128 + u is exact in bfloat16: its bits are 0x4300 | u. Subtracting 136 is exact, so only the multiplication
        # rounds. sm_80 has no instructions that subtract or multiply bfloat16, so both steps are a fused multiply and
        # add.
        v0, v1, v2, v3 = tl.inline_asm_elementwise(
            asm="""
            {
            .reg .b32 one, offset, zero;
            mov.b32 one, 0x3F803F80;
            mov.b32 offset, 0xC308C308;
            mov.b32 zero, 0x80008000;
            shr.u32 $1, $4, 4;
            shr.u32 $2, $4, 8;
            shr.u32 $3, $4, 12;
            lop3.b32 $0, $4, 0x000F000F, 0x43004300, 0xEA;
            lop3.b32 $1, $1, 0x000F000F, 0x43004300, 0xEA;
            lop3.b32 $2, $2, 0x000F000F, 0x43004300, 0xEA;
            lop3.b32 $3, $3, 0x000F000F, 0x43004300, 0xEA;
            fma.rn.bf16x2 $0, $0, one, offset;
            fma.rn.bf16x2 $1, $1, one, offset;
            fma.rn.bf16x2 $2, $2, one, offset;
            fma.rn.bf16x2 $3, $3, one, offset;
            fma.rn.bf16x2 $0, $0, $5, zero;
            fma.rn.bf16x2 $1, $1, $5, zero;
            fma.rn.bf16x2 $2, $2, $5, zero;
            fma.rn.bf16x2 $3, $3, $5, zero;
            }
            """,
            constraints="=&r,=&r,=&r,=&r,r,r",
            args=[words, doubled | (doubled << 16)],
            dtype=(tl.int32, tl.int32, tl.int32, tl.int32),
            is_pure=True,
            pack=1,
        )
        v = tl.join(tl.join(v0, v2), tl.join(v1, v3))
        low = (v & 0xFFFF).to(tl.int16).to(tl.bfloat16, bitcast=True)
        high = ((v >> 16) & 0xFFFF).to(tl.int16).to(tl.bfloat16, bitcast=True)
        values = tl.join(low, high)
    else:
        v = tl.join(tl.join(words, words >> 8), tl.join(words >> 4, words >> 12))
        u = tl.join(v, v >> 16) & 0xF
        values = rounded((u - 8).to(tl.float32) * scales.to(tl.float32)[:, :, None, None, None], DTYPE)
    # The axes are now [chunk, word, j, i, h], in the letters of layout.py; nr is n and r as one axis.
    if FRAGMENT == "tmem":
        axes = tl.reshape(values, [BLOCK_SIZE_K // 128, BLOCK_SIZE_N // 64, 4, 64, 4, 2, 2, 2])  # q n k R w j i h
        tile = tl.permute(axes, [1, 3, 0, 2, 4, 5, 6, 7])  # n R q k w j i h
    elif FRAGMENT == "mfma":
        axes = tl.reshape(values, [BLOCK_SIZE_K // 128, BLOCK_SIZE_N // 16, 4, 16, 4, 2, 2, 2])  # q nr k l w j i h
        tile = tl.permute(axes, [1, 3, 0, 4, 5, 2, 6, 7])  # nr l q w j k i h
    elif FRAGMENT == "mfma32":
        axes = tl.reshape(values, [BLOCK_SIZE_K // 128, BLOCK_SIZE_N // 16, 4, 16, 4, 2, 2, 2])  # q nr k l w j i h
        tile = tl.permute(axes, [1, 3, 0, 4, 2, 5, 6, 7])  # nr l q w k j i h
    else:
        axes = tl.reshape(values, [BLOCK_SIZE_K // 64, BLOCK_SIZE_N // 16, 8, 4, 2, 2, 2, 2, 2])  # q nr g t a c j i h
        if FRAGMENT == "wgmma":
            tile = tl.permute(axes, [1, 4, 2, 0, 5, 6, 7, 3, 8])  # nr a g q c j i t h
        else:
            tile = tl.permute(axes, [1, 4, 2, 0, 5, 6, 3, 7, 8])  # nr a g q c j t i h
    return tl.reshape(tile, [BLOCK_SIZE_N, BLOCK_SIZE_K])
