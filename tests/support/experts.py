"""Makes expert weights and inputs, and computes in float64 what the backends of experts must give.

The judge uses none of the core's arithmetic: compressed-tensors unpacks the weights, and PyTorch multiplies them.
"""

from __future__ import annotations

import weakref

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from compressed_tensors.compressors.pack_quantized.helpers import unpack_from_int32

from k26_plugins.common.experts import BACKENDS, ExpertWeights
from k26_plugins.common.model.int4 import quantize


def make_weights(num_experts: int, hidden: int, inner: int, seed: int = 0) -> ExpertWeights:
    """Return random INT4 experts. hidden: the model's width. inner: the experts' intermediate size."""
    generator = torch.Generator().manual_seed(seed)
    w13 = torch.randn(num_experts, 2 * inner, hidden, generator=generator) / hidden**0.5
    w2 = torch.randn(num_experts, hidden, inner, generator=generator) / inner**0.5
    return ExpertWeights(*quantize(w13), *quantize(w2))


def dense(packed: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """Return one expert's packed INT4 weights as a float64 matrix `[rows, inputs]`, unpacked by compressed-tensors."""
    shape = torch.Size((packed.shape[0], packed.shape[1] * 8))
    return unpack_from_int32(packed, 4, shape).double() * scale.double().repeat_interleave(32, dim=1)


def judge(weights: ExpertWeights, x: torch.Tensor, ids: torch.Tensor, topk_weights: torch.Tensor) -> torch.Tensor:
    """Return the experts' output in float64, `[num_tokens, hidden]`, computed token by token from the definition.

    An id below 0 is no expert.
    """
    out = torch.zeros(x.shape, dtype=torch.float64)
    for token in range(len(x)):
        for index, weight in zip(ids[token].tolist(), topk_weights[token].double(), strict=True):
            if index < 0:
                continue
            expert = weights.expert(index)
            gate, up = (dense(expert.w13_packed, expert.w13_scale) @ x[token].double()).chunk(2)
            out[token] += weight * (dense(expert.w2_packed, expert.w2_scale) @ (F.silu(gate) * up))
    return out


def route(num_tokens: int, top_k: int, num_experts: int, seed: int = 1) -> tuple[torch.Tensor, torch.Tensor]:
    """Return random expert ids, int32, and their float32 weights, both `[num_tokens, top_k]`."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.stack([torch.randperm(num_experts, generator=generator)[:top_k] for _ in range(num_tokens)])
    return ids.to(torch.int32), torch.rand(num_tokens, top_k, generator=generator) + 0.1


def inputs(num_tokens: int, hidden: int) -> torch.Tensor:
    """Return random bfloat16 hidden states `[num_tokens, hidden]`, the same in every call."""
    return torch.randn(num_tokens, hidden, generator=torch.Generator().manual_seed(2)).to(torch.bfloat16)


def error(result: torch.Tensor, expected: torch.Tensor) -> float:
    """Return the norm of the difference relative to the norm of `expected`."""
    return ((result.double() - expected).norm() / expected.norm()).item()


def to_device(weights: ExpertWeights, device: torch.device) -> ExpertWeights:
    """Return a copy of the weights on the device."""
    tensors = (weights.w13_packed, weights.w13_scale, weights.w2_packed, weights.w2_scale)
    return ExpertWeights(*(tensor.to(device, copy=True) for tensor in tensors))


LENT: list[np.ndarray] = []  # keeps the memory: once the system had it back, a read would end the process


def overwritten_when_let_go(weights: ExpertWeights) -> ExpertWeights:
    """Return a copy of the weights whose memory is filled with other bytes as soon as no tensor uses it.

    Code that still reads that memory, by an address that it kept, then computes a wrong result instead of crashing.
    """

    def lend(tensor: torch.Tensor) -> torch.Tensor:
        memory = tensor.contiguous().view(torch.uint8).flatten().numpy().copy()
        LENT.append(memory)
        lent = memory.view()  # torch holds this view as long as a tensor uses the memory
        weakref.finalize(lent, memory.fill, 0x3C)
        return torch.from_numpy(lent).view(tensor.dtype).view(tensor.shape)

    return ExpertWeights(
        *(lend(tensor) for tensor in (weights.w13_packed, weights.w13_scale, weights.w2_packed, weights.w2_scale))
    )


def backends() -> list[object]:
    """Return every backend's name as a test's parameter, marked to be skipped if this machine cannot run it."""
    weights = make_weights(1, 128, 64)
    reasons = {name: backend.unsupported(weights) for name, backend in sorted(BACKENDS.items())}
    return [
        pytest.param(name, marks=pytest.mark.skipif(reason is not None, reason=f"{name}: {reason}"))
        for name, reason in reasons.items()
    ]
