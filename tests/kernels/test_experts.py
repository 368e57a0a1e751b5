"""Tests of `fused_experts`, the routed sum, against float64 on weights that compressed-tensors unpacks."""

from __future__ import annotations

from importlib import import_module
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from k26_kernels import KernelExperts, Shape, fused_experts, workspace_bytes
from k26_kernels.config import kernel_configs
from k26_kernels.experts import TOKENS_AT_ONCE, expected_blocks, make_plan
from k26_kernels.reference import fused_experts_reference
from k26_kernels.target import TARGETS, Device
from support.experts import error, inputs, judge, make_weights, route, to_device

from k26_plugins.common.experts import ExpertWeights
from k26_plugins.operate.tune.routing import Layer

experts_module, align = (import_module(f"k26_kernels.{name}") for name in ("experts", "align"))

# Weights, activations and the result are rounded to bfloat16 (1.5e-3 each); with so few values the errors scatter.
TOLERANCE = 5e-3


def on(device: torch.device, weights: ExpertWeights) -> KernelExperts:
    """Return the kernels' experts, made from copies of the weights on the device."""
    copy = to_device(weights, device)
    return KernelExperts.from_checkpoint(copy.w13_packed, copy.w13_scale, copy.w2_packed, copy.w2_scale)


def result_of(
    device: torch.device,
    weights: ExpertWeights,
    x: torch.Tensor,
    ids: torch.Tensor,
    topk_weights: torch.Tensor,
    **options: object,
) -> torch.Tensor:
    experts = on(device, weights)
    return fused_experts(x.to(device), experts, ids.to(device), topk_weights.to(device), **options).cpu()  # type: ignore[arg-type]


@pytest.mark.parametrize("num_tokens", [1, 6])
def test_every_layout(each_layout: str, device: torch.device, num_tokens: int) -> None:
    """Each layout gives the right sum, without sorting of the pairs for one token, and with it for six."""
    weights = make_weights(4, 256, 128)
    ids, topk_weights = route(num_tokens, 2, 4)
    x = inputs(num_tokens, 256)
    expected = judge(weights, x, ids, topk_weights)
    assert error(result_of(device, weights, x, ids, topk_weights), expected) <= TOLERANCE
    plain = fused_experts_reference(x.to(device), on(device, weights), ids.to(device), topk_weights.to(device))
    assert error(plain.cpu(), expected) <= 1e-5


@pytest.mark.parametrize(
    ("num_tokens", "top_k", "num_experts", "hidden_size", "intermediate_size"),
    [(2, 8, 9, 128, 128), (4, 1, 3, 128, 256), (5, 8, 8, 128, 128), (12, 2, 2, 128, 128), (50, 1, 1, 128, 128)],
    ids=str,
)
def test_against_float64(
    device: torch.device, num_tokens: int, top_k: int, num_experts: int, hidden_size: int, intermediate_size: int
) -> None:
    weights = make_weights(num_experts, hidden_size, intermediate_size)
    ids, topk_weights = route(num_tokens, top_k, num_experts)
    x = inputs(num_tokens, hidden_size)
    expected = judge(weights, x, ids, topk_weights)
    assert error(result_of(device, weights, x, ids, topk_weights), expected) <= TOLERANCE


