"""Tests of the kernels as compiled for NVIDIA's targets, run instruction by instruction on the CPU, against float64.

The PTX interpreter is in support/ptx. Tests under Triton's interpreter (tests/kernels) run the same kernels' source;
only these tests run the kernels' inline assembly, their matrix instructions, and the copies and barriers that the
compiler adds.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from contextlib import nullcontext

import pytest
import torch
import triton
from bench.dequantize import dequantize
from k26_kernels import KernelExperts, fused_experts, repack, workspace_bytes
from k26_kernels.align import counts_bytes, max_blocks, moe_align_block_size, moe_align_block_size_reference
from k26_kernels.experts import make_plan
from k26_kernels.target import OVERWRITES_WEIGHTS, TARGETS
from support.experts import dense, error, inputs, judge, make_weights, to_device
from support.experts import route as choose_experts
from support.ptx.launch import Emulated
from support.ptx.memory import PtxError
from triton.runtime.errors import PTXASError

from k26_plugins.common.experts import ExpertWeights

NVIDIA = [name for name, target in TARGETS.items() if not target.amd]
# As in tests/kernels: weights, activations and the result are rounded to bfloat16.
TOLERANCE = 5e-3
HIDDEN_SIZE, INTERMEDIATE_SIZE = 256, 128

CompiledFor = Callable[..., dict[str, Emulated]]


def load(weights: ExpertWeights) -> KernelExperts:
    copy = to_device(weights, torch.device("cpu"))
    return KernelExperts.from_checkpoint(copy.w13_packed, copy.w13_scale, copy.w2_packed, copy.w2_scale)


def batch(num_tokens: int, top_k: int, num_experts: int, hidden_size: int = HIDDEN_SIZE) -> tuple[torch.Tensor, ...]:
    """Return hidden_states, ids in which the last expert has no token and one pair no expert, and routing weights."""
    ids, topk_weights = choose_experts(num_tokens, top_k, num_experts - 1)
    ids = ids.int()
    if num_tokens > 1:
        ids[1, 0] = -1
    return inputs(num_tokens, hidden_size), ids, topk_weights


@pytest.mark.parametrize("config", ["single", "16", "32", "64", "128"])
@pytest.mark.parametrize("target", NVIDIA)
def test_every_config(compiled_for: CompiledFor, monkeypatch: pytest.MonkeyPatch, target: str, config: str) -> None:
    """The result is right although experts have uneven numbers of tokens, blocks are partly empty, one expert has no
    tokens, and the workspace holds garbage.

    The GEMMs' tiles lie in shared memory such that accesses have no bank conflicts.
    """
    kernels = compiled_for(target)
    conflicts = kernels["moe_gemm_kernel"].conflicts
    monkeypatch.setattr("k26_kernels.experts.choose", lambda *arguments: config)
    make_plan.cache_clear()
    # In one config w2's inputs are those of a rank under tensor parallel 8.
    weights = make_weights(4, HIDDEN_SIZE, 256 if config == "16" else INTERMEDIATE_SIZE)
    x, ids, topk_weights = batch(2 if config == "single" else 37, 2, 4)
    experts = load(weights)
    workspace = torch.full((workspace_bytes(experts, len(x), 2),), 0xFF, dtype=torch.uint8)
    result = fused_experts(x, experts, ids, topk_weights, workspace=workspace)
    assert error(result, judge(weights, x, ids, topk_weights)) <= TOLERANCE
    assert kernels["align_kernel"].launches > 0 or config == "single"
    assert kernels["moe_gemm_kernel"].conflicts == conflicts


@pytest.mark.parametrize(("capability", "target"), [(86, "sm_80"), (89, "sm_80"), (103, "sm_100"), (121, "sm_120")])
def test_the_other_members_of_a_family(compiled_for: CompiledFor, capability: int, target: str) -> None:
    """RTX 30 and 40, B300 and GB10 take their target's layout and configs; Triton compiles for their own capability."""
    compiled_for(target, capability=capability)
    weights = make_weights(4, HIDDEN_SIZE, INTERMEDIATE_SIZE)
    x, ids, topk_weights = batch(37, 2, 4)
    try:
        result = fused_experts(x, load(weights), ids, topk_weights)
    except PTXASError as reason:
        if "is not defined for option 'gpu-name'" not in str(reason):
            raise
        pytest.skip(f"the assembler of Triton {triton.__version__} does not know sm_{capability}")
    assert error(result, judge(weights, x, ids, topk_weights)) <= TOLERANCE


@pytest.mark.parametrize("num_tokens", [1, 5])
@pytest.mark.parametrize("target", NVIDIA)
def test_split_along_k(compiled_for: CompiledFor, target: str, num_tokens: int) -> None:
    compiled_for(target, num_sms=132)
    weights = make_weights(2, 1024, INTERMEDIATE_SIZE)
    ids = torch.tensor([[1], [0], [1], [-1], [1]], dtype=torch.int32)[:num_tokens]
    x, topk_weights = inputs(num_tokens, 1024), torch.full((num_tokens, 1), 0.7)
    experts = load(weights)
    assert make_plan(experts.device, experts.shape, num_tokens, 1, 2).split_w13 > 1
    result = fused_experts(x, experts, ids, topk_weights)
    assert error(result, judge(weights, x, ids, topk_weights)) <= TOLERANCE


