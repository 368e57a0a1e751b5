"""The routed sum, against float64 on weights that compressed-tensors unpacks."""

from __future__ import annotations

from importlib import import_module
from typing import Any

import pytest
import torch
from k26_kernels import KernelExperts, fused_experts, workspace_bytes
from k26_kernels.config import regimes
from k26_kernels.experts import make_plan
from k26_kernels.reference import fused_experts_reference
from support.experts import error, inputs, judge, make_weights, route, to_device

from k26_plugins.common.experts import ExpertWeights

experts_module, align = (import_module(f"k26_kernels.{name}") for name in ("experts", "align"))

# Weights, activations and the result are rounded to bfloat16 (1.5e-3 each); so few values scatter around the mean.
TOLERANCE = 5e-3


def on(device: torch.device, weights: ExpertWeights) -> KernelExperts:
    """The kernels' experts from copies on the device."""
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
    """Few tokens without sorting, more with it."""
    weights = make_weights(4, 256, 128)
    ids, topk_weights = route(num_tokens, 2, 4)
    x = inputs(num_tokens, 256)
    expected = judge(weights, x, ids, topk_weights)
    assert error(result_of(device, weights, x, ids, topk_weights), expected) <= TOLERANCE
    plain = fused_experts_reference(x.to(device), on(device, weights), ids.to(device), topk_weights.to(device))
    assert error(plain.cpu(), expected) <= 1e-5


@pytest.mark.parametrize(
    ("num_tokens", "top_k", "num_experts", "hidden", "inner"),
    [(2, 8, 9, 128, 128), (4, 1, 3, 128, 256), (5, 8, 8, 128, 128), (12, 2, 2, 128, 128), (50, 1, 1, 128, 128)],
    ids=str,
)
def test_against_float64(
    device: torch.device, num_tokens: int, top_k: int, num_experts: int, hidden: int, inner: int
) -> None:
    weights = make_weights(num_experts, hidden, inner)
    ids, topk_weights = route(num_tokens, top_k, num_experts)
    x = inputs(num_tokens, hidden)
    expected = judge(weights, x, ids, topk_weights)
    assert error(result_of(device, weights, x, ids, topk_weights), expected) <= TOLERANCE


def test_the_largest_blocks(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """The one regime that the shapes above do not reach."""
    experts = on(device, make_weights(2, 128, 128))
    reached = {
        make_plan(experts.device, experts.shape, tokens, top_k, count).regime.block_tokens
        for tokens, top_k, count in [(2, 8, 9), (5, 8, 8), (12, 2, 2), (50, 1, 1)]
    }
    assert {regime.block_tokens for regime in regimes(experts.device, experts.shape).values()} - reached == {128}
    weights = make_weights(1, 128, 128)
    ids, topk_weights = torch.zeros(130, 1, dtype=torch.int32), torch.rand(130, 1) + 0.5
    x = inputs(130, 128)
    monkeypatch.setattr("k26_kernels.experts.choose", lambda *arguments: "128")
    make_plan.cache_clear()
    result = result_of(device, weights, x, ids, topk_weights)
    make_plan.cache_clear()
    assert error(result, judge(weights, x, ids, topk_weights)) <= TOLERANCE


@pytest.mark.parametrize(("hidden", "inner", "parts"), [(1024, 128, (2, 1)), (128, 1024, (1, 2))], ids=str)
def test_split_along_k(device: torch.device, hidden: int, inner: int, parts: tuple[int, int]) -> None:
    """Where the tiles of a few tokens do not fill the GPU, the parts of a product are summed in their order."""
    weights = make_weights(2, hidden, inner)
    ids, topk_weights = torch.tensor([[1]]), torch.tensor([[0.7]])
    x = inputs(1, hidden)
    experts = on(device, weights)
    plan = make_plan(experts.device, experts.shape, 1, 1, 2)
    if device.type == "cpu":
        assert (plan.split_w13, plan.split_w2) == parts
    result = fused_experts(x.to(device), experts, ids.to(device), topk_weights.to(device)).cpu()
    assert error(result, judge(weights, x, ids, topk_weights)) <= TOLERANCE


@pytest.mark.parametrize("num_tokens", [3, 20])
def test_slots_without_an_expert_here(device: torch.device, num_tokens: int) -> None:
    """−1, ids of other ranks, and the two ranks' sums."""
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
    """In the ids and in the map, which is read nowhere else."""
    weights = make_weights(4, 128, 128)
    x, topk_weights = inputs(num_tokens, 128), route(num_tokens, 2, 4)[1]
    around = torch.arange(12, dtype=torch.int32) % 4  # to read beyond the map's end would give an expert
    around[2:10] = torch.tensor([2, 0, -1, 1, 3, 4, -3, 2**30])
    strange = [8, 9, -2, 384, *([2**32, 2**32 + 1] if dtype == torch.int64 else [])]
    for expert_map, wrong in ((None, [4, *strange]), (around.to(device)[2:10], [2, 5, 6, 7, *strange])):
        slots = [((0, 1, 3)[token % 3], wrong[token % len(wrong)]) for token in range(num_tokens)]
        results = [
            result_of(device, weights, x, torch.tensor(chosen, dtype=dtype), topk_weights, expert_map=expert_map)
            for chosen in (slots, [(right, -1) for right, _ in slots])
        ]
        assert torch.equal(*results)


def test_tensor_parallel_ranks_add_up(device: torch.device) -> None:
    """Down to 128 inputs of w2 on a rank."""
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
    """A kernel whose launches are counted."""

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
    for module, names in ((experts_module, ("product", "activate", "reduce")), (align, ("align", "count", "place"))):
        for name in names:
            kernel = getattr(module, f"{name}_kernel")
            monkeypatch.setattr(module, f"{name}_kernel", Counted(kernel, name, launched))
    ids = torch.full((num_tokens, 8), -1, dtype=torch.int32)
    ids[0, :2] = torch.tensor([1, 0])
    # Not so few experts that a product would be cut along K.
    weights, x, topk_weights = make_weights(2, 128, 256), inputs(num_tokens, 128), torch.ones(num_tokens, 8)
    result = result_of(device, weights, x, ids, topk_weights)
    assert launched == [*sorting, "product", "product", "reduce"]
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
    """A token's bits, alone, with one other, and among many that chose the same experts."""
    weights = make_weights(3, 128, 128)
    ids, topk_weights = route(20, 2, 3)
    x = inputs(20, 128)
    many = result_of(device, weights, x, ids, topk_weights, batch_invariant=True)
    for rows in (slice(0, 1), slice(17, 19)):
        few = result_of(device, weights, x[rows], ids[rows], topk_weights[rows], batch_invariant=True)
        assert torch.equal(few, many[rows])


def test_the_callers_workspace(device: torch.device) -> None:
    """Of any former content, and one size for every smaller batch."""
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


def test_workspaces_cover_every_smaller_batch(device: torch.device) -> None:
    experts = on(device, make_weights(16, 128, 128))
    for num_tokens in (1, 3, 30, 600, 3000, 9000):
        room = workspace_bytes(experts, num_tokens, 8, 64)
        for count in {1, 2, 3, 4, 5, 100, 512, 513, num_tokens}:
            if count <= min(num_tokens, 8192):
                assert make_plan(experts.device, experts.shape, count, 8, 64).bytes <= room


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
