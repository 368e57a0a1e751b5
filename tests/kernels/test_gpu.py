"""Tests that need a GPU: the real shapes against float64, CUDA graphs, and the same bits at every run.

The real shapes are also to be run once under the sanitizer, which takes some minutes (ROCm has none):

    compute-sanitizer --tool memcheck python -m pytest tests/kernels/test_gpu.py -k real_shapes
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from bench.layers import LAYERS
from k26_kernels import KernelExperts, fused_experts, workspace_bytes

from k26_plugins.common.experts import Expert, ExpertWeights, reference_experts
from k26_plugins.operate.tune.measure import random_weights

pytestmark = pytest.mark.gpu

# What docs/design.md allows every backend for rounding to bfloat16.
TOLERANCE = 4e-3
EXPERTS = 48


@pytest.fixture(scope="module", params=["ep8", "tp8"])
def layer(request: pytest.FixtureRequest) -> tuple[ExpertWeights, KernelExperts]:
    """Return 48 experts of the real size, or of a rank's part under tensor parallel 8, as published and as repacked."""
    weights = random_weights(replace(LAYERS[request.param], num_experts=EXPERTS), torch.device("cuda"))
    copies = (weights.w13_packed, weights.w13_scale, weights.w2_packed, weights.w2_scale)
    experts = KernelExperts.from_checkpoint(*(tensor.clone() for tensor in copies))
    return weights, experts


def batch(num_tokens: int, top_k: int = 8) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return hidden_states, topk_ids of 48 experts, and topk_weights."""
    generator = torch.Generator().manual_seed(num_tokens)
    x = torch.randn(num_tokens, 7168, generator=generator).to("cuda", torch.bfloat16)
    ids = torch.rand(num_tokens, EXPERTS, generator=generator).topk(top_k).indices
    return x, ids.to("cuda", torch.int32), torch.rand(num_tokens, top_k, generator=generator).to("cuda")


@pytest.mark.parametrize("num_tokens", [1, 4, 5, 64, 300, 1500])
def test_real_shapes_against_float64(layer: tuple[ExpertWeights, KernelExperts], num_tokens: int) -> None:
    weights, experts = layer
    x, ids, topk_weights = batch(num_tokens)

    def expert(index: int) -> Expert:
        return Expert(
            weights.w13_packed[index], weights.w13_scale[index], weights.w2_packed[index], weights.w2_scale[index]
        )

    expected = reference_experts(x.double(), ids, topk_weights, expert, EXPERTS)
    for batch_invariant in (False, True):
        result = fused_experts(x, experts, ids, topk_weights, batch_invariant=batch_invariant).double()
        assert ((result - expected).norm() / expected.norm()).item() <= TOLERANCE


@pytest.mark.parametrize("num_tokens", [1, 16, 512])
def test_a_cuda_graph_replays_with_new_inputs(layer: tuple[ExpertWeights, KernelExperts], num_tokens: int) -> None:
    """A CUDA graph that is captured once gives right results when it is replayed with other tokens and other experts;
    the workspace and the output are the caller's."""
    _, experts = layer
    x, ids, topk_weights = batch(num_tokens)
    out = torch.empty_like(x)
    workspace = torch.empty(workspace_bytes(experts, num_tokens, 8), dtype=torch.uint8, device="cuda")
    fused_experts(x, experts, ids, topk_weights, out=out, workspace=workspace)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        fused_experts(x, experts, ids, topk_weights, out=out, workspace=workspace)
    others = [tensor.flip(0) + 0 for tensor in (x, ids, topk_weights)]
    others[1] = (others[1] + 7) % EXPERTS
    for buffer, other in zip((x, ids, topk_weights), others, strict=True):
        buffer.copy_(other)
    workspace.fill_(0xFF)
    graph.replay()
    assert torch.equal(out, fused_experts(x, experts, ids, topk_weights))


@pytest.mark.parametrize("num_tokens", [1, 4, 33, 700])
def test_a_hundred_runs_give_the_same_bits(layer: tuple[ExpertWeights, KernelExperts], num_tokens: int) -> None:
    _, experts = layer
    x, ids, topk_weights = batch(num_tokens)
    first = fused_experts(x, experts, ids, topk_weights)
    assert all(torch.equal(fused_experts(x, experts, ids, topk_weights), first) for _ in range(100))


def test_batch_invariance_at_the_real_shape(layer: tuple[ExpertWeights, KernelExperts]) -> None:
    _, experts = layer
    x, ids, topk_weights = batch(900)
    many = fused_experts(x, experts, ids, topk_weights, batch_invariant=True)
    for rows in (slice(0, 1), slice(5, 37), slice(100, 612)):
        few = fused_experts(x[rows], experts, ids[rows], topk_weights[rows], batch_invariant=True)
        assert torch.equal(few, many[rows])


def test_expert_parallel_ids(layer: tuple[ExpertWeights, KernelExperts]) -> None:
    """Global ids through an expert map give the same bits as local ids."""
    _, experts = layer
    x, _, topk_weights = batch(40)
    ids, local = LAYERS["ep8"].choose("uniform", 40).cuda(), LAYERS["ep8"].expert_map()
    assert local is not None
    mapped = fused_experts(x, experts, ids, topk_weights, expert_map=local.cuda(), batch_invariant=True)
    here = torch.where(ids < EXPERTS, ids, -1)
    assert torch.equal(mapped, fused_experts(x, experts, here, topk_weights, batch_invariant=True))
