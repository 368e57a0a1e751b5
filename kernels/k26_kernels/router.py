"""Which experts a token goes to and with which weights: sigmoid, bias, top-k, renormalize, scale, in one launch."""

from __future__ import annotations

import torch
import triton
import triton.language as tl


@triton.jit
def router_kernel(
    logits: tl.tensor, bias: tl.tensor, topk_weights: tl.tensor, topk_ids: tl.tensor, scaling: tl.tensor,
    NUM_EXPERTS: tl.constexpr, TOP_K: tl.constexpr, NORMALIZE: tl.constexpr,
    BLOCK: tl.constexpr, BLOCK_TOP_K: tl.constexpr,
) -> None:  # fmt: skip
    """A program routes a token. float32 inside, whatever the logits are."""
    token = tl.program_id(0).to(tl.int64)
    expert = tl.arange(0, BLOCK)
    inside = expert < NUM_EXPERTS
    scores = tl.sigmoid(tl.load(logits + token * NUM_EXPERTS + expert, mask=inside, other=0.0).to(tl.float32))
    choice = tl.where(inside, scores + tl.load(bias + expert, mask=inside, other=0.0).to(tl.float32), float("-inf"))
    # Not a number is the largest to torch's choice. A comparison would pass over it, and the answer would look sound.
    choice = tl.where(choice != choice, float("inf"), choice)
    k = tl.arange(0, BLOCK_TOP_K)
    ids = tl.zeros([BLOCK_TOP_K], tl.int32)
    weights = tl.zeros([BLOCK_TOP_K], tl.float32)
    for rank in range(TOP_K):
        best = tl.argmax(choice, 0, tie_break_left=True)
        ids = tl.where(k == rank, best, ids)
        weights = tl.where(k == rank, tl.sum(tl.where(expert == best, scores, 0.0)), weights)
        choice = tl.where(expert == best, float("-inf"), choice)
    if NORMALIZE:
        weights = weights / (tl.sum(weights) + 1e-20)
    tl.store(topk_weights + token * TOP_K + k, weights * scaling, mask=k < TOP_K)
    tl.store(topk_ids + token * TOP_K + k, ids.to(topk_ids.dtype.element_ty), mask=k < TOP_K)


def route(
    logits: torch.Tensor,
    bias: torch.Tensor,
    top_k: int,
    scaling: float,
    *,
    normalize: bool = True,
    ids_dtype: torch.dtype = torch.int32,
) -> tuple[torch.Tensor, torch.Tensor]:
    """topk_weights float32 and topk_ids, both `[num_tokens, top_k]`, best first.

    logits: `[num_tokens, num_experts]`, any floating dtype, contiguous; one that is not a number makes its
    token's weights so where they are normalized, and is chosen first. bias: float32 `[num_experts]`; it takes
    part in the choice, not in the weights. Of equal scores the lowest expert is taken; torch.topk leaves that open.
    """
    num_tokens, num_experts = logits.shape
    topk_weights = torch.empty(num_tokens, top_k, dtype=torch.float32, device=logits.device)
    topk_ids = torch.empty(num_tokens, top_k, dtype=ids_dtype, device=logits.device)
    if num_tokens:
        router_kernel[(num_tokens,)](
            logits.contiguous(), bias, topk_weights, topk_ids, scaling,
            NUM_EXPERTS=num_experts, TOP_K=top_k, NORMALIZE=normalize,
            BLOCK=triton.next_power_of_2(num_experts), BLOCK_TOP_K=triton.next_power_of_2(top_k), num_warps=4,
        )  # fmt: skip
    return topk_weights, topk_ids


def route_reference(
    logits: torch.Tensor, bias: torch.Tensor, top_k: int, scaling: float, *, normalize: bool = True
) -> tuple[torch.Tensor, torch.Tensor]:
    """What `route` gives, in plain PyTorch; a stable sort takes the lowest expert of equal ones."""
    scores = torch.sigmoid(logits.float())
    topk_ids = torch.sort(scores + bias, dim=-1, descending=True, stable=True).indices[:, :top_k]
    topk_weights = scores.gather(-1, topk_ids)
    if normalize:
        topk_weights = topk_weights / (topk_weights.sum(-1, keepdim=True) + 1e-20)
    return topk_weights * scaling, topk_ids
