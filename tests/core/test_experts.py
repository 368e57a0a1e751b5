"""Tests of the expert backends that run on a CPU, against a float64 product of weights that compressed-tensors unpacks.

tests/kernels holds the Triton backend to the same.
"""

from __future__ import annotations

import ctypes
import gc
import logging
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from compressed_tensors.compressors.pack_quantized.helpers import unpack_from_int32
from safetensors import safe_open
from safetensors.torch import save_file
from support.experts import backends, error, inputs, judge, make_weights, overwritten_when_let_go, route
from support.instruction_sets import INSTRUCTION_SET

from k26_plugins.common.experts import BACKENDS, Expert, ExpertsBackend, ExpertsError, ExpertWeights, create_experts
from k26_plugins.common.experts.cpu import DENSE_FROM, CpuExperts, Int4Matrix, PackedLayout, packed_layout
from k26_plugins.common.model.int4 import quantize

# bfloat16 rounds to 2^-9 (0.2 %) and the result passes through three to five roundings.
TOLERANCE = 6e-3


def test_backends_are_found_by_their_own_names() -> None:
    assert all(backend.name == name for name, backend in BACKENDS.items())


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
def test_tensors_lie_and_are_typed_as_a_caller_has_them(backend: str) -> None:
    """The bits are the same if the tensors have gaps between their rows or other dtypes, and if the work is submitted
    first and waited for later."""
    experts = create_experts(make_weights(4, 128, 64), backend)
    x, (ids, topk_weights), expert_map = inputs(5, 128), route(5, 2, 4), torch.tensor([2, 0, -1, 1], dtype=torch.int32)
    expected = experts.apply(x, ids, topk_weights, expert_map=expert_map)
    gaps = [torch.stack((tensor, tensor), dim=1)[:, 0] for tensor in (x, ids.long(), topk_weights.double(), expert_map)]
    assert not any(tensor.is_contiguous() for tensor in gaps)
    out = torch.empty(5, 256, dtype=torch.float32)[:, ::2]
    assert experts.apply(*gaps[:3], expert_map=gaps[3], out=out) is out
    assert torch.equal(out.bfloat16(), expected)
    assert torch.equal(experts.submit(*gaps[:3], expert_map=gaps[3])(), expected)


@pytest.mark.parametrize("backend", backends())
@pytest.mark.parametrize(
    ("name", "given", "message"),
    [
        ("hidden_states", inputs(3, 64), r"hidden_states has shape \[3, 64\], expected \[3, 128\] .*hidden size 128"),
        ("topk_ids", torch.zeros(3), r"topk_ids has shape \[3\], expected \[num_tokens, top_k\]"),
        ("topk_weights", torch.ones(3, 1), r"topk_weights has shape \[3, 1\], expected \[3, 2\] for topk_ids \[3, 2\]"),
        ("expert_map", torch.zeros(4, 1), r"expert_map has shape \[4, 1\], expected \[num_global_experts\]"),
        ("out", inputs(2, 128), r"out has shape \[2, 128\], expected \[3, 128\]"),
    ],
    ids=["hidden_states", "topk_ids", "topk_weights", "expert_map", "out"],
)
def test_a_tensor_of_another_shape_is_named(backend: str, name: str, given: torch.Tensor, message: str) -> None:
    experts = create_experts(make_weights(4, 128, 64), backend)
    ids, topk_weights = route(3, 2, 4)
    right = {"hidden_states": inputs(3, 128), "topk_ids": ids, "topk_weights": topk_weights}
    for run in (experts.apply, experts.submit):
        with pytest.raises(ExpertsError, match=message):
            run(**{**right, name: given})


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64], ids=str)
@pytest.mark.parametrize("backend", backends())
def test_what_is_no_experts_id_counts_as_none(backend: str, dtype: torch.dtype) -> None:
    """Numbers that are no expert's id stand in `topk_ids` and in the expert map, beside valid ids. The result has the
    same bits as with −1 in their place."""
    experts = create_experts(make_weights(4, 128, 64), backend)
    x, topk_weights = inputs(12, 128), route(12, 2, 4)[1]
    strange = [4, 5, 384, -2, -7, 2**31 - 1, *([2**32, 2**62 + 1] if dtype == torch.int64 else [])]
    for expert_map in (None, torch.tensor([2, 0, -1, 1, 3, 4, -3, 2**30], dtype=torch.int32)):
        valid = [0, 1, 2, 3] if expert_map is None else [0, 1, 3, 4]
        wrong = strange if expert_map is None else [value for value in strange if value not in valid] + [2, 5, 6, 7, 8]
        pairs = [(valid[token % 4], wrong[token % len(wrong)]) for token in range(12)]
        ids, none = torch.tensor(pairs, dtype=dtype), torch.tensor([(right, -1) for right, _ in pairs])
        result = experts.apply(x, ids, topk_weights, expert_map=expert_map)
        assert torch.equal(result, experts.apply(x, none, topk_weights, expert_map=expert_map))
        assert result.any()


