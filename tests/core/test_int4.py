"""Tests of the INT4 format. The judge is compressed-tensors."""

from __future__ import annotations

import pytest
import torch
from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32, unpack_from_int32

from k26_plugins.common.model.int4 import PackingError, dequantize, pack, quantize, unpack


def test_the_specifications_vectors() -> None:
    q = torch.tensor([list(range(-8, 0)), list(range(8))], dtype=torch.int8)
    assert pack(q).flatten().tolist() == [0x76543210, -19088744]


@pytest.mark.parametrize("shape", [(1, 8), (3, 32), (64, 128), (5, 4096)], ids=str)
def test_bit_equal_with_compressed_tensors(shape: tuple[int, int]) -> None:
    q = torch.randint(-8, 8, shape, generator=torch.Generator().manual_seed(0), dtype=torch.int8)
    packed = pack_to_int32(q, 4)
    assert torch.equal(pack(q), packed)
    assert torch.equal(unpack(packed), unpack_from_int32(packed, 4, torch.Size(shape)))


def test_views_of_any_strides() -> None:
    q = torch.randint(-8, 8, (3, 64, 5), generator=torch.Generator().manual_seed(0)).permute(2, 0, 1)
    packed = torch.stack([pack_to_int32(one.to(torch.int8).contiguous(), 4) for one in q])
    assert torch.equal(pack(q), packed)
    assert torch.equal(unpack(packed.transpose(0, 1)), q.transpose(0, 1))


def test_dequantize_is_the_product_rounded_once() -> None:
    weight = torch.randn(16, 96, generator=torch.Generator().manual_seed(0))
    packed, scale = quantize(weight)
    q = unpack_from_int32(packed, 4, torch.Size(weight.shape))
    expected = q.double() * scale.double().repeat_interleave(32, dim=1)
    assert torch.equal(dequantize(packed, scale, torch.float64), expected)
    assert torch.equal(dequantize(packed, scale), expected.to(torch.bfloat16))
    # The bound is half a step, plus what bfloat16 rounds off the scale (2^-9) at the eighth step.
    step = scale.double().repeat_interleave(32, dim=1)
    assert ((expected - weight.double()).abs() <= step * (0.5 + 8 / 2**8)).all()


def test_a_group_of_zeros_stays_zero() -> None:
    packed, scale = quantize(torch.zeros(2, 32))
    assert torch.equal(dequantize(packed, scale), torch.zeros(2, 32, dtype=torch.bfloat16))


def test_shapes_and_dtypes_that_do_not_fit() -> None:
    with pytest.raises(PackingError, match="multiple of 8"):
        pack(torch.zeros(2, 12, dtype=torch.int8))
    with pytest.raises(PackingError, match="cannot pack -9 to 8: INT4 holds -8 to 7"):
        pack(torch.tensor([[8, -9, 0, 0, 0, 0, 0, 0]], dtype=torch.int8))
    with pytest.raises(PackingError, match="multiple of 32"):
        quantize(torch.zeros(2, 48))
    with pytest.raises(PackingError, match="int32"):
        unpack(torch.zeros(2, 4, dtype=torch.int64))
    with pytest.raises(PackingError, match="do not belong together"):
        dequantize(torch.zeros(2, 8, dtype=torch.int32), torch.zeros(2, 1))
