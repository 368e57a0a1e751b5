"""Compute the experts' two GEMMs, tokens times INT4 weights, with silu_and_mul or routing weights in the epilogue."""

from __future__ import annotations

import triton
import triton.language as tl

from k26_kernels.align import COLUMNS, local_expert
from k26_kernels.dependent import after_previous
from k26_kernels.unpack import dot_operand, load_scales, load_words, rounded, settled, weights_tile


@triton.jit
def write_tile(
    acc: tl.tensor, out: tl.tensor, topk_weights: tl.tensor,
    pair: tl.tensor, count: tl.tensor, rows_first: tl.tensor, part: tl.tensor, num_pairs: tl.tensor,
    N: tl.constexpr, EPILOGUE: tl.constexpr, BLOCK_SIZE_M: tl.constexpr, BLOCK_SIZE_N: tl.constexpr,
) -> None:  # fmt: skip
    """Write one tile of results in the form that EPILOGUE names; `moe_gemm_kernel` lists these forms."""
    valid = (tl.arange(0, BLOCK_SIZE_M) < count)[None, :]
    if EPILOGUE == "silu_and_mul":
        halves = tl.permute(tl.reshape(acc, [BLOCK_SIZE_N // 16, 2, 8, BLOCK_SIZE_M]), [0, 2, 3, 1])
        gate, up = tl.split(halves)
        y = tl.reshape(gate * tl.sigmoid(gate) * up, [BLOCK_SIZE_N // 2, BLOCK_SIZE_M])
        rows = rows_first // 2 + tl.arange(0, BLOCK_SIZE_N // 2)
        tl.store(out + pair.to(tl.int64)[None, :] * (N // 2) + rows[:, None], rounded(y, tl.bfloat16), mask=valid)
    else:
        rows = rows_first + tl.arange(0, BLOCK_SIZE_N)
        place = (part * num_pairs + pair).to(tl.int64)[None, :] * N + rows[:, None]
        if EPILOGUE == "plain":
            tl.store(out + place, rounded(acc, out.dtype.element_ty), mask=valid)
        elif EPILOGUE == "weighted":
            y = acc * tl.load(topk_weights + pair)[None, :]
            tl.store(out + place, rounded(y, out.dtype.element_ty), mask=valid)
        else:
            tl.store(out + place, acc, mask=valid)


@triton.jit
def multiply_step(
    acc: tl.tensor, words: tl.tensor, scales: tl.tensor, x_rows: tl.tensor, valid: tl.tensor,
    rows_first: tl.tensor, k: tl.tensor, K: tl.constexpr, BLOCK_SIZE_N: tl.constexpr, BLOCK_SIZE_K: tl.constexpr,
    FRAGMENT: tl.constexpr, PACKED_MATH: tl.constexpr, WAIT: tl.constexpr, ONCE: tl.constexpr,
) -> tl.tensor:  # fmt: skip
    """Return acc plus the products over BLOCK_SIZE_K inputs from k on. ONCE: as in `load_words`."""
    w = load_words(words, rows_first, k, K, BLOCK_SIZE_N, BLOCK_SIZE_K, FRAGMENT, ONCE)
    s = load_scales(scales, rows_first, k, K, BLOCK_SIZE_N, BLOCK_SIZE_K, FRAGMENT)
    xt = tl.load(x_rows[None, :] + (k + tl.arange(0, BLOCK_SIZE_K))[:, None], mask=valid, other=0.0)
    tile_w = weights_tile(w, s, BLOCK_SIZE_N, BLOCK_SIZE_K, FRAGMENT, PACKED_MATH, tl.bfloat16)
    acc = tl.dot(dot_operand(tile_w), dot_operand(xt), acc)
    if WAIT:
        acc = settled(acc)
    return acc


@triton.jit(do_not_specialize=["num_pairs", "num_experts", "num_global"])
def moe_gemm_kernel(
    x: tl.tensor, packed: tl.tensor, scale: tl.tensor, out: tl.tensor,
    topk_ids: tl.tensor, expert_map: tl.tensor, topk_weights: tl.tensor, sorted_pairs: tl.tensor, blocks: tl.tensor,
    num_pairs: tl.tensor, num_experts: tl.tensor, num_global: tl.tensor,
    N: tl.constexpr, K: tl.constexpr, PAIRS_PER_X: tl.constexpr, EPILOGUE: tl.constexpr,
    SORTED: tl.constexpr, HAS_MAP: tl.constexpr, SPLIT_K: tl.constexpr,
    BLOCK_SIZE_M: tl.constexpr, BLOCK_SIZE_N: tl.constexpr, BLOCK_SIZE_K: tl.constexpr,
    FRAGMENT: tl.constexpr, PACKED_MATH: tl.constexpr, WAIT: tl.constexpr, DEPENDENT: tl.constexpr,
) -> None:  # fmt: skip
    """Compute one GEMM. Each program walks over tiles of (block of pairs, block of rows, part of K).

    x: bfloat16 `[num_pairs / PAIRS_PER_X, K]`. packed, scale: the experts' N × K matrices, as layout.py stores them.
    SORTED: whether the blocks of pairs come from the table of `moe_align_block_size`; if not, every pair is a block of
    its own, and `sorted_pairs` and `blocks` are not read.
    EPILOGUE names what is written to `out` for each pair with a local expert:
      "silu_and_mul"  silu(gate) · up, bfloat16 `[num_pairs, N / 2]`; SPLIT_K is 1
      "weighted"      the result times the pair's routing weight, in the dtype of `out`, `[SPLIT_K, num_pairs, N]`
      "plain"         the result, in the dtype of `out`, `[num_pairs, N]`; SPLIT_K is 1
      "partial"       the split-K partial, float32 `[SPLIT_K, num_pairs, N]`, rows as they are stored
    WAIT: let each step's matrix instructions end before the next step's weights are made (`Target.waits`).

    The steps along K are loaded ahead of their matrix instructions. If there is only one step, whole tiles are loaded
    ahead, with their rows of the table and their tokens.
    """
    after_previous(DEPENDENT)
    ROW_BLOCKS: tl.constexpr = N // BLOCK_SIZE_N
    K_PART: tl.constexpr = K // SPLIT_K
    # If pairs are sorted, the other blocks of an expert find its weights in the cache. If not, there are only a few
    # pairs, which seldom share an expert, and weights that stay in the cache would push out what the next launches
    # read.
    ONCE: tl.constexpr = not SORTED
    column = tl.arange(0, BLOCK_SIZE_M)
    num_blocks = num_pairs
    if SORTED:
        num_blocks = tl.load(blocks)
    for tile in range(tl.program_id(0), num_blocks * (ROW_BLOCKS * SPLIT_K), tl.num_programs(0)):
        part = tile % SPLIT_K
        output_tile = tile // SPLIT_K
        if SORTED:
            # All blocks of an expert take a tile of its weights in turn, so that only the first reads the tile from
            # memory.
            row = blocks + 1 + output_tile // ROW_BLOCKS * COLUMNS
            first = tl.load(row + 3)
            siblings = tl.load(row + 4)
            within = output_tile - first * ROW_BLOCKS
            turn = within // siblings
            rows_first = turn * BLOCK_SIZE_N
            row = blocks + 1 + (first + within - turn * siblings) * COLUMNS
            expert = tl.load(row)
            count = tl.load(row + 2)
            pair = tl.load(sorted_pairs + tl.load(row + 1) + column, mask=column < count, other=0)
        else:
            rows_first = output_tile % ROW_BLOCKS * BLOCK_SIZE_N
            pair = output_tile // ROW_BLOCKS + tl.zeros_like(column)
            expert = local_expert(
                topk_ids, expert_map, output_tile // ROW_BLOCKS, num_pairs, num_experts, num_global, HAS_MAP
            )
            count = tl.where(expert >= 0, 1, 0)
        x_rows = x + (pair // PAIRS_PER_X).to(tl.int64) * K
        valid = (column < count)[None, :]
        acc = tl.zeros([BLOCK_SIZE_N, BLOCK_SIZE_M], tl.float32)
        if K_PART == BLOCK_SIZE_K:
            # A branch would prevent the next tiles from being loaded ahead. So a pair without a local expert takes the
            # first expert's weights, and stores nothing.
            some = tl.maximum(expert, 0).to(tl.int64)
            acc = multiply_step(
                acc, packed + some * (N * K // 8), scale + some * (N * K // 32), x_rows, valid, rows_first,
                part * K_PART, K, BLOCK_SIZE_N, BLOCK_SIZE_K, FRAGMENT, PACKED_MATH, WAIT, ONCE,
            )  # fmt: skip
            write_tile(
                acc,
                out,
                topk_weights,
                pair,
                count,
                rows_first,
                part,
                num_pairs,
                N,
                EPILOGUE,
                BLOCK_SIZE_M,
                BLOCK_SIZE_N,
            )
        elif expert >= 0:
            words = packed + expert.to(tl.int64) * (N * K // 8)
            scales = scale + expert.to(tl.int64) * (N * K // 32)
            for k in range(part * K_PART, (part + 1) * K_PART, BLOCK_SIZE_K):
                acc = multiply_step(
                    acc, words, scales, x_rows, valid, rows_first, k, K,
                    BLOCK_SIZE_N, BLOCK_SIZE_K, FRAGMENT, PACKED_MATH, WAIT, ONCE,
                )  # fmt: skip
            write_tile(
                acc,
                out,
                topk_weights,
                pair,
                count,
                rows_first,
                part,
                num_pairs,
                N,
                EPILOGUE,
                BLOCK_SIZE_M,
                BLOCK_SIZE_N,
            )