@pytest.mark.parametrize("backend", backends())
def test_expert_parallel_ranks_add_up(backend: str) -> None:
    """Two ranks have half of the experts each, unevenly placed; together they give what one rank with all gives."""
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
    """EPLB copies the rows of one expert over those of another, which must then compute the same as the first."""
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


@pytest.mark.parametrize("backend", backends())
def test_what_load_was_given_is_kept_or_not_needed(backend: str) -> None:
    """A backend that computes from memory after letting it go would read what another has written there, so the tensors
    given to `load` are overwritten when they are let go."""
    weights = make_weights(4, 256, 64)
    ids, topk_weights = route(60, 2, 4)
    x = inputs(60, 256)
    experts = BACKENDS[backend].load(overwritten_when_let_go(weights))
    gc.collect()
    for part in (x[:1], x):
        result = experts.apply(part, ids[: len(part)], topk_weights[: len(part)])
        assert error(result, judge(weights, part, ids, topk_weights)) <= TOLERANCE


def test_memory_that_was_let_go_is_overwritten() -> None:
    """The test above relies on `overwritten_when_let_go`, which must overwrite memory as soon as no tensor uses it."""
    weights = overwritten_when_let_go(make_weights(1, 128, 64))
    address, size = weights.w2_packed.data_ptr(), weights.w2_packed.nbytes
    kept = weights.w2_packed[:, :1]
    del weights
    assert ctypes.string_at(address, size) != b"\x3c" * size
    del kept
    assert ctypes.string_at(address, size) == b"\x3c" * size