def test_the_largest_blocks(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks of 128, the one config that the shapes of `test_against_float64` do not reach, give the right sum."""
    experts = on(device, make_weights(2, 128, 128))
    reached = {
        make_plan(experts.device, experts.shape, tokens, top_k, count).config.BLOCK_SIZE_M
        for tokens, top_k, count in [(2, 8, 9), (5, 8, 8), (12, 2, 2), (50, 1, 1)]
    }
    assert {config.BLOCK_SIZE_M for config in kernel_configs(experts.device, experts.shape).values()} - reached == {128}
    weights = make_weights(1, 128, 128)
    ids, topk_weights = torch.zeros(130, 1, dtype=torch.int32), torch.rand(130, 1) + 0.5
    x = inputs(130, 128)
    monkeypatch.setattr("k26_kernels.experts.choose", lambda *arguments: "128")
    make_plan.cache_clear()
    result = result_of(device, weights, x, ids, topk_weights)
    make_plan.cache_clear()
    assert error(result, judge(weights, x, ids, topk_weights)) <= TOLERANCE


@pytest.mark.parametrize("num_tokens", [1, 5])
@pytest.mark.parametrize(
    ("hidden_size", "intermediate_size", "parts"), [(1024, 128, (2, 1)), (128, 1024, (1, 2))], ids=str
)
def test_split_along_k(
    device: torch.device, hidden_size: int, intermediate_size: int, parts: tuple[int, int], num_tokens: int
) -> None:
    """If few tokens, sorted or not, give a GEMM too few tiles to fill the GPU, the GEMM is cut along K, and its partial
    sums are added in their order."""
    weights = make_weights(2, hidden_size, intermediate_size)
    ids, topk_weights = torch.tensor([[1], [0], [1], [-1], [1]])[:num_tokens], torch.full((num_tokens, 1), 0.7)
    x = inputs(num_tokens, hidden_size)
    experts = on(device, weights)
    plan = make_plan(experts.device, experts.shape, num_tokens, 1, 2)
    assert plan.sorted == (num_tokens > 1)
    if device.type == "cpu":
        assert (plan.split_w13, plan.split_w2) == parts
    result = fused_experts(x.to(device), experts, ids.to(device), topk_weights.to(device)).cpu()
    assert error(result, judge(weights, x, ids, topk_weights)) <= TOLERANCE


H200 = Device(TARGETS["sm_90"], "NVIDIA H200", 132)
TP8, EP8, EP64 = Shape(7168, 256, 384), Shape(7168, 2048, 48), Shape(7168, 2048, 6)
PARTS = {
    (TP8, 4): (4, 1), (TP8, 5): (2, 1), (TP8, 8): (2, 1), (TP8, 9): (1, 1), (TP8, 64): (1, 1),
    (EP8, 4): (4, 2), (EP8, 5): (2, 1), (EP8, 8): (2, 1), (EP8, 9): (1, 1),
    (EP64, 5): (8, 4), (EP64, 32): (4, 2), (EP64, 33): (1, 1),
}  # fmt: skip


@pytest.mark.parametrize(("shape", "num_tokens"), PARTS)
def test_into_how_many_parts_a_rank_s_gemms_are_cut(shape: Shape, num_tokens: int) -> None:
    """The GEMMs of few tokens are cut along K, sorted or not, but never where a token's bits must not depend on its
    batch."""
    plan = make_plan(H200, shape, num_tokens, 8, 384)
    assert (plan.split_w13, plan.split_w2) == PARTS[shape, num_tokens]
    fixed = make_plan(H200, shape, num_tokens, 8, 384, batch_invariant=True)
    assert (fixed.split_w13, fixed.split_w2) == (1, 1)


@pytest.mark.parametrize(("num_tokens", "num_experts"), [(5, 384), (16, 48), (64, 6), (1000, 384)])
def test_the_expected_blocks_are_those_of_an_even_choice(num_tokens: int, num_experts: int) -> None:
    """`expected_blocks` is about the average over even choices; where blocks fill, it is the fewest blocks that the
    tokens can have."""
    layer = Layer("a rank's", 7168, 256, num_experts)
    counts = [
        layer.pairs_here(layer.choose("uniform", num_tokens, seed)).bincount(minlength=num_experts)
        for seed in range(40)
    ]
    blocks = sum(((count + 15) // 16).sum().item() for count in counts) / len(counts)
    expected = expected_blocks(num_tokens, 8, num_experts, 384, 16)
    assert 0.6 * blocks <= expected <= 1.15 * blocks


@pytest.mark.parametrize("num_tokens", [3, 20])
def test_pairs_without_an_expert_here(device: torch.device, num_tokens: int) -> None:
    """Each of two ranks leaves out the ids of −1 and the other rank's experts, so that the two ranks' sums add up."""
    weights = make_weights(6, 128, 128)
    ids, topk_weights = route(num_tokens, 3, 6)
    ids[0] = -1
    ids[1, 1] = -1
    x = inputs(num_tokens, 128)
    expected = judge(weights, x, ids, topk_weights)
    total = torch.zeros(num_tokens, 128, dtype=torch.float64)
    for mine in ([5, 0], [2, 1, 3, 4]):
        expert_map = torch.full((6,), -1, dtype=torch.int32)
        expert_map[torch.tensor(mine)] = torch.arange(len(mine), dtype=torch.int32)
        part = weights.copy_of(mine)
        total += result_of(device, part, x, ids, topk_weights, expert_map=expert_map.to(device)).double()
    assert not total[0].any()
    assert error(total, expected) <= TOLERANCE


@pytest.mark.parametrize(("num_tokens", "dtype"), [(7, torch.int64), (10, torch.int32), (20, torch.int64)], ids=str)
def test_what_is_no_experts_id_counts_as_none(device: torch.device, num_tokens: int, dtype: torch.dtype) -> None:
    """An id without an expert counts as none, and so does an entry of the expert map without one; nothing outside the
    map is read."""
    weights = make_weights(4, 128, 128)
    x, topk_weights = inputs(num_tokens, 128), route(num_tokens, 2, 4)[1]
    around = torch.arange(12, dtype=torch.int32) % 4  # a read beyond the map's ends would find an expert
    around[2:10] = torch.tensor([2, 0, -1, 1, 3, 4, -3, 2**30])
    strange = [8, 9, -2, 384, *([2**32, 2**32 + 1] if dtype == torch.int64 else [])]
    for expert_map, wrong in ((None, [4, *strange]), (around.to(device)[2:10], [2, 5, 6, 7, *strange])):
        pairs = [((0, 1, 3)[token % 3], wrong[token % len(wrong)]) for token in range(num_tokens)]
        results = [
            result_of(device, weights, x, torch.tensor(chosen, dtype=dtype), topk_weights, expert_map=expert_map)
            for chosen in (pairs, [(right, -1) for right, _ in pairs])
        ]
        assert torch.equal(*results)


def test_tensor_parallel_ranks_add_up(device: torch.device) -> None:
    """The sums of two tensor-parallel ranks add up, each with 128 inputs of w2, the fewest that the kernels take."""
    weights = make_weights(3, 128, 256)
    ids, topk_weights = route(6, 2, 3)
    x = inputs(6, 128)
    total = torch.zeros(6, 128, dtype=torch.float64)

    def rows(tensor: torch.Tensor, rank: int) -> torch.Tensor:
        return torch.cat([half.chunk(2, dim=1)[rank] for half in tensor.chunk(2, dim=1)], dim=1)

    for rank in range(2):
        part = ExpertWeights(
            rows(weights.w13_packed, rank),
            rows(weights.w13_scale, rank),
            weights.w2_packed.chunk(2, dim=2)[rank].contiguous(),
            weights.w2_scale.chunk(2, dim=2)[rank].contiguous(),
        )
        total += result_of(device, part, x, ids, topk_weights).double()
    assert error(total, judge(weights, x, ids, topk_weights)) <= TOLERANCE


class Counted:
    """A kernel whose launches are recorded by name."""

    def __init__(self, kernel: Any, name: str, launched: list[str]) -> None:
        self.kernel, self.name, self.launched = kernel, name, launched

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        self.launched.append(self.name)
        return self.kernel[grid]


@pytest.mark.parametrize(
    ("num_tokens", "sorting"), [(4, []), (5, ["align"]), (128, ["align"]), (129, ["count", "place"])], ids=str
)
def test_launches_a_layer(
    device: torch.device, monkeypatch: pytest.MonkeyPatch, num_tokens: int, sorting: list[str]
) -> None:
    launched: list[str] = []
    for module, names in (
        (experts_module, ("moe_gemm", "silu_and_mul", "reduce")),
        (align, ("align", "count", "place")),
    ):
        for name in names:
            kernel = getattr(module, f"{name}_kernel")
            monkeypatch.setattr(module, f"{name}_kernel", Counted(kernel, name, launched))
    ids = torch.full((num_tokens, 8), -1, dtype=torch.int32)
    ids[0, :2] = torch.tensor([1, 0])
    # At these sizes no GEMM is cut along K, which would add launches.
    weights, x, topk_weights = make_weights(2, 128, 256), inputs(num_tokens, 128), torch.ones(num_tokens, 8)
    result = result_of(device, weights, x, ids, topk_weights)
    assert launched == [*sorting, "moe_gemm", "moe_gemm", "reduce"]
    assert error(result[:1], judge(weights, x[:1], ids[:1], topk_weights)) <= TOLERANCE


def test_no_tokens(device: torch.device) -> None:
    ids = torch.empty(0, 2, dtype=torch.int32)
    result = result_of(device, make_weights(2, 128, 128), inputs(0, 128), ids, torch.empty(0, 2))
    assert result.shape == (0, 128)


def test_nobody_chose_an_expert_here(device: torch.device) -> None:
    for num_tokens in (2, 9):
        nobody = torch.full((num_tokens, 2), -1, dtype=torch.int32)
        x = inputs(num_tokens, 128)
        assert not result_of(device, make_weights(2, 128, 128), x, nobody, torch.ones(num_tokens, 2)).any()


def test_batches_longer_than_the_workspace_holds(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    weights = make_weights(2, 128, 128)
    ids, topk_weights = route(11, 2, 2)
    x = inputs(11, 128)
    whole = result_of(device, weights, x, ids, topk_weights, batch_invariant=True)
    monkeypatch.setattr("k26_kernels.experts.TOKENS_AT_ONCE", 4)
    assert torch.equal(result_of(device, weights, x, ids, topk_weights, batch_invariant=True), whole)


def test_batch_invariant(device: torch.device) -> None:
    """A token has the same bits alone, with one other, and among many that chose the same experts."""
    weights = make_weights(3, 128, 128)
    ids, topk_weights = route(20, 2, 3)
    x = inputs(20, 128)
    many = result_of(device, weights, x, ids, topk_weights, batch_invariant=True)
    for rows in (slice(0, 1), slice(17, 19)):
        few = result_of(device, weights, x[rows], ids[rows], topk_weights[rows], batch_invariant=True)
        assert torch.equal(few, many[rows])


def test_the_callers_workspace(device: torch.device) -> None:
    """The caller's workspace may hold anything before the call, and its size is enough for every smaller batch."""
    weights = make_weights(3, 128, 128)
    experts = on(device, weights)
    workspace = torch.full((workspace_bytes(experts, 6, 2),), 0xFF, dtype=torch.uint8, device=device)
    for num_tokens in (6, 1):
        ids, topk_weights = (tensor.to(device) for tensor in route(num_tokens, 2, 3))
        x = inputs(num_tokens, 128).to(device)
        out = torch.empty(num_tokens, 128, device=device)
        result = fused_experts(x, experts, ids, topk_weights, out=out, workspace=workspace)
        assert result is out
        assert torch.equal(out.bfloat16(), fused_experts(x, experts, ids, topk_weights))


@settings(max_examples=40, deadline=None)
@given(
    num_tokens=st.integers(1, 9000),
    top_k=st.sampled_from([1, 2, 8]),
    here=st.sampled_from([1, 3, 48, 384]),
    intermediate_size=st.sampled_from([128, 256, 2048]),
    target=st.sampled_from(list(TARGETS)),
    batch_invariant=st.booleans(),
)
def test_workspaces_cover_every_smaller_batch(
    num_tokens: int, top_k: int, here: int, intermediate_size: int, target: str, batch_invariant: bool
) -> None:
    device, shape = Device(TARGETS[target], "a GPU", 132), Shape(7168, intermediate_size, here)
    nothing = torch.empty(0)
    experts = KernelExperts(nothing, nothing, nothing, nothing, device, shape)
    room = workspace_bytes(experts, num_tokens, top_k, 384, batch_invariant)
    most = min(num_tokens, TOKENS_AT_ONCE)
    for count in {*range(1, min(most, 600) + 1), *range(1, most + 1, 37), most}:
        assert make_plan(device, shape, count, top_k, 384, batch_invariant).bytes <= room, count


def test_inputs_that_are_refused(device: torch.device) -> None:
    experts = on(device, make_weights(2, 128, 128))
    ids, topk_weights = (tensor.to(device) for tensor in route(3, 2, 2))
    x = inputs(3, 128).to(device)
    with pytest.raises(ValueError, match=r"hidden_states are torch\.float32 \[3, 128\]"):
        fused_experts(x.float(), experts, ids, topk_weights)
    with pytest.raises(ValueError, match=r"topk_weights are torch\.float64"):
        fused_experts(x, experts, ids, topk_weights.double())
    with pytest.raises(ValueError, match=r"expected a contiguous \[3, 128\]"):
        fused_experts(x, experts, ids, topk_weights, out=torch.empty(128, 3, device=device).T)
    with pytest.raises(ValueError, match="the workspace is 16 of"):
        fused_experts(x, experts, ids, topk_weights, workspace=torch.empty(16, dtype=torch.uint8, device=device))
    with pytest.raises(ValueError, match="multiples of 128, on each rank: these are 128 and 64"):
        on(device, make_weights(2, 128, 64))


def test_strided_inputs(device: torch.device) -> None:
    weights = make_weights(3, 128, 128)
    ids, topk_weights = route(6, 2, 3)
    x = inputs(6, 128)
    expected = result_of(device, weights, x, ids, topk_weights)
    wide = torch.zeros(6, 160, dtype=torch.bfloat16)
    wide[:, 16:144] = x
    strided_ids = torch.zeros(6, 4, dtype=torch.int32)
    strided_ids[:, ::2] = ids
    assert torch.equal(result_of(device, weights, wide[:, 16:144], strided_ids[:, ::2], topk_weights), expected)
