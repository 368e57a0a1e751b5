"""Tests of the order in which `repack` stores the weights, against compressed-tensors' own unpacking."""

from __future__ import annotations

import pytest
import torch
from bench.dequantize import dequantize
from k26_kernels.layout import FRAGMENTS, SLAB, repack, restore, row_order
from k26_kernels.reference import dequantize_reference
from support.experts import dense, make_weights

MATRICES = [("w13", True), ("w2", False)]


@pytest.mark.parametrize("fragment", FRAGMENTS)
@pytest.mark.parametrize(("matrix", "gated"), MATRICES)
def test_repacking_is_undone(fragment: str, matrix: str, gated: bool) -> None:
    weights = make_weights(2, 256, 256)
    packed, scale = getattr(weights, f"{matrix}_packed"), getattr(weights, f"{matrix}_scale")
    before = packed.clone(), scale.clone()
    storage = packed.data_ptr(), scale.data_ptr()
    repack(packed, scale, fragment, gated=gated)
    assert (packed.data_ptr(), scale.data_ptr()) == storage
    assert not torch.equal(packed, before[0])
    assert not torch.equal(scale, before[1])
    restore(packed, scale, fragment, gated=gated)
    assert torch.equal(packed, before[0])
    assert torch.equal(scale, before[1])


@pytest.mark.parametrize("fragment", FRAGMENTS)
def test_slabs_make_no_difference(fragment: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A matrix larger than a slab is rearranged in parts, with the same result as in one piece."""
    weights = make_weights(1, 256, 256)
    whole, parts = weights.copy_of([0]), weights.copy_of([0])
    assert whole.w13_packed.numel() * 8 < SLAB
    repack(whole.w13_packed, whole.w13_scale, fragment, gated=True)
    monkeypatch.setattr("k26_kernels.layout.SLAB", 64 * 256)
    repack(parts.w13_packed, parts.w13_scale, fragment, gated=True)
    assert torch.equal(parts.w13_packed, whole.w13_packed)
    assert torch.equal(parts.w13_scale, whole.w13_scale)


@pytest.mark.parametrize("fragment", FRAGMENTS)
def test_a_thread_finds_what_it_feeds_to_the_instruction(fragment: str) -> None:
    """The first 16 bytes of each lane hold weights of the rows and inputs that its matrix instruction takes from that
    lane."""
    row, k = torch.meshgrid(torch.arange(64), torch.arange(128), indexing="ij")
    # Each weight is replaced by a nibble of its row's number, then of its input's number: four passes name every
    # weight.
    named = []
    for digit in (row % 16, row // 16, k % 16, k // 16):
        words = (digit.to(torch.int32).unflatten(-1, (-1, 8)) << torch.arange(0, 32, 4, dtype=torch.int32)).sum(
            -1, dtype=torch.int32
        )
        packed, scale = words[None].clone(), torch.ones(1, 64, 4, dtype=torch.bfloat16)
        repack(packed, scale, fragment, gated=False)
        stored = packed.flatten()
        named.append((stored[:, None] >> torch.arange(0, 32, 4, dtype=torch.int32)) & 0xF)
    rows, inputs = named[0] + 16 * named[1], named[2] + 16 * named[3]
    lanes = 64 if fragment.startswith("mfma") else 32
    for lane in range(lanes):
        mine = slice(4 * lane, 4 * lane + 4)
        if fragment == "mfma":
            expected_rows = {lane % 16}
            expected_inputs = {16 * step + 4 * (lane // 16) + i for step in range(8) for i in range(4)}
        elif fragment == "mfma32":
            expected_rows = {lane % 16}
            expected_inputs = {32 * step + 8 * (lane // 16) + i for step in range(4) for i in range(8)}
        elif fragment == "tmem":
            expected_rows, expected_inputs = {lane}, set(range(32))
        else:
            g, t = divmod(lane, 4)
            expected_rows = {g, g + 8}
            pair = (2 * t, 2 * t + 1, 2 * t + 8, 2 * t + 9) if fragment == "wgmma" else range(4 * t, 4 * t + 4)
            expected_inputs = {16 * step + i for step in range(4) for i in pair}
        assert set(rows[mine].flatten().tolist()) == expected_rows
        assert set(inputs[mine].flatten().tolist()) == expected_inputs
    # A word's eight weights share one scale, so they are of one row and of one group of inputs.
    assert (rows == rows[:, :1]).all()
    assert (inputs // 32 == inputs[:, :1] // 32).all()


def test_gate_and_up_rows_alternate_by_eight() -> None:
    assert row_order(32, True, torch.device("cpu")).tolist() == [
        *range(8),
        *range(16, 24),
        *range(8, 16),
        *range(24, 32),
    ]


@pytest.mark.parametrize(("out_features", "in_features"), [(96, 128), (128, 192)])
def test_sizes_that_do_not_fit_are_refused(out_features: int, in_features: int) -> None:
    packed = torch.zeros(1, out_features, in_features // 8, dtype=torch.int32)
    scale = torch.zeros(1, out_features, in_features // 32, dtype=torch.bfloat16)
    with pytest.raises(ValueError, match=f"this one is {out_features} × {in_features}"):
        repack(packed, scale, "mma", gated=False)


@pytest.mark.parametrize(("matrix", "gated"), MATRICES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_dequantize(each_layout: str, device: torch.device, matrix: str, gated: bool, dtype: torch.dtype) -> None:
    from k26_kernels.target import TARGETS

    fragment = TARGETS[each_layout].fragment
    weights = make_weights(4, 256, 128)
    packed, scale = getattr(weights, f"{matrix}_packed"), getattr(weights, f"{matrix}_scale")
    expected = torch.stack([dense(packed[expert], scale[expert]) for expert in range(4)]).to(dtype)
    packed, scale = packed.to(device), scale.to(device)
    repack(packed, scale, fragment, gated=gated)
    chosen = torch.tensor([2, 0, 2], device=device)
    result = dequantize(packed, scale, chosen, dtype, gated=gated)
    assert torch.equal(result.cpu(), expected[chosen.cpu()])
    assert torch.equal(dequantize_reference(packed, scale, fragment, dtype, gated=gated).cpu(), expected)


def test_dequantize_no_experts(device: torch.device) -> None:
    weights = make_weights(1, 128, 128)
    none = torch.empty(0, dtype=torch.int64, device=device)
    result = dequantize(weights.w2_packed.to(device), weights.w2_scale.to(device), none, gated=False)
    assert result.shape == (0, 128, 128)
    with pytest.raises(ValueError, match=r"not to torch\.float32"):
        dequantize(weights.w2_packed, weights.w2_scale, none, torch.float32, gated=False)