@pytest.mark.parametrize("target", NVIDIA)
def test_the_real_shape_of_a_rank(compiled_for: CompiledFor, target: str) -> None:
    """At 7168 × 256, the sizes of a rank under tensor parallel 8, and with ids that go through an expert map, the error
    is within the goal that every backend has."""
    compiled_for(target)
    weights = make_weights(1, 7168, 256)
    x, topk_weights = inputs(1, 7168), torch.tensor([[0.4, 0.6]])
    ids, expert_map = torch.tensor([[0, 1]], dtype=torch.int32), torch.tensor([-1, 0], dtype=torch.int32)
    result = fused_experts(x, load(weights), ids, topk_weights, expert_map=expert_map)
    assert error(result, judge(weights, x, torch.tensor([[-1, 0]]), topk_weights)) <= 4e-3


@pytest.mark.parametrize("target", NVIDIA)
def test_a_tokens_bits_in_any_batch(compiled_for: CompiledFor, target: str) -> None:
    compiled_for(target)
    experts = load(make_weights(4, HIDDEN_SIZE, INTERMEDIATE_SIZE))
    x, ids, topk_weights = batch(23, 2, 4)
    many = fused_experts(x, experts, ids, topk_weights, batch_invariant=True)
    for rows in (slice(0, 1), slice(3, 12)):
        assert torch.equal(
            fused_experts(x[rows], experts, ids[rows], topk_weights[rows], batch_invariant=True), many[rows]
        )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("target", NVIDIA)
def test_dequantize(compiled_for: CompiledFor, target: str, gated: bool, dtype: torch.dtype) -> None:
    """The result has the bits of compressed-tensors' unpacking, rounded once."""
    compiled_for(target)
    weights = make_weights(3, HIDDEN_SIZE, INTERMEDIATE_SIZE)
    packed, scale = (weights.w13_packed, weights.w13_scale) if gated else (weights.w2_packed, weights.w2_scale)
    expected = torch.stack([dense(packed[expert], scale[expert]) for expert in (2, 0)]).to(dtype)
    repack(packed, scale, TARGETS[target].fragment, gated=gated)
    assert torch.equal(dequantize(packed, scale, torch.tensor([2, 0]), dtype, gated=gated), expected)


@pytest.mark.parametrize("target", NVIDIA)
def test_align(compiled_for: CompiledFor, target: str) -> None:
    """With more pairs than one launch can sort, and an expert map, two launches give the right table of blocks and the
    right order of each expert's pairs."""
    kernels = compiled_for(target)
    ids = choose_experts(520, 2, 8)[0].int()
    ids[3, 0] = -1
    expert_map = torch.tensor([4, -1, 0, 3, 2, -1, 1, 5], dtype=torch.int32)
    room = max_blocks(ids.numel(), 6, 16)
    sizes = (ids.numel(), 1 + 5 * room, counts_bytes(ids.numel(), 6) // 4)
    sorted_pairs, blocks, counts = (torch.full((size,), -7, dtype=torch.int32) for size in sizes)
    moe_align_block_size(ids, expert_map, 6, 16, sorted_pairs, blocks, counts)
    rows = [tuple(row) for row in blocks[1:].view(room, 5)[: blocks[0]].tolist()]
    assert (sorted_pairs[sorted_pairs >= 0].tolist(), rows) == moe_align_block_size_reference(ids, expert_map, 6, 16)
    assert kernels["place_kernel"].launches > 0


# Faults that a compiler or a careless edit could make, as a pattern in the PTX and its replacement: the run has to
# notice each of them.
BROKEN = {
    "no wait for copies": (r"cp\.async\.wait_group[^;]*;", ""),
    "no wait for matrix instructions": (r"wgmma\.wait_group[^;]*;", ""),
    "no barrier": (r"bar\.sync[^;]*;", ""),
    "another zero point": ("0xC308C308", "0xC307C307"),
    "nibbles of another byte": (r"shr\.u32 (\S+), (\S+), 8;", r"shr.u32 \1, \2, 16;"),
    "weights loaded out of bounds": (r"mad\.wide\.u32 (.*), \d{5,},", r"mad.wide.u32 \1, 99999984,"),
}


@pytest.mark.parametrize("broken", BROKEN)
def test_a_broken_kernel_is_noticed(compiled_for: CompiledFor, broken: str) -> None:
    pattern, replacement = BROKEN[broken]
    edits = []

    def edit(ptx: str) -> str:
        # Only the GEMMs' code is edited: the other kernels have hardly any of it.
        if "moe_gemm_kernel" not in ptx:
            return ptx
        text, count = re.subn(pattern, replacement, ptx)
        edits.append(count)
        return text

    compiled_for("sm_90", edit=edit)
    weights = make_weights(4, HIDDEN_SIZE, INTERMEDIATE_SIZE)
    x, ids, topk_weights = batch(20, 2, 4)
    try:
        result = fused_experts(x, load(weights), ids, topk_weights)
        assert not error(result, judge(weights, x, ids, topk_weights)) <= 10 * TOLERANCE
    except PtxError:
        pass
    assert max(edits) > 0


def test_triton_waits_for_products_from_3_8_on(compiled_for: CompiledFor, monkeypatch: pytest.MonkeyPatch) -> None:
    """`Target.waits` exists because earlier Tritons let the weights of a matrix instruction change while it runs."""
    affected = OVERWRITES_WEIGHTS
    monkeypatch.setattr("k26_kernels.target.OVERWRITES_WEIGHTS", False)
    compiled_for("sm_90")
    x, ids, topk_weights = batch(20, 2, 4)
    experts = load(make_weights(4, HIDDEN_SIZE, INTERMEDIATE_SIZE))
    with pytest.raises(PtxError, match="weights change under a product") if affected else nullcontext():
        fused_experts(x, experts, ids, topk_weights)