@pytest.mark.parametrize("bfloat16", [False, True])
def test_both_paths_of_the_cpu_product_agree(bfloat16: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """One token more or less around the threshold gives the same rows up to rounding, whether or not the CPU multiplies
    in bfloat16."""
    monkeypatch.setattr("k26_plugins.common.experts.cpu.multiplies_bfloat16", lambda: bfloat16)
    weights = make_weights(1, 256, 128)
    experts = CpuExperts.load(weights.copy_of([0]))
    x = inputs(DENSE_FROM, 256)
    ids, ones = torch.zeros(DENSE_FROM, 1, dtype=torch.int64), torch.ones(DENSE_FROM, 1)
    many = experts.apply(x, ids, ones)[:-1]
    few = experts.apply(x[:-1], ids[:-1], ones[:-1])
    assert error(many, few.double()) <= TOLERANCE


def test_repacking_is_torchs_own() -> None:
    """The repacked bytes are those that torch's own converter gives."""
    layout = packed_layout()
    assert layout is not None
    packed, scale = quantize(torch.randn(1, 128, 256))
    u = unpack_from_int32(packed[0], 4, torch.Size((128, 256))).to(torch.int32) + 8
    matrix = Int4Matrix.repack(packed.clone(), scale, layout)
    expected = torch._convert_weight_to_int4pack_for_cpu(u, 1)
    assert torch.equal(matrix.packed[0].view(torch.uint8).flatten(), expected.flatten())


# With a lesser instruction set than this CPU's best, torch lays the weights out and multiplies in other ways.
LESSER = {"DEFAULT": [], "AVX2": ["default"]}.get(torch.backends.cpu.get_cpu_capability(), ["avx2", "default"])
INNER_RUN = """
import sys
import torch
from safetensors.torch import load_file, save_file
from k26_plugins.common.experts.base import ExpertWeights
from k26_plugins.common.experts.cpu import CpuExperts
given = load_file(sys.argv[1])
experts = CpuExperts.load(ExpertWeights(*(given[name] for name in ("w13_packed", "w13_scale", "w2_packed", "w2_scale"))))
restored = experts.restore(experts.tensors())
save_file(
    {
        **{str(n): experts.apply(*(given[name][:n] for name in ("x", "ids", "weights"))) for n in (1, 17, 130)},
        **{name: getattr(restored, name).contiguous() for name in ("w13_packed", "w13_scale", "w2_packed", "w2_scale")},
    },
    sys.argv[2],
    {"capability": torch.backends.cpu.get_cpu_capability()},
)
"""


def test_lesser_instruction_sets(tmp_path: Path, record_property: Callable[[str, str], None]) -> None:
    """With the better instructions masked off, in a process for each lesser set, the products for few and for many
    tokens are right, and `restore` gives back the checkpoint's weights."""
    weights = make_weights(3, 192, 96)
    ids, topk_weights = route(130, 2, 3)
    x = inputs(130, 192)
    expected = judge(weights, x, ids, topk_weights)
    stored = {name: getattr(weights, name) for name in Expert._fields}
    save_file({**stored, "x": x, "ids": ids, "weights": topk_weights}, tmp_path / "given")
    running = {
        capability: subprocess.Popen(
            [sys.executable, "-c", INNER_RUN, str(tmp_path / "given"), str(tmp_path / capability)],
            env={**os.environ, "ATEN_CPU_CAPABILITY": capability, "PYTHONPATH": os.pathsep.join(sys.path)},
        )
        for capability in LESSER
    }
    for capability, process in running.items():
        assert process.wait() == 0
        with safe_open(tmp_path / capability, "pt") as results:
            assert results.metadata() == {"capability": {"avx2": "AVX2", "default": "DEFAULT"}[capability]}
            for count in (1, 17, 130):
                assert error(results.get_tensor(str(count)), expected[:count]) <= TOLERANCE
            for name in Expert._fields:
                assert torch.equal(results.get_tensor(name), stored[name])
        record_property(INSTRUCTION_SET, f"torch {capability}")
    record_property(INSTRUCTION_SET, f"torch {torch.backends.cpu.get_cpu_capability().lower()}")


def broken(how: Callable[[torch.Tensor], torch.Tensor]) -> type[ExpertsBackend]:
    class Broken(CpuExperts):
        name = "broken"

        def apply(self, *args: torch.Tensor, **kwargs: Any) -> torch.Tensor:
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


def test_weights_that_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    weights = make_weights(2, 128, 64)
    with pytest.raises(ExpertsError, match=r"w13_scale is torch.float16"):
        ExpertWeights(weights.w13_packed, weights.w13_scale.half(), weights.w2_packed, weights.w2_scale)
    with pytest.raises(ExpertsError, match="w2_scale has shape"):
        ExpertWeights(weights.w13_packed, weights.w13_scale, weights.w2_packed, weights.w2_scale[..., :1])
    with pytest.raises(ExpertsError, match="no experts backend 'marlin'"):
        create_experts(weights, "marlin")
    # This is the layout that torch uses with AVX512, in blocks of 64 rows.
    monkeypatch.setattr("k26_plugins.common.experts.cpu.packed_layout", lambda: PackedLayout(64, False))
    with pytest.raises(ExpertsError, match="cpu is not, because hidden size of 96 is no multiple of 64"):
        create_experts(make_weights(2, 96, 64), "cpu")
