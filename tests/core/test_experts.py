"""The expert backends, against float64 on weights that compressed-tensors unpacks."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
from collections.abc import Callable

import pytest
import torch
from compressed_tensors.compressors.pack_quantized.helpers import unpack_from_int32
from support.experts import backends, error, inputs, judge, make_weights, route

from k26_plugins.common.experts import BACKENDS, Expert, ExpertsBackend, ExpertsError, ExpertWeights, create_experts
from k26_plugins.common.experts.cpu import DENSE_FROM, CpuExperts, Int4Matrix, packed_layout
from k26_plugins.common.int4 import quantise

# What runs on a CPU. tests/kernels holds the Triton backend to the same.

# bfloat16 rounds to 2^-9 (0.2 %) and the result passes through three to five roundings.
TOLERANCE = 6e-3


@pytest.mark.parametrize("backend", backends())
@pytest.mark.parametrize(
    ("num_tokens", "top_k", "num_experts", "hidden", "inner"),
    [(1, 2, 8, 128, 64), (3, 4, 4, 128, 32), (17, 1, 8, 192, 96), (130, 2, 3, 128, 64), (1, 8, 8, 256, 128)],
    ids=str,
)
def test_against_float64(backend: str, num_tokens: int, top_k: int, num_experts: int, hidden: int, inner: int) -> None:
    weights = make_weights(num_experts, hidden, inner)
    ids, topk_weights = route(num_tokens, top_k, num_experts)
    x = inputs(num_tokens, hidden)
    expected = judge(weights, x, ids, topk_weights)
    experts = create_experts(weights.copy_of(list(range(num_experts))), backend)
    result = experts.apply(x, ids, topk_weights)
    assert result.dtype == torch.bfloat16
    assert error(result, expected) <= TOLERANCE
    out = torch.empty_like(x)
    assert experts.apply(x, ids, topk_weights, out=out) is out
    assert torch.equal(out, result)


@pytest.mark.parametrize("backend", backends())
def test_no_tokens_and_no_experts(backend: str) -> None:
    experts = create_experts(make_weights(4, 128, 64), backend)
    ids, topk_weights = torch.empty(0, 2, dtype=torch.int32), torch.empty(0, 2)
    assert experts.apply(inputs(0, 128), ids, topk_weights).shape == (0, 128)
    nobody = torch.full((3, 2), -1, dtype=torch.int32)
    assert not experts.apply(inputs(3, 128), nobody, torch.ones(3, 2)).any()


@pytest.mark.parametrize("backend", backends())
def test_expert_parallel_ranks_add_up(backend: str) -> None:
    """Two ranks with half of the experts each, unevenly placed, against one rank with all."""
    weights = make_weights(8, 128, 64)
    ids, topk_weights = route(20, 3, 8)
    x = inputs(20, 128)
    expected = judge(weights, x, ids, topk_weights)
    total = torch.zeros(20, 128, dtype=torch.float64)
    for mine in ([0, 3, 4], [7, 1, 2, 5, 6]):
        expert_map = torch.full((8,), -1, dtype=torch.int32)
        expert_map[torch.tensor(mine)] = torch.arange(len(mine), dtype=torch.int32)
        part = create_experts(weights.copy_of(mine), backend)
        total += part.apply(x, ids, topk_weights, expert_map=expert_map).double()
    assert error(total, expected) <= TOLERANCE


@pytest.mark.parametrize("backend", backends())
@pytest.mark.parametrize("size", [2, 4])
def test_tensor_parallel_ranks_add_up(backend: str, size: int) -> None:
    weights = make_weights(4, 128, 128)
    ids, topk_weights = route(70, 2, 4)
    x = inputs(70, 128)
    expected = judge(weights, x, ids, topk_weights)
    total = torch.zeros(70, 128, dtype=torch.float64)

    def rows(tensor: torch.Tensor, rank: int) -> torch.Tensor:
        return torch.cat([half.chunk(size, dim=1)[rank] for half in tensor.chunk(2, dim=1)], dim=1)

    for rank in range(size):
        part = ExpertWeights(
            rows(weights.w13_packed, rank),
            rows(weights.w13_scale, rank),
            weights.w2_packed.chunk(size, dim=2)[rank].contiguous(),
            weights.w2_scale.chunk(size, dim=2)[rank].contiguous(),
        )
        total += create_experts(part, backend).apply(x, ids, topk_weights).double()
    assert error(total, expected) <= TOLERANCE


@pytest.mark.parametrize("backend", backends())
def test_an_experts_rows_can_be_moved(backend: str) -> None:
    """EPLB copies the rows of an expert over another's: the other then computes as it."""
    weights = make_weights(4, 128, 64)
    experts = create_experts(weights.copy_of([0, 1, 2, 3]), backend)
    for tensor in experts.tensors().values():
        assert tensor.is_contiguous()
        flat = tensor.view(4, -1)
        flat[3].copy_(flat[1])
    x = inputs(5, 128)
    ones = torch.ones(5, 1)
    third, first = (experts.apply(x, torch.full((5, 1), index), ones) for index in (3, 1))
    assert torch.equal(third, first)


@pytest.mark.parametrize("backend", backends())
def test_rows_are_restored_to_the_checkpoint_s(backend: str) -> None:
    weights = make_weights(4, 256, 64)
    experts = create_experts(weights.copy_of([0, 1, 2, 3]), backend)
    rows = {name: tensor[[3, 1]].clone() for name, tensor in experts.tensors().items()}
    restored, expected = experts.restore(rows), weights.copy_of([3, 1])
    for name in Expert._fields:
        assert torch.equal(getattr(restored, name), getattr(expected, name)), name


def test_both_paths_of_the_cpu_product_agree() -> None:
    """One token more or less around the threshold: the same rows up to rounding."""
    weights = make_weights(1, 256, 128)
    experts = CpuExperts.load(weights.copy_of([0]))
    x = inputs(DENSE_FROM, 256)
    ids, ones = torch.zeros(DENSE_FROM, 1, dtype=torch.int64), torch.ones(DENSE_FROM, 1)
    many = experts.apply(x, ids, ones)[:-1]
    few = experts.apply(x[:-1], ids[:-1], ones[:-1])
    assert error(many, few.double()) <= TOLERANCE


def test_repacking_is_torchs_own() -> None:
    """The repacked bytes against torch's converter."""
    layout = packed_layout()
    assert layout is not None
    packed, scale = quantise(torch.randn(1, 128, 256))
    u = unpack_from_int32(packed[0], 4, torch.Size((128, 256))).to(torch.int32) + 8
    matrix = Int4Matrix(packed.clone(), scale, layout)
    expected = torch._convert_weight_to_int4pack_for_cpu(u, 1)
    assert torch.equal(matrix.packed[0].view(torch.uint8).flatten(), expected.flatten())


@pytest.mark.parametrize("capability", ["avx2", "default"])
def test_other_instruction_sets(capability: str) -> None:
    """torch lays the weights out otherwise on lesser CPUs: the same tests, with the instructions masked off."""
    if os.environ.get("ATEN_CPU_CAPABILITY"):
        pytest.skip("this is the inner run")
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-p",
        "no:cacheprovider",
        __file__,
        "-k",
        "float64 or add_up or paths or restored",
    ]
    env = {**os.environ, "ATEN_CPU_CAPABILITY": capability}
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-2000:]


def broken(how: Callable[[torch.Tensor], torch.Tensor]) -> type[ExpertsBackend]:
    class Broken(CpuExperts):
        name = "broken"

        def apply(self, *args: torch.Tensor, **kwargs: torch.Tensor | None) -> torch.Tensor:
            return how(super().apply(*args, **kwargs))

    return Broken


@pytest.mark.parametrize(
    "how", [lambda y: y * 1.05, lambda y: y.roll(1, -1), lambda y: y * float("nan")], ids=["scaled", "shuffled", "nan"]
)
def test_garbage_is_found_and_never_served(
    how: Callable[[torch.Tensor], torch.Tensor], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    backend = broken(how)
    monkeypatch.setattr("k26_plugins.common.experts.BACKENDS", {"broken": backend, "reference": BACKENDS["reference"]})
    with caplog.at_level(logging.WARNING):
        assert create_experts(make_weights(4, 128, 64)).name == "reference"
    assert "broken" in caplog.text
    assert "reference is used" in caplog.text
    with pytest.raises(ExpertsError, match=r"broken is not, because it failed the self-test on cpu"):
        create_experts(make_weights(4, 128, 64), "broken")


def test_weights_that_are_refused() -> None:
    weights = make_weights(2, 128, 64)
    with pytest.raises(ExpertsError, match=r"w13_scale is torch.float16"):
        ExpertWeights(weights.w13_packed, weights.w13_scale.half(), weights.w2_packed, weights.w2_scale)
    with pytest.raises(ExpertsError, match="w2_scale has shape"):
        ExpertWeights(weights.w13_packed, weights.w13_scale, weights.w2_packed, weights.w2_scale[..., :1])
    with pytest.raises(ExpertsError, match="no experts backend 'marlin'"):
        create_experts(weights, "marlin")
    with pytest.raises(ExpertsError, match="hidden size of 96"):
        create_experts(make_weights(2, 96, 64), "cpu")
